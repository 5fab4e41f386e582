"""plait on a CPU, beside llama.cpp and vLLM: one model, the same threads, engines measured in turns.

    python bench/cpu.py [decode prefill c16 mix context startup memory]     all of them: about two hours, if it is quiet
    python bench/cpu.py --dry decode --only 'plait'                         one round of some, nothing written

decode    one sequence, 32 tokens in and 128 out: tokens a second; bytes of weights and KV a second over the memory read
          measured beside it; the part of a step that is not spent in the kernels
prefill   1,024 tokens: tokens a second; multiply-adds over the peak measured beside them
c16       16 requests at once (128 in, 64 out), through HTTP;   mix: 64 requests with lengths like those of chats
context   decoding at 8,192 tokens, one sequence and (plait) eight, with keys and values in 16 and in 8 bits
startup   from starting the process to its first token
memory    the most that a process held, from its start through a prompt of 1,024 tokens

Each writes results/cpu_NAME.json and .png. Ratios are medians of ratios within a round.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peers import engines
from peers.checkpoints import block_weights, ensure_llama, head_weights, longer_context
from peers.engines import Choice, Model
from peers.load import send_all
from peers.machine import Limit, Probe, preferred_session, wait_until_quiet
from peers.process import Driver, HighestPss
from peers.rounds import Rounds, Sample, noise, ratio, spread, start, values_of
from peers.workloads import Request, chat_mix, requests
from results import Figure, write_result

CONTEXT_TOKENS = 8192
CONTEXT_SEQUENCES = 8
# The target for memory: so much over packed weights and KV pool, and a Python with torch.
MEMORY_FACTOR, MEMORY_EXTRA_BYTES = 1.1, 300e6
Group = list[Choice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all questions share."""

    model: Model
    rounds: Rounds
    only: re.Pattern[str]
    writes: bool
    absent: dict[str, str] = field(default_factory=dict[str, str])

    def chosen(self, groups: Sequence[Group]) -> list[Group]:
        """The groups without the engines that nobody asked for, and only if they then add any to those before."""
        kept: list[Group] = []
        seen: set[str] = set()
        for group in groups:
            asked = [choice for choice in group if self.only.search(choice.name)]
            names = {choice.name for choice in asked}
            if names - seen:
                kept.append(asked)
                seen |= names
        return kept

    def write(
        self, name: str, groups: Sequence[Group], samples: Any, summary: dict[str, Any], figures: list[Figure]
    ) -> None:
        summary = summary | {"absent": dict(self.absent)}
        settings = {
            "model": self.model.folder.name,
            "threads": self.model.threads,
            "repetitions": self.rounds.repetitions,
            "nice": self.rounds.nice,
            "engines": {choice.name: choice.record() for group in groups for choice in group},
        }
        if self.writes:
            write_result(f"cpu_{name}", settings=settings, samples=samples, summary=summary, figures=figures)
        else:
            print(json.dumps(summary, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS) + "; or all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="checkpoint of Llama's shape; written if it is not there")
    parser.add_argument("--only", default="", help="regular expression of the engines to measure")
    parser.add_argument("--quiet-wait", type=float, default=120, help="seconds to wait for others to be idle")
    parser.add_argument("--nice", type=int, default=0, help="weight of this session; -15 keeps others out")
    parser.add_argument("--dry", action="store_true", help="one round, nothing written")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engines are ended too
    asked = [name for name in arguments.questions if name != "all"] or list(QUESTIONS)
    if unknown := set(asked) - set(QUESTIONS):
        parser.error(f"unknown question {', '.join(unknown)}; known are {', '.join(QUESTIONS)}")
    peers_root = Path(os.environ.get("PEERS_ROOT", Path.home() / "peers"))
    folder = arguments.model or peers_root / "models/llama-1.1b"
    model = Model(folder=ensure_llama(folder), peers_root=peers_root, threads=arguments.threads)
    with Probe(arguments.threads) as probe:
        rounds = Rounds(
            probe=probe,
            repetitions=1 if arguments.dry else arguments.repetitions,
            nice=arguments.nice,
            quiet_wait_s=0 if arguments.dry else arguments.quiet_wait,
            tries=1 if arguments.dry else 3,
        )
        bench = Bench(
            model=model,
            rounds=rounds,
            only=re.compile(arguments.only),
            writes=not arguments.dry,
        )
        for name in asked:
            bench.absent.clear()
            QUESTIONS[name](bench)


# -- in process ----------------------------------------------------------------------------------------


def measure_decode(bench: Bench) -> None:
    model = bench.model

    def measure(engine: Driver, repetition: int) -> Sample:
        first = engine.ask(run_command(requests(32, 128, seed=repetition)) | {"until_tokens": 1})
        rest = engine.ask({})
        (arrivals_s,) = rest["arrivals_s"]
        sample: Sample = {
            "first_token_s": first["arrivals_s"][0][0],
            "tokens_per_s": len(arrivals_s) / arrivals_s[-1],
        }
        if rest["kernel_s"] is not None:
            sample["outside_kernels_fraction"] = 1 - rest["kernel_s"] / arrivals_s[-1]
        return sample

    def finish(choice: Choice, sample: Sample) -> None:
        context_tokens = 32 + 128 / 2  # in the middle of the answer
        read_bytes = choice.weight_bytes + context_tokens * model.kv_token_bytes(choice.kv_format)
        sample["gb_per_s"] = read_bytes * sample["tokens_per_s"] / 1e9
        sample["of_memory_read"] = sample["gb_per_s"] / sample["limit"]

    keys = ("tokens_per_s", "of_memory_read", "gb_per_s", "limit", "outside_kernels_fraction")
    _compare(bench, "decode", engine_groups(model), measure, finish, keys, lambda _: "read")


def measure_prefill(bench: Bench) -> None:
    tokens, config = 1024, bench.model.config

    def measure(engine: Driver, repetition: int) -> Sample:
        result = engine.ask(run_command(requests(tokens, 1, seed=repetition)))
        return {"tokens_per_s": tokens / result["arrivals_s"][0][0]}

    def finish(choice: Choice, sample: Sample) -> None:
        # Matrices only, and the head for the last token only; attention comes on top and is not counted.
        products = block_weights(config) + head_weights(config) / tokens
        sample["gop_per_s"] = 2 * products * sample["tokens_per_s"] / 1e9
        sample["of_peak"] = sample["gop_per_s"] / sample["limit"]

    keys = ("tokens_per_s", "of_peak", "gop_per_s", "limit")
    _compare(bench, "prefill", engine_groups(bench.model), measure, finish, keys, _multiplier)


def _multiplier(choice: Choice) -> Limit:
    """The instruction whose peak bounds an engine's prefill; 4-bit weights are multiplied as int8."""
    return "bf16" if choice.bits == 16 else "int8"


def engine_groups(model: Model) -> list[Group]:
    """Two groups, because vLLM's processes do not fit into memory beside all others."""
    return [
        [
            *(engines.plait(model, format) for format in ("bf16", "int8", "int4", "int4-g128")),
            *(engines.llama(model, format) for format in ("bf16", "Q8_0", "Q4_0")),
        ],
        [
            *(engines.plait(model, format) for format in ("bf16", "int8")),
            *(engines.vllm(model, format) for format in ("bf16", "int8")),
        ],
    ]


def run_command(asked: Sequence[Request]) -> dict[str, Any]:
    return {
        "prompts": [request.prompt for request in asked],
        "output_tokens": [request.output_tokens for request in asked],
    }


def _warm_up(engine: Driver) -> None:
    """Suspending cooled the caches and let the kernel take pages."""
    engine.ask(run_command(requests(16, 8, seed=10**6)))


def _compare(
    bench: Bench,
    name: str,
    groups: Sequence[Group],
    measure: Callable[[Driver, int], Sample],
    finish: Callable[[Choice, Sample], None],
    keys: Sequence[str],
    limit: Callable[[Choice], Limit],
) -> None:
    """Measure groups of in-process engines and write what they reached."""
    groups = bench.chosen(groups)
    samples: list[list[Sample]] = []
    for group in groups:
        with ExitStack() as stack:
            by_name = {choice.name: choice for choice in group}
            running = start(stack, group, lambda choice: choice.driver(bench.model.threads), bench.absent)
            limits = {name: limit(choice) for name, choice in by_name.items()}
            found = bench.rounds.measure(running, measure, warm_up=_warm_up, limits=limits)
        for sample in found:
            finish(by_name[sample["engine"]], sample)
        samples.append(found)
    _write_comparison(bench, name, groups, samples, keys)


def _write_comparison(
    bench: Bench, name: str, groups: Sequence[Group], samples: Sequence[list[Sample]], keys: Sequence[str]
) -> None:
    summary: dict[str, Any] = {}
    figures: list[Figure] = []
    for group, found in zip(groups, samples, strict=True):
        if not found:  # nothing of this group is installed
            continue
        title = " and ".join(dict.fromkeys(choice.name.split()[0] for choice in group))
        names = [choice.name for choice in group if choice.name not in bench.absent]
        ours = [name for name in names if name.startswith("plait")]
        summary[title] = _summary(found, names, keys, ours, [name for name in names if name not in ours])
        figures.append(_figure(title, found, names))
    bench.write(name, groups, samples, summary, figures)


def _summary(
    samples: Sequence[Sample],
    names: Sequence[str],
    keys: Sequence[str],
    over: Sequence[str],
    under: Sequence[str],
) -> dict[str, Any]:
    return {
        "engines": {
            name: {key: spread(values) for key in keys if (values := values_of(samples, name, key))}
            for name in names
        },
        "tokens a second, over those of": {
            mine: {theirs: ratio(samples, mine, theirs, "tokens_per_s") for theirs in under if theirs != mine}
            for mine in over
        },
        "noise": noise(samples),
    }


def _figure(title: str, samples: Sequence[Sample], names: Sequence[str]) -> Figure:
    figure = Figure(title=title, x_label="round", y_label="tokens/s")
    for name in names:
        values = values_of(samples, name, "tokens_per_s")
        figure.add_line(name, range(len(values)), values)
    return figure


# -- through HTTP --------------------------------------------------------------------------------------


def measure_c16(bench: Bench) -> None:
    model = bench.model
    groups = [
        [
            *(engines.plait_server(model, format, sequences=64) for format in ("bf16", "int8", "int4")),
            *(
                engines.llama_server(model, format, sequences=16, context_tokens=256)
                for format in ("bf16", "Q8_0", "Q4_0")
            ),
        ],
        [
            *(engines.plait_server(model, format, sequences=64) for format in ("bf16", "int8")),
            *(engines.vllm_server(model, format, sequences=64) for format in ("bf16", "int8")),
        ],
    ]
    _serve(bench, "c16", groups, lambda repetition: requests(128, 64, count=16, seed=repetition))


def measure_mix(bench: Bench) -> None:
    model = bench.model
    groups = [
        [
            *(engines.plait_server(model, format, sequences=64) for format in ("bf16", "int8")),
            engines.llama_server(model, "bf16", sequences=64, context_tokens=768),
            engines.llama_server(model, "Q4_0", sequences=64, context_tokens=768),
        ],
        [
            engines.plait_server(model, "int8", sequences=64),
            engines.vllm_server(model, "bf16", sequences=64),
        ],
    ]
    _serve(bench, "mix", groups, lambda repetition: chat_mix(seed=repetition))


def _serve(bench: Bench, name: str, groups: Sequence[Group], ask: Callable[[int], list[Request]]) -> None:
    """Measure groups of servers and write what they reached."""
    # A round of servers takes minutes: fewer of them.
    rounds = replace(bench.rounds, repetitions=min(bench.rounds.repetitions, 3 if name == "c16" else 2))
    groups = bench.chosen(groups)
    samples: list[list[Sample]] = []
    for group in groups:
        with ExitStack() as stack:
            running = start(stack, group, lambda choice: choice.server(bench.model.threads), bench.absent)
            samples.append(
                rounds.measure(
                    running,
                    lambda server, repetition: send_all(server.origin, ask(repetition)),
                    warm_up=lambda server: send_all(server.origin, requests(16, 8, count=2, seed=1)),
                    limits=dict.fromkeys(running, "read"),
                )
            )
    keys = (
        "tokens_per_s",
        "first_token_median_s",
        "first_token_worst_s",
        "gap_median_s",
        "gap_p99_s",
        "limit",
    )
    _write_comparison(bench, name, groups, samples, keys)


# -- long contexts -------------------------------------------------------------------------------------


def measure_context(bench: Bench) -> None:
    """Fill the caches once, then decode 16 tokens in each round; the context grows a little meanwhile."""
    room_tokens, step_tokens = 1024, 16
    context_tokens = CONTEXT_TOKENS + room_tokens
    model = replace(bench.model, folder=longer_context(bench.model.folder, 2 * CONTEXT_TOKENS))

    def pool_bytes(kv: str) -> int:
        return int(1.05 * CONTEXT_SEQUENCES * context_tokens * model.kv_token_bytes(kv))

    every = [
        *(engines.plait(model, "int8", kv=kv, kv_cache_bytes=pool_bytes(kv)) for kv in ("bf16", "int8")),
        # With q8_0 for the KV it takes a quarter of an hour to read one such prompt, with f16 six minutes.
        engines.llama(model, "Q8_0", kv="f16", sequences=1, context_tokens=context_tokens),
    ]
    (group,) = bench.chosen([every]) or [[]]
    by_name = {choice.name: choice for choice in group}
    samples: dict[int, list[Sample]] = {}
    filled_s: dict[str, float] = {}
    (prompt,) = requests(CONTEXT_TOKENS, room_tokens)

    def measure(engine: Driver, _: int) -> Sample:
        result = engine.ask({"until_tokens": step_tokens})
        seconds = max(times[-1] for times in result["arrivals_s"])
        return {"step_s": seconds / step_tokens, "sequences": len(result["arrivals_s"])}

    with ExitStack() as stack:
        running = start(stack, group, lambda choice: choice.driver(model.threads), bench.absent)
        filled = 0
        for sequences in (1, CONTEXT_SEQUENCES):
            asked = {
                name: engine for name, engine in running.items() if sequences == 1 or name.startswith("plait")
            }
            for name, engine in asked.items():
                engine.resume()
                more = run_command([prompt] * (sequences - filled))
                result = engine.ask(more | {"until_tokens": 1})
                filled_s.setdefault(name, result["arrivals_s"][0][0])
                engine.suspend()
            filled = sequences
            samples[sequences] = bench.rounds.measure(
                asked,
                measure,
                warm_up=lambda engine: engine.ask({"until_tokens": 2}),
                limits=dict.fromkeys(asked, "read"),
            )
            for sample in samples[sequences]:
                choice = by_name[sample["engine"]]
                kv_bytes = sequences * CONTEXT_TOKENS * model.kv_token_bytes(choice.kv_format)
                sample["tokens_per_s"] = sequences / sample["step_s"]
                sample["of_memory_read"] = (
                    (choice.weight_bytes + kv_bytes) / sample["step_s"] / 1e9 / sample["limit"]
                )
    names = list(running)
    ours = [name for name in names if name == "plait int8, int8 KV"]
    keys = ("tokens_per_s", "step_s", "of_memory_read", "limit")
    summary: dict[str, Any] = {}
    figures: list[Figure] = []
    for sequences, found in samples.items():
        measured = [name for name in names if values_of(found, name, "tokens_per_s")]
        summary[f"{sequences} sequences"] = _summary(found, measured, keys, ours, measured)
        figures.append(_figure(f"{sequences} sequences of 8,192 tokens", found, measured))
    summary["prefill of 8,192 tokens, s"] = filled_s
    bench.write("context", [group], {str(key): found for key, found in samples.items()}, summary, figures)


# -- starting, and what is held ------------------------------------------------------------------------


def measure_startup(bench: Bench) -> None:
    """plait packs weights when a format first starts and keeps them; later starts read them."""
    group = _one_of_each(bench)
    samples: list[Sample] = []
    _forget_packed(bench)
    for repetition in range(1 + bench.rounds.repetitions):
        for choice in group:
            if repetition > 1 and choice.name.startswith("vLLM"):  # it takes minutes
                continue
            wait_until_quiet(bench.rounds.quiet_wait_s)
            with preferred_session(bench.rounds.nice), choice.driver(bench.model.threads) as engine:
                engine.ask(run_command(requests(32, 1)))
                samples.append(
                    {
                        "engine": choice.name,
                        "repetition": repetition,
                        "first_token_s": time.perf_counter() - engine.started_s,
                        "load_s": engine.facts["load_s"],
                    }
                )
                print(samples[-1], file=sys.stderr, flush=True)
    later = [sample for sample in samples if sample["repetition"] > 0]
    summary = {
        choice.name: {
            "process start to first token, s": spread(values_of(later, choice.name, "first_token_s")),
            "of which loading the engine, s": spread(values_of(later, choice.name, "load_s")),
            "the first time, s": values_of(samples, choice.name, "first_token_s")[0],
        }
        for choice in group
    }
    figure = Figure(title="process start to first token", x_label="start", y_label="s")
    for choice in group:
        values = values_of(samples, choice.name, "first_token_s")
        figure.add_line(choice.name, range(len(values)), values)
    bench.write("startup", [group], samples, summary, [figure])


def measure_memory(bench: Bench) -> None:
    """The most held while starting (the first time, and with packed weights on disk) and computing."""
    group = _one_of_each(bench)
    samples: list[Sample] = []
    _forget_packed(bench)
    for begin in ("first start", "later start"):
        for choice in group:
            engine = choice.driver(bench.model.threads)
            with engine, HighestPss(engine) as highest:
                for request in (*requests(1024, 1), *requests(32, 32)):
                    engine.ask(run_command([request]))
                held = engine.memory_bytes()
                sample: Sample = {
                    "engine": choice.name,
                    "start": begin,
                    "highest_rss_bytes": held["highest_rss"],
                    "highest_pss_after_start_bytes": highest.pss_bytes,
                }
                if packed := engine.facts.get("packed_bytes"):
                    sample["packed_bytes"] = packed
                    sample["kv_pool_bytes"] = engine.facts["kv_pool_bytes"]
                    allowed = MEMORY_FACTOR * (packed + engine.facts["kv_pool_bytes"]) + MEMORY_EXTRA_BYTES
                    sample["of_allowed"] = held["highest_rss"] / allowed
                samples.append(sample)
                print(sample, file=sys.stderr, flush=True)
    summary = {
        begin: {
            sample["engine"]: {key: value for key, value in sample.items() if key not in ("engine", "start")}
            for sample in samples
            if sample["start"] == begin
        }
        for begin in ("first start", "later start")
    }
    bench.write("memory", [group], samples, summary, [])


def _one_of_each(bench: Bench) -> Group:
    every = {choice.name: choice for group in bench.chosen(engine_groups(bench.model)) for choice in group}
    bench.absent.update(
        (choice.name, f"not installed: {choice.missing}") for choice in every.values() if choice.missing
    )
    return [choice for choice in every.values() if not choice.missing]


def _forget_packed(bench: Bench) -> None:
    command = [sys.executable, "-m", "plait", "cache", str(bench.model.folder), "--remove"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


QUESTIONS: dict[str, Callable[[Bench], None]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "c16": measure_c16,
    "mix": measure_mix,
    "context": measure_context,
    "startup": measure_startup,
    "memory": measure_memory,
}


if __name__ == "__main__":
    main()
