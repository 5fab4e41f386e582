"""KV blocks lent between real processes: exact tokens, kills, bytes, throughput, slow links, moving, slow creditors.

Machines are `plait join` processes with pools of 32 to 512 KV blocks (16 tokens each), over TLS on loopback, behind
one gateway; the model is a Llama with random weights (4 blocks, 256 wide, 8 heads on 2), in float32.

    exact       requests several times longer than the pool they run in, blocks moving at every offset of the answer
    kill        creditor, debtor, manager killed and frozen at random tokens: tokens, notice, pause, what is left behind
    bytes       queries and parts on the wire for a token, beside the formula and beside fetching the blocks
    trace       three families of lengths, lending off, pulled and planned, and one machine with all the memory
    far         the same, and one long request, over links of 125 MB/s and 1 ms one way
    move        what moving 0 to 64 tokens a step costs the answers that go on
    unequal     a creditor with a large pool whose attention takes 1, 4 and 16 times as long

    python bench/distkv_live.py [--part exact ...] [--quick]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lending import exactness, kills, moves, wire_bytes
from lending.asking import OneMachine, Wish, ask, ask_all
from lending.model import Shape, make_model, settings_of
from lending.small_pools import BLOCK_TOKENS, Distance, SmallPools
from lending.traces import FAMILIES, served, wishes_of
from results import Figure, write_result

PARTS = ("exact", "kill", "bytes", "trace", "far", "move", "unequal")
POLICIES = ("off", "pull", "plan", "one")
"""Of lending; `one` is a single machine with the memory of all."""
POOL_BLOCKS = 64
FAR = Distance(one_way_s=0.001, bytes_per_s=125e6)
RATES = (0, 4, 8, 16, 32, 64)
SLOWER = (1.0, 4.0, 16.0)


def flags_of(policy: str, **settings: Any) -> tuple[str, ...]:
    """Flags of `plait join`: whole pools may be lent, but for what is kept free."""
    if policy in ("off", "one"):
        return ()
    settings = {"borrow_tokens": 8192, "lend_fraction": 1.0} | settings
    flags = [f"lending.{name}={value}" for name, value in settings.items()]
    return ("--lending", policy, *(word for flag in flags for word in ("--set", flag)))


class LiveBench:
    """Runs the parts one after the other; each starts the machines that it needs."""

    def __init__(self, options: argparse.Namespace, model: Path, one: OneMachine) -> None:
        self._options, self._model, self._one = options, model, one
        self.shape = Shape()

    def pools(self, pools: Mapping[str, int], flags: Sequence[str], **more: Any) -> SmallPools:
        return SmallPools(self._model, self.shape, pools, flags, **more)

    # -- parts: each returns raw samples, and what they sum up to --------------------------------------------

    def exact(self) -> tuple[Any, dict[str, Any]]:
        with self.pools(exactness.POOLS, flags_of("pull")) as swarm:
            runs = exactness.exactness(swarm, self._one, self._options.offsets, self._options.long)
        return [asdict(run) for run in runs], {
            "answers": len(runs),
            "same_tokens": sum(run.same_tokens for run in runs),
            "longest_in_pools": round(
                max((run.prompt_tokens + run.answer_tokens) / run.pool_tokens for run in runs), 1
            ),
            "moved_blocks": sum({run.prompt_tokens // 16: run.moved_blocks for run in runs}.values()),
            "margins_where_other": [run.margin for run in runs if run.margin is not None],
        }

    def kill(self) -> tuple[Any, dict[str, Any]]:
        with self.pools(kills.POOLS, flags_of("pull")) as swarm:
            trials = kills.KillTrials(swarm, self._one, self._options.seed)
            trials.run(self._options.trials)
        summary: dict[str, Any] = {}
        for kind in dict.fromkeys(f"{run.victim}, {run.signal}" for run in trials.strikes):
            runs = [run for run in trials.strikes if f"{run.victim}, {run.signal}" == kind]
            summary[kind] = {
                "trials": len(runs),
                "same_tokens": sum(run.same_tokens for run in runs),
                "bystanders_same": sum(run.bystanders_same for run in runs),
                "leaks": sum(run.free_after_s is None or run.free_again_s is None for run in runs),
                "noticed_s": spread([run.noticed_s for run in runs if run.noticed_s is not None]),
                "pause_s": spread([run.pause_s for run in runs]),
                "free_after_s": spread([run.free_after_s for run in runs if run.free_after_s is not None]),
            }
        return [asdict(run) for run in trials.strikes], summary

    def bytes(self) -> tuple[Any, dict[str, Any]]:
        runs: list[wire_bytes.TokenBytes] = []
        for creditors in (1, 2):
            names = [f"creditor{place}" for place in range(creditors)]
            pools = {"debtor": 32, **dict.fromkeys(names, 192 // creditors)}
            with self.pools(pools, flags_of("pull")) as swarm:
                for number, prompt_tokens in enumerate(self._options.contexts):
                    run = wire_bytes.bytes_a_token(swarm, self.shape, prompt_tokens, 7000 + number)
                    runs.append(run)
                    print(run, flush=True)
        return [asdict(run) for run in runs], {
            f"{run.context_tokens} tokens, {run.holders} holders": {
                "tensors": [round(run.query_bytes), round(run.part_bytes)],
                "formula": [run.formula_out_bytes, run.formula_back_bytes],
                "times_the_formula": round(
                    (run.query_bytes + run.part_bytes) / (run.formula_out_bytes + run.formula_back_bytes), 3
                ),
                "ring_bytes": round(run.ring_bytes),
            }
            for run in runs
            if run.holders
        }

    def trace(self) -> tuple[Any, dict[str, Any]]:
        samples = [
            row
            for machines in self._options.machines
            for policy in self._options.policy
            for row in self._traces(machines, policy)
        ]
        return samples, gains(samples)

    def far(self) -> tuple[Any, dict[str, Any]]:
        samples = [
            row
            for policy in self._options.policy
            for row in self._traces(self._options.machines[0], policy, distance=FAR)
        ]
        return samples, gains(samples)

    def _traces(self, machines: int, policy: str, distance: Distance | None = None) -> list[dict[str, Any]]:
        pools = {f"m{place}": POOL_BLOCKS for place in range(machines)}
        if policy == "one":
            pools = {"m0": POOL_BLOCKS * machines}
        rows: list[dict[str, Any]] = []
        with self.pools(pools, flags_of(policy), distance=distance) as swarm:
            for family in FAMILIES:
                wishes = wishes_of(family, self._options.requests, POOL_BLOCKS * BLOCK_TOKENS)
                asked = ask_all(swarm.origin, wishes, clients=4 * machines)
                wrong = [
                    each
                    for each in asked
                    if each.complete and list(each.token_ids) != self._one.tokens(each.wish)
                ]
                rows.append(
                    {
                        "machines": machines,
                        "policy": policy,
                        "family": family,
                        **served(asked),
                        "wrong": len(wrong),
                        "margins_where_other": [self._margin(each) for each in wrong],
                        "errors": sorted({each.error[:200] for each in asked if each.error}),
                        "all_free_after_s": swarm.all_free_s(30),
                    }
                )
                print(rows[-1], flush=True)
        return rows

    def _margin(self, asked: Any) -> float | None:
        """How far apart the two likeliest tokens were where a greedy answer first differs; None if it was drawn."""
        place = exactness.first_difference(list(asked.token_ids), self._one.tokens(asked.wish))
        return None if place is None or asked.wish.seed is not None else self._one.margin(asked.wish, place)

    def move(self) -> tuple[Any, dict[str, Any]]:
        samples: list[moves.Moving] = []
        for rate in self._options.rates:
            flags = flags_of("pull", moved_tokens_per_step=rate)
            with self.pools(moves.POOLS, flags) as swarm:
                for turn in range(self._options.pairs):
                    samples.append(moves.one_pair(swarm, rate, turn))
                    print(samples[-1], flush=True)
        return [asdict(each) for each in samples], {
            str(rate): {
                "slower_while_moving": slowdown([asdict(each) for each in samples], rate),
                "second_waited_s": spread(
                    [each.second_waited_s for each in samples if each.moved_tokens_per_step == rate]
                ),
            }
            for rate in self._options.rates
        }

    def unequal(self) -> tuple[Any, dict[str, Any]]:
        samples: list[dict[str, Any]] = []
        wish = Wish(number=8000, prompt_tokens=3600, answer_tokens=self._options.answer)
        small = {"debtor": 32, "creditor": 512}
        cases: list[tuple[str, dict[str, int], dict[str, float], Distance | None]] = [
            ("a pool that is large enough", {"debtor": 512, "creditor": 16}, {}, None),
            *(
                (f"a creditor that takes {times:g} times as long", small, {"creditor": times}, None)
                for times in SLOWER
            ),
            ("a creditor 1 ms away", small, {}, FAR),
        ]
        for case, pools, times, distance in cases:
            with self.pools(
                pools,
                flags_of("pull"),
                attend_times=times,
                distance=distance,
            ) as swarm:
                began_s = time.time()
                answer = ask(swarm.origin, wish, route={"pinned": ["debtor"]})
                gaps = [later - one for one, later in zip(answer.unix_s, answer.unix_s[1:], strict=False)]
                samples.append(
                    {
                        "case": case,
                        "error": answer.error,
                        "same_tokens": answer.token_ids == self._one.tokens(wish),
                        "first_token_s": answer.unix_s[0] - began_s if answer.unix_s else None,
                        "token_p50_s": statistics.median(gaps) if gaps else None,
                    }
                )
                print(samples[-1], flush=True)
        return samples, {
            each["case"]: {key: value for key, value in each.items() if key != "case"} for each in samples
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def slowdown(moved: Sequence[Mapping[str, Any]], rate: int) -> float | None:
    """How much slower an answer's tokens come while blocks move than when they have; None if none have."""
    fractions = [
        row["moving_s"] / row["after_s"] - 1
        for row in moved
        if row["moved_tokens_per_step"] == rate and row["moving_s"] and row["after_s"]
    ]
    return round(statistics.median(fractions), 3) if fractions else None


def gains(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By machines, family and policy: what was completed, and tokens a second beside lending off."""
    off = {
        (row["machines"], row["family"]): row["prompt_and_answer_tokens_per_s"]
        for row in samples
        if row["policy"] == "off"
    }
    return {
        f"{row['machines']} machines, {row['family']}, {row['policy']}": {
            "completed": f"{row['completed']} of {row['asked']}",
            "wrong": row["wrong"],
            "tokens_per_s": round(row["tokens_per_s"], 1),
            "gain": round(
                row["prompt_and_answer_tokens_per_s"] / max(1e-9, off[row["machines"], row["family"]]), 3
            ),
            "longest_context_tokens": row["longest_context_tokens"],
            "token_p50_s": round(row["token_p50_s"], 4),
        }
        for row in samples
    }


def figures_of(samples: Mapping[str, Any]) -> list[Figure]:
    figures: list[Figure] = []
    for part, title in (
        ("trace", "tokens a second beside lending off"),
        ("far", "the same, links of 125 MB/s and 1 ms"),
    ):
        rows = samples.get(part, [])
        figure = Figure(
            title, "0 " + ", ".join(f"{place} {name}" for place, name in enumerate(FAMILIES)), "times"
        )
        for machines in dict.fromkeys(row["machines"] for row in rows):
            for policy in sorted({row["policy"] for row in rows} - {"off"}, reverse=True):
                summed = gains([row for row in rows if row["machines"] == machines])
                values = [summed[f"{machines} machines, {family}, {policy}"]["gain"] for family in FAMILIES]
                figure.add_line(f"{machines} machines, {policy}", range(len(FAMILIES)), values)
        figures.append(figure)
    moving = Figure("answers while blocks move", "tokens moved a step", "slower than afterwards, fraction")
    moved = samples.get("move", [])
    slower = {rate: slowdown(moved, rate) for rate in sorted({row["moved_tokens_per_step"] for row in moved})}
    known = {rate: fraction for rate, fraction in slower.items() if fraction is not None}
    moving.add_line("median", list(known), list(known.values()))
    strikes = samples.get("kill", [])
    pauses = Figure("pause of the long answer", "trial", "seconds", log_y=True)
    for kind in dict.fromkeys((run["victim"], run["signal"]) for run in strikes):
        runs = [run for run in strikes if (run["victim"], run["signal"]) == kind]
        pauses.add_line(" ".join(kind), [run["trial"] for run in runs], [run["pause_s"] for run in runs])
    return [figure for figure in (*figures, moving, pauses) if any(len(x) for _, x, _ in figure.lines)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--offsets", type=int, default=16, help="offsets of blocks in the answer (even)")
    parser.add_argument("--long", type=int, default=4, help="requests of several pools")
    parser.add_argument("--contexts", type=int, nargs="*", default=[800, 2000], help="prompts, for the bytes")
    parser.add_argument("--trials", type=int, default=12, help="kills and freezes")
    parser.add_argument("--machines", type=int, nargs="*", default=[3], help="machines of the traces")
    parser.add_argument("--policy", nargs="*", choices=POLICIES, default=POLICIES, help="of the traces")
    parser.add_argument("--requests", type=int, default=32, help="of each trace")
    parser.add_argument("--rates", type=int, nargs="*", default=RATES, help="tokens moved a step")
    parser.add_argument("--pairs", type=int, default=2, help="measured at each rate")
    parser.add_argument("--answer", type=int, default=200, help="tokens of answers over unequal creditors")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing")
    options = parser.parse_args()
    if options.quick:
        options.offsets, options.long, options.trials, options.requests, options.pairs = 2, 1, 3, 12, 1
        options.rates, options.answer, options.contexts = [16, 64], 60, [800]
    samples: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plait-lending-"))) / "llama"
        make_model(model, Shape())
        one = stack.enter_context(OneMachine(model, 16384))
        bench = LiveBench(options, model, one)
        for part in options.part:
            began_s = time.monotonic()
            samples[part], summary[part] = getattr(bench, part)()
            summary[part] |= {"took_s": round(time.monotonic() - began_s)}
    if options.quick:
        print(json.dumps(summary, indent=1))
        return
    write_result(
        "distkv_live",
        settings=vars(options) | {"model": settings_of(Shape()), "block_tokens": BLOCK_TOKENS},
        samples=samples,
        summary=summary,
        figures=figures_of(samples),
    )


if __name__ == "__main__":
    main()
