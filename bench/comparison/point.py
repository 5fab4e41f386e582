"""One simulated run, in numbers."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from comparison.cases import Case
from comparison.fairness import CLIENTS, alone_s, clients_of, jain_index
from comparison.observed import Observer
from comparison.policies import Policy
from comparison.traces import TRACES, write_trace
from plait.costs import CostModel, RooflineCosts, StepWork
from plait.simulator import (
    ClusterRun,
    latency_samples,
    lending_of,
    longest_context_tokens,
    parse_scenario,
    run_of_scenario,
)

STEP_TOKENS = 2048
WARM_UP_FRACTION = 0.1
SCENARIO = """
model: {model}
machines:
{machines}
workload: {{{requests}, asks: {asks}}}
network: {{within: {{{link}}}}}
seed: {seed}
run: {{check: end, patience_s: 1.0e+9}}
"""
LOANS = """
lending: {{policy: {policy}, moved_tokens_per_step: 64, heartbeat_s: 1, small_batch: 32, lease_s: 60, wait_s: 100000}}
"""


def scenario_text(case: Case, policy: Policy, rate_per_s: float, seed: int) -> str:
    """The scenario of one run; rate 0 sends everything at once. A trace of our own is the file trace.jsonl."""
    requests = f"requests: {case.requests}, lengths: {case.lengths}, rate_per_s: {rate_per_s}"
    if case.lengths in TRACES:
        requests = "trace: trace.jsonl"
    chosen = f"scheduling: {policy.scheduling}, limits: {{max_running_sequences: {policy.most_sequences}}}"
    machines = "\n".join(f"  - {machine[:-1]}, {chosen}}}" for machine in case.machines)
    text = SCENARIO.format(
        model=case.model,
        machines=machines,
        requests=requests,
        asks=policy.asks,
        seed=seed,
        link=case.link,
    )
    if policy.lending is not None:
        text += LOANS.format(policy=policy.lending)
    return text + "".join(f"{key}: {value}\n" for key, value in case.extra.items())


class WithoutEnergy(RooflineCosts):
    """The same seconds; energy is not compared here, and counting it takes longer than all else of a step."""

    def energy_j(self, work: StepWork) -> float:
        return 0.0

    def ideal(self, work: StepWork) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  as CostModel has it
        return None


def _without_energy(costs: CostModel) -> CostModel:
    assert isinstance(costs, RooflineCosts)
    return WithoutEnergy(**{field.name: getattr(costs, field.name) for field in fields(costs)})


def run_of(case: Case, policy: Policy, rate_per_s: float, seed: int) -> tuple[ClusterRun, Observer]:
    """A run that is over, and what was seen of it."""
    observer = Observer(reserves=policy.scheduling != "paged")
    scenario = parse_scenario(scenario_text(case, policy, rate_per_s, seed), case.name)
    with TemporaryDirectory() as folder:
        if case.lengths in TRACES:
            write_trace(
                Path(folder) / "trace.jsonl",
                case.lengths,
                case.requests,
                rate_per_s,
                seed,
                shares=policy.shares,
            )
        run = run_of_scenario(scenario, Path(folder), timeline=observer)
    for worker in run.workers.values():
        worker.spec = replace(worker.spec, costs=_without_energy(worker.spec.costs))
    observer.flights = run.path.flights
    run.run()
    return run, observer


def capacity_per_s(case: Case, policy: Policy, seed: int) -> float:
    """Requests served per second when all arrive at once, but for the last fifth, which few machines finish."""
    run, _ = run_of(case, policy, 0.0, seed)
    ends_s = sorted(run.outcomes.end_s)
    most = int(0.8 * len(ends_s))
    return most / ends_s[most - 1]


def point(case: Case, policy: Policy, rate_per_s: float, seed: int) -> dict[str, Any]:
    """One run in numbers: times in seconds, fractions from 0 to 1, memory as parts of what is held."""
    run, observer = run_of(case, policy, rate_per_s, seed)
    samples = latency_samples(run.outcomes)
    totals = [worker.totals for worker in run.workers.values()]
    kv = observer.kv
    found = {
        **_latencies("normalised", samples["normalised"]),
        **_latencies("ttft", samples["ttft"]),
        **steady_rates(run),
        "finished_fraction": len(run.outcomes.ended("finished")) / case.requests,
        "mean_batch": sum(each.step_sequences for each in totals) / sum(each.steps for each in totals),
        "preemptions": sum(each.preemptions for each in totals),
        "useful_kv_fraction": kv.useful / max(kv.held, 1),
        "reserved_kv_fraction": kv.reserved / max(kv.held, 1),
        "inside_kv_fraction": kv.inside / max(kv.held, 1),
        "useful_in_one_piece_fraction": kv.useful / max(kv.in_one_piece, 1),
        **served_evenly(run, seed),
        "longest_context_tokens": longest_context_tokens(run.outcomes),
        "kv_blocks_moved": lending["blocks_moved_out"] if (lending := lending_of(run)) else 0,
        "prefix_hit_fraction": sum(each.prefix_hit_tokens for each in totals)
        / max(sum(each.prefix_query_tokens for each in totals), 1),
    }
    if policy.scheduling == "static":
        found |= _latencies("per_batch", _answered_per_batch(run, observer.batches))
    return {key: float(f"{value:.5g}") for key, value in found.items()}


def _latencies(name: str, values_s: Sequence[float] | np.ndarray) -> dict[str, float]:
    percentiles = np.percentile(values_s, (50, 90, 99))
    return {f"{name}_mean_s": float(np.mean(values_s))} | {
        f"{name}_p{percent}_s": float(value) for percent, value in zip((50, 90, 99), percentiles, strict=True)
    }


def steady_rates(run: ClusterRun) -> dict[str, float]:
    """Requests and tokens per second between the arrival of the first tenth and the last arrival."""
    outcomes = run.outcomes
    arrivals = np.array(outcomes.arrival_s)
    ends = arrivals + np.array(outcomes.end_s)
    begin_s, end_s = float(np.quantile(arrivals, WARM_UP_FRACTION)), float(arrivals.max())
    inside = (ends >= begin_s) & (ends <= end_s)
    length_s = max(end_s - begin_s, 1e-9)
    return {
        "served_per_s": float(inside.sum()) / length_s,
        "output_tokens_per_s": float(np.array(outcomes.output_tokens)[inside].sum()) / length_s,
    }


def served_evenly(run: ClusterRun, seed: int) -> dict[str, float]:
    """Jain's index over clients, and how many times longer than alone the slowest requests took."""
    outcomes = run.outcomes
    order = np.argsort(outcomes.number)
    prompts, answers = np.array(outcomes.prompt_tokens)[order], np.array(outcomes.output_tokens)[order]
    took_s = np.array(outcomes.end_s)[order]
    finished = np.zeros(len(order), dtype=bool)
    finished[outcomes.ended("finished")] = True
    finished = finished[order]
    machines = [worker.spec.costs for worker in run.workers.values()]
    fastest = min(machines, key=lambda costs: alone_s(costs, 100, 100, STEP_TOKENS))
    alone = np.array(
        [
            alone_s(fastest, prompt, answer, STEP_TOKENS) if answer else 1.0
            for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True)
        ]
    )
    speeds = np.where(finished, alone / took_s, 0.0)
    clients = clients_of(prompts + answers, seed)
    of_clients = [
        float(speeds[clients == client].mean()) for client in range(CLIENTS) if (clients == client).any()
    ]
    slowdowns = took_s[finished] / alone[finished]
    return {
        "jain_index": jain_index(of_clients),
        "slowest_client_speed": min(of_clients),
        "max_slowdown": float(slowdowns.max()),
    }


def _answered_per_batch(run: ClusterRun, batches: Sequence[Sequence[int]]) -> list[float]:
    """Normalised latencies if every request were answered when its batch ends, as request-level servers do."""
    outcomes = run.outcomes
    ends_s = {
        number: arrival + end
        for number, arrival, end in zip(outcomes.number, outcomes.arrival_s, outcomes.end_s, strict=True)
    }
    answered_s = {number: max(ends_s[each] for each in batch) for batch in batches for number in batch}
    return [
        (answered_s[number] - arrival) / tokens
        for number, arrival, tokens in zip(
            outcomes.number, outcomes.arrival_s, outcomes.output_tokens, strict=True
        )
    ]
