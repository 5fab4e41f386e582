"""Lending KV memory at the scale of Infinite-LLM, simulated: Llama 2 7B, an A100-80GB for each instance.

1. Nine traces of log-uniform lengths as in the paper (0 to 2: up to 15, 30 and 60 thousand tokens on 4 instances; 3 to
   8: up to 0.2 to 2 million on 32), answers 5 to 50 % of a request, at most 1,000 tokens; one in which all requests are
   equally long; and two that mostly decode, in 16 GiB for each instance. All requests come at once.

       multi    no lending (vLLM on many small instances)
       single   all GPUs are one tensor-parallel instance (vLLM on a big one), which pays for its collectives
       pull     version 1: who is short asks whom it may ask          plan   version 2: moves by a throughput model
       oracle   pull by somebody who knows how long every answer will be, with moves as fast as links are

   Throughput is tokens of finished requests, prompts included, over the time until the last one ends.
2. Latency against the rate of arrivals, on trace 2.
3. Where lending hurts: trace 2 over links of 125 MB/s and 1 ms.
4. How many tokens' blocks move beside a decode step, 0 to 64, over three links.
5. The throughput model: predicted against simulated throughput of decode steps, fitted to every other one; plans
   against the best of all plans on four instances.

    python bench/distkv_simulated.py              about six minutes of one core, shared by --processes
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from results import Figure, write_result

from plait.ids import PeerId, RequestId
from plait.kvcache import (
    InstanceLoad,
    LayerTimes,
    LendingRules,
    MovableRequest,
    StepSample,
    after_move,
    fit_layer_times,
    plan_lending,
)
from plait.simulator import ClusterRun, lending_of, longest_context_tokens, parse_scenario, run_of_scenario
from plait.workload import TraceRequest, format_trace

NVLINK = "one_way_s: 1.0e-5, bandwidth_bytes_per_s: 6.0e+11"
LAN = "one_way_s: 1.0e-4, bandwidth_bytes_per_s: 1.25e+9"
SLOW = "one_way_s: 1.0e-3, bandwidth_bytes_per_s: 1.25e+8"
LINKS = {"NVLink, 600 GB/s": NVLINK, "10 Gb/s": LAN, "125 MB/s, 1 ms": SLOW}
LENDING = ("pull", "plan", "oracle")
SHORT_TOKENS = 60_000
"""Requests up to here are those whose speed long ones should not harm."""
SCENARIO = """
model: llama-2-7b
context_tokens: 2100000
seed: {seed}
machines:
  - {{name: gpu, count: {count}, device: a100-80gb, devices: {devices}, host_s: 0.002, block_tokens: {block_tokens},
      limits: {{step_tokens: {step_tokens}}}, {memory}}}
{more}
workload: {{trace: trace.jsonl}}
network: {{within: {{{link}}}}}
lending: {{policy: {policy}, moved_tokens_per_step: {moved_tokens}, heartbeat_s: {heartbeat_s}, small_batch: 32,
          answer_within_s: 10, lease_s: 60, recall_s: 60, wait_s: 100000}}
run: {{check: end, patience_s: 1.0e+9}}
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trace on some instances; `longest` and `shortest` in tokens of prompt and answer, `kv_gib` for each GPU."""

    name: str
    shortest: int
    longest: int
    requests: int
    machines: int
    block_tokens: int
    rate_per_s: float | None = None
    link: str = NVLINK
    seed: int = 0
    answer_fractions: tuple[float, float] = (0.05, 0.5)
    most_answer_tokens: int = 1000
    kv_gib: int | None = None


TRACES = (
    *(
        Case(
            name=f"trace {number}",
            shortest=1000,
            longest=longest,
            requests=requests,
            machines=4,
            block_tokens=256,
        )
        for number, (longest, requests) in enumerate(((15_000, 160), (30_000, 110), (60_000, 80)))
    ),
    *(
        Case(
            name=f"trace {number}",
            shortest=1000,
            longest=longest,
            requests=24,
            machines=32,
            block_tokens=2048,
        )
        for number, longest in enumerate((200_000, 400_000, 600_000, 800_000, 1_200_000, 2_000_000), start=3)
    ),
    Case(name="equal, 8K", shortest=8000, longest=8000, requests=100, machines=4, block_tokens=256),
)
DECODING = tuple(
    Case(
        name=f"answers, up to {longest // 1000}K",
        shortest=1000,
        longest=longest,
        requests=requests,
        machines=4,
        block_tokens=128,
        answer_fractions=(0.6, 0.95),
        most_answer_tokens=longest,
        kv_gib=16,
    )
    for longest, requests in ((12_000, 48), (30_000, 20))
)
"""Mostly decoding, in little memory: so that time goes where the paper's throughput model looks."""
ORACLES = frozenset(case.name for case in TRACES if case.machines < 32)
"""Where the oracle runs too."""


def trace_of(case: Case) -> list[TraceRequest]:
    """Requests of a case."""
    rng = np.random.default_rng(case.seed)
    totals = (
        np.exp(rng.uniform(np.log(case.shortest), np.log(case.longest), case.requests)).round().astype(int)
    )
    answers = np.clip(
        rng.uniform(*case.answer_fractions, case.requests) * totals, 1, case.most_answer_tokens
    ).astype(int)
    gaps_s = rng.exponential(1 / case.rate_per_s if case.rate_per_s else 0.0, case.requests)
    return [
        TraceRequest(arrival_s=float(at_s), prompt_tokens=int(total - answer), output_tokens=int(answer))
        for at_s, total, answer in zip(np.cumsum(gaps_s), totals, answers, strict=True)
    ]


def run_of(case: Case, policy: str, requests: Sequence[TraceRequest], **changes: object) -> ClusterRun:
    """The run of a case, ready to begin."""
    single = policy == "single"
    values: dict[str, object] = {
        "count": 1 if single else case.machines,
        "devices": case.machines if single else 1,
        "policy": policy if policy in LENDING else "off",
        "block_tokens": case.block_tokens,
        "link": case.link,
        "seed": case.seed,
        "memory": "kv: bf16"
        if case.kv_gib is None
        else f"kv_memory: {case.kv_gib * (case.machines if single else 1)}GiB",
        "more": "",
        "step_tokens": 2048 if case.machines < 32 else 8192,
        "moved_tokens": 64,
        "heartbeat_s": 1 if case.machines < 32 else 5,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "trace.jsonl").write_text("\n".join(format_trace(requests)) + "\n")
        scenario = parse_scenario(SCENARIO.format(**(values | changes)), case.name)
        return run_of_scenario(scenario, Path(folder))


def served(case: Case, policy: str, **changes: object) -> dict[str, Any]:
    """One run in numbers."""
    requests = trace_of(case)
    run = run_of(case, policy, requests, **changes)
    began_s = time.process_time()
    run.run()
    cpu_s = time.process_time() - began_s
    outcomes = run.outcomes
    rows = outcomes.ended("finished")
    last_s = max(outcomes.arrival_s[row] + outcomes.end_s[row] for row in rows)
    tokens = sum(outcomes.prompt_tokens[row] + outcomes.output_tokens[row] for row in rows)
    per_token = {row: outcomes.end_s[row] / outcomes.output_tokens[row] for row in rows}
    short = [
        per_token[row]
        for row in rows
        if outcomes.prompt_tokens[row] + outcomes.output_tokens[row] <= SHORT_TOKENS
    ]
    return {
        "case": case.name,
        "link": case.link,
        "rate_per_s": case.rate_per_s,
        "policy": policy,
        **changes,
        "finished_fraction": len(rows) / len(outcomes),
        "refused": len(outcomes.ended("refused")),
        "failed": len(outcomes.ended("failed")),
        "virtual_s": last_s,
        "tokens_per_s": tokens / last_s,
        "output_tokens_per_s": sum(outcomes.output_tokens[row] for row in rows) / last_s,
        "mean_normalised_s": statistics.mean(per_token.values()),
        "short_mean_normalised_s": statistics.mean(short),
        "longest_context_tokens": longest_context_tokens(outcomes),
        "preemptions": sum(worker.totals.preemptions for worker in run.workers.values()),
        "lending": lending_of(run),
        "events": run.heap.events,
        "cpu_s": cpu_s,
        "digest": run.heap.digest(),
    }


def moved(link: str, moved_tokens: int) -> dict[str, Any]:
    """One instance whose 16 sequences outgrow its memory while they decode; another one has room.

    That one's host is so slow that the router sends nothing there.
    """
    case = Case(
        name="growing", shortest=0, longest=0, requests=16, machines=1, block_tokens=16, link=LINKS[link]
    )
    roomy = "  - {name: roomy, device: a100-80gb, host_s: 100, block_tokens: 16}"
    requests = [TraceRequest(arrival_s=0.0, prompt_tokens=600, output_tokens=600) for _ in range(16)]
    run = run_of(
        case,
        "pull",
        requests,
        memory="kv_memory: 7GiB",
        more=roomy,
        moved_tokens=moved_tokens,
        heartbeat_s=0.1,
    )
    run.run()
    lending = lending_of(run)
    assert lending is not None
    return {
        "link": link,
        "moved_tokens": moved_tokens,
        "output_tokens_per_s": sum(run.outcomes.output_tokens) / run.heap.now_s,
        "mean_gap_s": statistics.mean(run.outcomes.gaps_s),
        "p99_gap_s": float(np.percentile(run.outcomes.gaps_s, 99)),
        "preemptions": sum(worker.totals.preemptions for worker in run.workers.values()),
        **lending,
    }


def model_errors(case: Case, policy: str) -> dict[str, Any]:
    """Steps that only decoded, of each instance: the model fitted to every other one, and its errors on the rest."""
    run = run_of(case, policy, trace_of(case))
    assert run.lending is not None
    samples: list[list[StepSample]] = []
    for lender in run.lending.lenders:
        mine: list[StepSample] = []
        samples.append(mine)
        lender.agent.after_step = partial(_kept, mine, lender.agent.after_step)
    run.run()
    layers = len(run.blocks)
    errors: list[float] = []
    fitted: list[dict[str, Any]] = []
    for mine in samples:
        thinned = mine[:: max(1, len(mine) // 400)]
        if len(thinned) < 40:
            continue
        times = fit_layer_times(thinned[::2], layers)
        fitted.append(asdict(times))
        errors += [
            abs(times.throughput(each.requests, each.tokens, each.holders) * each.seconds / each.requests - 1)
            for each in thinned[1::2]
        ]
    return {"case": case.name, "policy": policy, "steps": len(errors), "times": fitted, "errors": errors}


def _kept(kept: list[StepSample], call: Any, sample: StepSample | None, starved: bool, now_s: float) -> Any:
    if sample is not None:
        kept.append(sample)
    return call(sample, starved, now_s)


def plan_gap(seed: int) -> float:
    """What a plan makes of two short instances and two with room, as a fraction of the best plan there is."""
    rng = np.random.default_rng(seed)
    times = LayerTimes(layers=4, flat_s=1e-3, per_request_s=2e-4, per_token_s=1e-7, per_holder_s=2e-5)
    short, roomy = [PeerId("a"), PeerId("b")], [PeerId("c"), PeerId("d")]
    loads: dict[PeerId, InstanceLoad] = {}
    for id in (*short, *roomy):
        room = 0 if id in short else int(rng.integers(3, 10)) * 10
        loads[id] = InstanceLoad(
            id=id,
            times=times,
            running=int(rng.integers(1, 4)),
            waiting=int(rng.integers(1, 9)) if id in short else 0,
            kv_blocks=100,
            free_blocks=room,
            lendable_blocks=room,
            attended_tokens=1600 if id in short else 160,
            mean_request_tokens=float(rng.integers(100, 600)),
            requests=(MovableRequest(RequestId(f"long-{id}"), 1600, 99),) if id in short else (),
        )

    def total(moves: Sequence[tuple[PeerId, PeerId, int]]) -> float:
        state = dict(loads)
        for debtor, creditor, blocks in moves:
            state[debtor], state[creditor] = after_move(state[debtor], state[creditor], blocks, 16)
        return sum(each.throughput for each in state.values())

    best = 0.0
    pairs = list(product(short, roomy))
    for amounts in product(range(0, 100, 10), repeat=len(pairs)):
        moves = [(*pair, blocks) for pair, blocks in zip(pairs, amounts, strict=True) if blocks]
        given = [sum(blocks for debtor, _, blocks in moves if debtor == each) for each in short]
        taken = [sum(blocks for _, creditor, blocks in moves if creditor == each) for each in roomy]
        fits = all(blocks <= loads[each].lendable_blocks for each, blocks in zip(roomy, taken, strict=True))
        if fits and max(given) <= 99:
            best = max(best, total(moves))
    plan = plan_lending(list(loads.values()), LendingRules(small_batch=4), 16, 0.0)
    return total([(move.debtor, move.creditor, move.kv_blocks) for move in plan]) / best


def jobs(small: bool) -> Iterator["partial[dict[str, Any]]"]:
    """Everything to be run."""
    traces = [replace(case, requests=12) for case in TRACES[:4]] if small else TRACES
    for case in traces:
        for policy in ("multi", "single", *LENDING):
            if policy != "oracle" or case.name in ORACLES:
                yield partial(served, case, policy)
    for case in () if small else DECODING:
        for policy in ("multi", "single", "pull", "plan"):
            yield partial(served, case, policy)
    curved = replace(traces[2], requests=traces[2].requests * 2 // 3)
    for rate_per_s in (0.1, 0.2, 0.4):
        for policy in ("multi", "single", "pull", "plan"):
            yield partial(served, replace(curved, rate_per_s=rate_per_s), policy)
    for policy in ("pull", "plan"):
        yield partial(served, replace(traces[2], link=SLOW), policy, moved_tokens=16)
    for link in LINKS:
        for tokens in (0, 2, 4, 8, 16, 32, 64):
            yield partial(moved, link, tokens)
    yield partial(model_errors, traces[2], "pull")
    yield partial(model_errors, traces[3], "plan")


def _done(job: "partial[dict[str, Any]]") -> dict[str, Any]:
    result = {"kind": job.func.__name__} | job()
    print({key: value for key, value in result.items() if key not in ("errors", "times")}, flush=True)
    return result


def ratios(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each trace: throughputs over that of many small instances and of a big one, and what was served."""
    found: dict[str, Any] = {}
    for case in dict.fromkeys(run["case"] for run in runs):
        mine = {run["policy"]: run for run in runs if run["case"] == case}
        found[case] = {
            policy: {
                "tokens_per_s": round(run["tokens_per_s"]),
                "over multi": round(run["tokens_per_s"] / mine["multi"]["tokens_per_s"], 2),
                "over single": round(run["tokens_per_s"] / mine["single"]["tokens_per_s"], 2),
                "finished_fraction": round(run["finished_fraction"], 2),
                "longest_context_tokens": run["longest_context_tokens"],
                "short requests, s/token, over multi": round(
                    run["short_mean_normalised_s"] / mine["multi"]["short_mean_normalised_s"], 2
                ),
                "waited_fraction": round(run["lending"]["waited_fraction"], 3) if run["lending"] else 0.0,
            }
            for policy, run in mine.items()
        }
    return found


def figures(results: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    runs = [each for each in results if each["kind"] == "served"]
    closed = [run for run in runs if run["rate_per_s"] is None and run["link"] == NVLINK]
    names = [f"trace {number}" for number in range(9)]
    for what, policies in (("multi", LENDING), ("single", ("multi", *LENDING))):
        figure = Figure(f"Throughput over {what}", "trace", f"tokens/s over {what}")
        for policy in policies:
            points = [
                (number, mine[policy] / mine[what])
                for number, name in enumerate(names)
                if policy
                in (mine := {run["policy"]: run["tokens_per_s"] for run in closed if run["case"] == name})
            ]
            figure.add_line(policy, [x for x, _ in points], [y for _, y in points])
        yield figure
    latency = Figure("Trace 2", "requests/s", "mean latency per token (s)", log_y=True)
    rated = [run for run in runs if run["rate_per_s"] is not None]
    for policy in ("multi", "single", "pull", "plan"):
        mine = sorted((run for run in rated if run["policy"] == policy), key=lambda run: run["rate_per_s"])
        latency.add_line(
            policy, [run["rate_per_s"] for run in mine], [run["mean_normalised_s"] for run in mine]
        )
    yield latency
    moving = Figure("Moves beside a decode step", "tokens moved a step", "output tokens/s")
    for link in LINKS:
        mine = [each for each in results if each["kind"] == "moved" and each["link"] == link]
        moving.add_line(
            link, [each["moved_tokens"] for each in mine], [each["output_tokens_per_s"] for each in mine]
        )
    yield moving


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--plans", type=int, default=10, help="small swarms whose plans are compared with the best"
    )
    parser.add_argument(
        "--small", action="store_true", help="a few requests of the first traces: does it work?"
    )
    options = parser.parse_args()
    with Pool(options.processes) as pool:
        results = list(pool.imap(_done, jobs(options.small), chunksize=1))
        gaps = pool.map(plan_gap, range(options.plans))
    write(results, gaps)


def write(results: Sequence[dict[str, Any]], gaps: Sequence[float]) -> None:
    """All results, and what they sum up to."""
    runs = [each for each in results if each["kind"] == "served"]
    closed = [run for run in runs if run["rate_per_s"] is None]
    models = [each for each in results if each["kind"] == "model_errors"]
    summary = {
        "traces": ratios([run for run in closed if run["link"] == NVLINK]),
        "latency on trace 2, s/token": {
            f"{run['rate_per_s']:g}/s, {run['policy']}": round(run["mean_normalised_s"], 3)
            for run in runs
            if run["rate_per_s"] is not None
        },
        "trace 2 over 125 MB/s and 1 ms": {
            f"{run['policy']}, {run['moved_tokens']} tokens a step": {
                "tokens_per_s": round(run["tokens_per_s"]),
                "waited_fraction": round(run["lending"]["waited_fraction"], 3),
            }
            for run in closed
            if run["link"] == SLOW
        },
        "moves beside a decode step, output tokens/s": {
            link: {
                str(each["moved_tokens"]): round(each["output_tokens_per_s"])
                for each in results
                if each["kind"] == "moved" and each["link"] == link
            }
            for link in LINKS
        },
        "throughput model": {
            f"{each['case']}, {each['policy']}": {
                "steps": each["steps"],
                "median_error_fraction": round(statistics.median(each["errors"]), 3),
                "p95_error_fraction": round(float(np.percentile(each["errors"], 95)), 3),
            }
            for each in models
        },
        "plans over the best of all": {
            "median": round(statistics.median(gaps), 3),
            "worst": round(min(gaps), 3),
        },
        "cpu_s": round(sum(run["cpu_s"] for run in runs)),
    }
    for each in models:
        each["errors"] = [round(error, 4) for error in each["errors"]]
    write_result(
        "distkv_simulated",
        settings={"plans": len(gaps), "traces": [asdict(case) for case in TRACES]},
        samples={"runs": results, "plans": gaps},
        summary=summary,
        figures=list(figures(results)),
    )


if __name__ == "__main__":
    main()
