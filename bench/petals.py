"""plait beside PETALS: one model over one, two and three servers on loopback, one and eight clients, a server killed.

    python bench/petals.py [tokens kill]     both: about 50 minutes on two quiet cores, 10 GB of memory
    python bench/petals.py --quick           small counts, nothing written

tokens    a greedy answer to one client, and to eight at once, over 1, 2 and 3 servers that divide the blocks: tokens a
          second of an answer once it has begun, and of all answers from the question to the last token
kill      two servers have the second half of the blocks; that of them which answers is ended by SIGKILL in the middle:
          the longest pause of the stream after it, beside the median time between two tokens

Both run the same bfloat16 checkpoint with the same threads, in turns, each server a process of its own (PETALS':
several). PETALS runs in the environment of --petals-python: its main branch of August 2024 on hivemind 1.1.12. Its
client as released cannot go on after a loss (peers/petals_client.py says why): recovery is measured with that
repaired, and once without. llama.cpp over two RPC servers (peers/llama_rpc.py) answers one client. What is not
installed is left out, and the result says so.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from peers.checkpoints import ensure_llama
from peers.llama_rpc import LlamaRpc, missing_files
from peers.machine import Probe, preferred_session
from peers.petals_swarm import PetalsSwarm
from peers.plait_swarm import PlaitSwarm
from peers.process import EngineDied
from peers.rounds import Rounds, Sample, noise, ratio, spread, values_of
from peers.workloads import requests
from results import Figure, write_result
from swarm.stream import Answer

CLIENTS = 8
RPC_SERVERS = 2
QUESTIONS = ("tokens", "kill")


class Swarm(Protocol):
    """What is measured: entered when it is started, left when all of it is to end."""

    name: str
    serves_many: bool
    """Whether several clients are measured."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def suspend(self) -> None: ...
    def resume(self) -> None: ...

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """Ask for so many tokens after every prompt, all at once."""
        ...


class MortalSwarm(Swarm, Protocol):
    """One with servers to spare."""

    def answer_under_kill(self, prompt: Sequence[int], tokens: int, at_token: int) -> tuple[Answer, float]:
        """An answer of which the last server is killed when it has `at_token` tokens, and when that was."""
        ...

    def put_back(self) -> None:
        """Start again who was killed."""
        ...


AnySwarm = TypeVar("AnySwarm", bound=Swarm)


# -- tokens a second -----------------------------------------------------------------------------------


def measure_tokens(bench: "Bench", servers: int) -> list[Sample]:
    """Samples of one number of servers, every system in turns."""
    spans = divided(bench.blocks, servers)

    def measure(swarm: Swarm, repetition: int) -> Sample:
        one = _asked(swarm, 1, bench.tokens, seed=repetition)
        many = _asked(swarm, CLIENTS, bench.tokens, seed=repetition) if swarm.serves_many else {}
        return {
            "servers": servers,
            **{f"one_{key}": value for key, value in one.items()},
            **{f"many_{key}": value for key, value in many.items()},
        }

    with ExitStack() as stack:
        running = bench.start(stack, [*bench.swarms(spans, replays=True), *bench.others(servers)])
        return bench.rounds.measure(running, measure, warm_up=_warm_up, limits=dict.fromkeys(running, "read"))


def _asked(swarm: Swarm, clients: int, tokens: int, seed: int) -> Sample:
    prompts = [request.prompt for request in requests(32, 1, count=clients, seed=seed)]
    began_s = time.time()
    answers = swarm.answers(prompts, tokens)
    for answer in answers:
        if answer.error or len(answer.unix_s) != tokens:
            raise RuntimeError(f"{swarm.name} gave {len(answer.unix_s)} of {tokens} tokens: {answer.error}")
    first_s = [answer.unix_s[0] for answer in answers]
    last_s = max(answer.unix_s[-1] for answer in answers)
    return {
        # Of an answer that has begun: prompts and connections cost no more.
        "tokens_per_s": statistics.median(
            (tokens - 1) / (answer.unix_s[-1] - answer.unix_s[0]) for answer in answers
        ),
        "all_tokens_per_s": clients * tokens / (last_s - began_s),
        "first_token_worst_s": max(first_s) - began_s,
        "token_ids": answers[0].token_ids,
    }


def _warm_up(swarm: Swarm) -> None:
    swarm.answers([requests(16, 1, seed=10**6)[0].prompt], 4)


def divided(blocks: int, servers: int) -> list[str]:
    """Spans of nearly equal length, the longer ones first."""
    cuts = [-(-blocks * number // servers) for number in range(servers + 1)]
    return [f"{first}:{end}" for first, end in pairwise(cuts)]


# -- a server killed -----------------------------------------------------------------------------------


def measure_kill(bench: "Bench", *, replays: bool, names: Sequence[str]) -> list[Sample]:
    """Samples of answers of which the last server dies; `replays`: with PETALS' client repaired."""
    first, second = divided(bench.blocks, 2)
    prompt = requests(32, 1, seed=99)[0].prompt
    expected: dict[str, list[int]] = {}

    def undisturbed(swarm: Swarm) -> None:
        if swarm.name in expected:
            _warm_up(swarm)
        else:
            (answer,) = swarm.answers([prompt], bench.tokens)
            expected[swarm.name] = answer.token_ids

    def measure(swarm: MortalSwarm, repetition: int) -> Sample:
        answer, killed_s = swarm.answer_under_kill(prompt, bench.tokens, bench.tokens // 2)
        before = [later - one for one, later in pairwise(answer.unix_s) if later < killed_s]
        went_on = len(answer.unix_s) == bench.tokens
        if replays:  # the released client bans for minutes who could have gone on
            swarm.put_back()
        return {
            "gap_s": statistics.median(before),
            "pause_s": answer.pause_s(killed_s) if went_on else None,
            "same_tokens": answer.token_ids == expected[swarm.name],
            "tokens": len(answer.unix_s),
            "error": answer.error,
        }

    with ExitStack() as stack:
        swarms = bench.swarms([first, second, second], replays=replays)
        running = bench.start(stack, [swarm for swarm in swarms if swarm.name in names])
        return bench.rounds.measure(
            running, measure, warm_up=undisturbed, limits=dict.fromkeys(running, "read")
        )


# -- the whole -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all measurements share."""

    model: Path
    blocks: int
    threads: int
    tokens: int
    rounds: Rounds
    petals_python: Path
    peers_root: Path
    folder: Path
    absent: dict[str, str]
    versions: dict[str, dict[str, str]]

    def swarms(self, spans: Sequence[str], *, replays: bool) -> list[MortalSwarm]:
        """plait, and PETALS if it is installed; not started yet."""
        found: list[MortalSwarm] = [PlaitSwarm(self.model, spans, self.threads)]
        python = self.petals_python
        if python.exists():
            found.append(PetalsSwarm(python, self.model, spans, self.threads, self.folder, replays=replays))
        else:
            self.absent["PETALS"] = "not installed: nothing at --petals-python"
        return found

    def others(self, servers: int) -> list[Swarm]:
        """llama.cpp over two RPC servers, if it is installed; not started yet."""
        if servers != RPC_SERVERS:
            return []
        gguf = self.peers_root / f"models/gguf/{self.model.name}-bf16.gguf"
        if missing := missing_files(self.peers_root, gguf):
            self.absent[LlamaRpc.name] = f"not installed: {missing}"
            return []
        return [LlamaRpc(self.peers_root, gguf, servers, self.threads)]

    def start(self, stack: ExitStack, systems: Sequence[AnySwarm]) -> dict[str, AnySwarm]:
        """Start one after another; `absent` says which did not, and why."""
        running: dict[str, AnySwarm] = {}
        for system in systems:
            print(f"starting {system.name}", file=sys.stderr, flush=True)
            try:
                with preferred_session(self.rounds.nice):
                    running[system.name] = stack.enter_context(system)
            except EngineDied as died:
                self.absent[system.name] = f"did not start: {died}"
            else:
                self.versions[system.name] = getattr(system, "versions", {})
        return running


def summary_of(
    bench: Bench, tokens: Mapping[int, list[Sample]], kills: list[Sample], released: list[Sample]
) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    keys = (
        "one_tokens_per_s",
        "many_all_tokens_per_s",
        "one_first_token_worst_s",
        "many_tokens_per_s",
        "limit",
    )
    for servers, samples in tokens.items():
        names = names_of(samples)
        summary[f"{servers} servers"] = {
            "systems": {
                name: {key: spread(values) for key in keys if (values := values_of(samples, name, key))}
                for name in names
            },
            "plait over": {name: _over(samples, name) for name in names if name != "plait"},
            "noise": noise(samples),
        }
    if kills:
        summary["kill"] = {name: _recovery(kills, name) for name in names_of(kills)}
        pauses = {name: values_of(kills, name, "pause_s") for name in names_of(kills)}
        if all(pauses.values()) and len(pauses) > 1:
            summary["kill"]["pause of PETALS over plait's"] = statistics.median(
                pauses["PETALS"]
            ) / statistics.median(pauses["plait"])
        summary["kill"]["noise"] = noise(kills)
    if released:
        summary["kill"]["PETALS as released"] = _recovery(released, "PETALS") | {
            "error": released[0]["error"]
        }
    return summary | {"absent": bench.absent, "versions": bench.versions}


def _over(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"one client": ratio(samples, "plait", name, "one_tokens_per_s")}
    if values_of(samples, name, "many_all_tokens_per_s"):
        found[f"{CLIENTS} clients"] = ratio(samples, "plait", name, "many_all_tokens_per_s")
    if same := equal_starts(samples, "plait", name):
        found["equal tokens at the start"] = spread(same)
    return found


def _recovery(samples: Sequence[Sample], name: str) -> dict[str, Any]:
    of_it = [sample for sample in samples if sample["engine"] == name]
    pauses = values_of(samples, name, "pause_s")
    return {
        "kills": len(of_it),
        "went on": len(pauses),
        "same tokens": sum(sample["same_tokens"] for sample in of_it),
        "gap_s": spread(values_of(samples, name, "gap_s")),
        "pause_s": spread(pauses) if pauses else None,
    }


def names_of(samples: Sequence[Sample]) -> list[str]:
    """The systems that were measured, plait first."""
    return sorted({sample["engine"] for sample in samples}, key=lambda name: (name != "plait", name))


def equal_starts(samples: Sequence[Sample], one: str, other: str) -> list[int]:
    """How many tokens of one client's answers are equal before the first that is not; of answers that tell them all."""
    both = zip(*(values_of(samples, name, "one_token_ids") for name in (one, other)), strict=True)
    return [
        next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
        for mine, theirs in both
        if len(mine) == len(theirs)
    ]


def figures_of(tokens: Mapping[int, list[Sample]], kills: list[Sample]) -> list[Figure]:
    figures: list[Figure] = []
    for title, key in (("one client", "one_tokens_per_s"), (f"{CLIENTS} clients", "many_all_tokens_per_s")):
        figure = Figure(title, "servers", "tokens/s", log_y=True)
        for name in names_of([sample for samples in tokens.values() for sample in samples]):
            medians = {
                servers: statistics.median(values)
                for servers, samples in tokens.items()
                if (values := values_of(samples, name, key))
            }
            if medians:
                figure.add_line(name, list(medians), list(medians.values()))
        figures.append(figure)
    pauses = Figure("a server killed", "repetition", "longest pause of the stream, seconds", log_y=True)
    for name in names_of(kills):
        values = values_of(kills, name, "pause_s")
        pauses.add_line(name, range(len(values)), values)
    return [figure for figure in (*figures, pauses) if figure.lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="tokens, kill; without any: both")
    peers_root = Path(os.environ.get("PEERS_ROOT", Path.home() / "peers"))
    parser.add_argument("--petals-python", type=Path, default=peers_root / "v-petals/bin/python")
    parser.add_argument("--model", type=Path, default=peers_root / "models/llama-1.1b")
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2, help="of every server, and of PETALS' client")
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--quiet-wait", type=float, default=60, help="seconds to wait for others to be idle")
    parser.add_argument("--nice", type=int, default=0, help="weight of this session; -15 keeps others out")
    parser.add_argument("--quick", action="store_true", help="one round of 16 tokens, nothing written")
    parser.add_argument("--name", default="petals", help="name of the result")
    arguments = parser.parse_args()
    asked = arguments.questions or list(QUESTIONS)
    if unknown := set(asked) - set(QUESTIONS):
        parser.error(f"unknown question {', '.join(unknown)}; known are {', '.join(QUESTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    quick = arguments.quick
    with Probe(arguments.threads) as probe, tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(
            probe=probe,
            repetitions=1 if quick else arguments.repetitions,
            nice=arguments.nice,
            quiet_wait_s=0 if quick else arguments.quiet_wait,
            tries=1 if quick else 2,
        )
        model = ensure_llama(arguments.model)
        bench = Bench(
            model=model,
            blocks=json.loads((model / "config.json").read_text())["num_hidden_layers"],
            threads=arguments.threads,
            tokens=16 if quick else arguments.tokens,
            rounds=rounds,
            petals_python=arguments.petals_python,
            peers_root=peers_root,
            folder=Path(folder),
            absent={},
            versions={},
        )
        run(bench, asked, arguments, writes=not quick)


def run(bench: Bench, asked: Sequence[str], arguments: argparse.Namespace, *, writes: bool) -> None:
    tokens: dict[int, list[Sample]] = {}
    kills: list[Sample] = []
    released: list[Sample] = []
    for servers in arguments.servers if "tokens" in asked else ():
        try:
            tokens[servers] = measure_tokens(bench, servers)
        except EngineDied as died:  # what was measured before is kept
            bench.absent[f"{servers} servers"] = str(died)
    if "kill" in asked:
        again = replace(bench, rounds=replace(bench.rounds, repetitions=arguments.kills if writes else 1))
        kills = measure_kill(again, replays=True, names=("plait", "PETALS"))
        once = replace(bench, rounds=replace(bench.rounds, repetitions=1, tries=1))
        released = measure_kill(once, replays=False, names=("PETALS",))
    summary = summary_of(bench, tokens, kills, released)
    if not writes:
        print(json.dumps(summary, indent=1))
        return
    write_result(
        arguments.name,
        settings={
            "model": bench.model.name,
            "weights": "bfloat16, both",
            "hidden states on the wire": {"plait": "float32", "PETALS": "bfloat16, uncompressed"},
            "threads of a server": bench.threads,
            "prompt_tokens": 32,
            "tokens": bench.tokens,
            "clients": CLIENTS,
            "repetitions": arguments.repetitions,
            "kills": arguments.kills,
            "nice": arguments.nice,
        },
        samples={"tokens": tokens, "kill": kills, "as released": released},
        summary=summary,
        figures=figures_of(tokens, kills),
    )


if __name__ == "__main__":
    main()
