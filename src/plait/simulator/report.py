"""What a run comes to: the words of `plait.metrics`, from raw samples, with bootstrap intervals."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.metrics import (
    Objectives,
    mean_estimate,
    normalised_latency_s,
    percentile_estimate,
    tpot_s,
)
from plait.simulator.cluster_run import ClusterRun
from plait.simulator.event_heap import NS_PER_S
from plait.simulator.outcomes import Outcomes
from plait.simulator.random_streams import stream
from plait.simulator.simulated_worker import SimulatedWorker, WorkerTotals

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
WARM_UP_FRACTION = 0.1
STALL_S = 1.0
"""A gap that a reader takes for a failure."""

Floats = NDArray[np.float64]


def report_of(run: ClusterRun, objectives: Objectives) -> dict[str, Any]:
    """A finished run in numbers, for JSON: times in seconds, fractions from 0 to 1.

    Throughput and goodput are those of the steady window: from when the first tenth of the requests has arrived until
    the last one does, so that filling up and draining do not count (the whole run, where everything arrives at once).
    """
    outcomes = run.outcomes
    samples = latency_samples(outcomes)
    rng = stream(run.options.seed, "report")
    return {
        "seed": run.options.seed,
        "events": run.heap.events,
        "digest": run.heap.digest(),
        "virtual_s": run.heap.now_s,
        "requests": _counts(outcomes),
        "steady": _steady(outcomes, objectives),
        "objectives": {name: limit for name, limit in asdict(objectives).items() if limit is not None},
        "attainment_fraction": attained(outcomes, objectives).mean() if len(outcomes) else 0.0,
        "latency_s": {name: _statistics(values, rng) for name, values in samples.items() if len(values)},
        "stalls": int(np.count_nonzero(samples["itl"] > STALL_S)),
        "peak_in_flight": run.peak_in_flight,
        "longest_context_tokens": longest_context_tokens(outcomes),
        "mean_in_flight": run.in_flight_ns / max(run.heap.now_ns, 1),
        "machines": {worker.name: _machine(worker, run) for worker in run.workers.values()},
        "cluster": _cluster(run),
        "lending": lending_of(run),
    }


def lending_of(run: ClusterRun) -> dict[str, Any] | None:
    """What machines lent each other, all together; None where they do not.

    `waited_fraction`: of the time in which steps ran, that which they waited for remote parts longer than their own
    attention took.
    """
    if run.lending is None:
        return None
    totals = [asdict(lender.totals) for lender in run.lending.lenders]
    added = {name: sum(each[name] for each in totals) for name in totals[0]}
    busy_ns = max(sum(worker.totals.busy_ns for worker in run.workers.values()), 1)
    waited_ns, lent_ns = added.pop("waited_ns"), added.pop("lent_attention_ns")
    return added | {
        "waited_s": waited_ns / NS_PER_S,
        "waited_fraction": waited_ns / busy_ns,
        "lent_attention_s": lent_ns / NS_PER_S,
    }


def longest_context_tokens(outcomes: Outcomes) -> int:
    """Prompt and answer together, of the longest request that finished."""
    rows = outcomes.ended("finished")
    return max((outcomes.prompt_tokens[row] + outcomes.output_tokens[row] for row in rows), default=0)


def latency_samples(outcomes: Outcomes) -> dict[str, Floats]:
    """Raw samples of each latency, in seconds, of the requests that finished; gaps are those of all."""
    rows = outcomes.ended("finished")
    first, end = np.array(outcomes.first_s)[rows], np.array(outcomes.end_s)[rows]
    tokens = np.array(outcomes.output_tokens)[rows]
    per_token = [
        tpot_s(float(f), float(e), int(n)) for f, e, n in zip(first, end, tokens, strict=True) if n > 1
    ]
    return {
        "ttft": first,
        "itl": np.array(outcomes.gaps_s),
        "tpot": np.array([each for each in per_token if each is not None]),
        "e2e": end,
        "normalised": np.array(
            [normalised_latency_s(float(e), int(n)) for e, n in zip(end, tokens, strict=True)]
        ),
    }


def attained(outcomes: Outcomes, objectives: Objectives) -> NDArray[np.bool_]:
    """Which of the offered requests were good; those that failed or were refused are not."""
    good = np.zeros(len(outcomes), dtype=np.bool_)
    for row in outcomes.ended("finished"):
        good[row] = objectives.met_by(
            outcomes.first_s[row],
            outcomes.end_s[row],
            outcomes.output_tokens[row],
            outcomes.widest_gap_s[row],
        )
    return good


def _counts(outcomes: Outcomes) -> dict[str, Any]:
    return {
        "offered": len(outcomes),
        "finished": len(outcomes.ended("finished")),
        "failed": len(outcomes.ended("failed")),
        "refused": len(outcomes.ended("refused")),
        "moved": sum(1 for retries in outcomes.retries if retries),
        "moves": sum(outcomes.retries),
        "reasons": dict(sorted(outcomes.reasons.items())),
    }


def _steady(outcomes: Outcomes, objectives: Objectives) -> dict[str, float]:
    if not len(outcomes):
        return {}
    arrivals = np.array(outcomes.arrival_s)
    ends = arrivals + np.array(outcomes.end_s)
    begin_s, end_s = float(np.quantile(arrivals, WARM_UP_FRACTION)), float(arrivals.max())
    if end_s <= begin_s:
        begin_s, end_s = float(arrivals.min()), float(ends.max())
    finished = np.zeros(len(outcomes), dtype=np.bool_)
    finished[outcomes.ended("finished")] = True
    inside = finished & (ends >= begin_s) & (ends <= end_s)
    good = attained(outcomes, objectives) & inside
    length_s = max(end_s - begin_s, 1e-9)
    return {
        "begin_s": begin_s,
        "end_s": end_s,
        "requests_per_s": float(inside.sum()) / length_s,
        "output_tokens_per_s": float(np.array(outcomes.output_tokens)[inside].sum()) / length_s,
        "input_tokens_per_s": float(np.array(outcomes.prompt_tokens)[inside].sum()) / length_s,
        "goodput_requests_per_s": float(good.sum()) / length_s,
    }


def _statistics(values: Floats, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "count": len(values),
        "mean": asdict(mean_estimate(values, rng)),
        **{f"p{percent:g}": asdict(percentile_estimate(values, percent, rng)) for percent in PERCENTILES},
        "max": float(values.max()),
    }


def _machine(worker: SimulatedWorker, run: ClusterRun) -> dict[str, Any]:
    totals = worker.totals
    duration_ns = max(run.heap.now_ns, 1)
    spec = worker.spec
    return {
        "blocks": [spec.blocks.start, spec.blocks.stop],
        "kv_tokens": spec.kv_blocks * spec.block_tokens,
        "steps": totals.steps,
        "step_tokens": totals.step_tokens,
        "mean_batch": totals.step_sequences / max(totals.steps, 1),
        "busy_fraction": totals.busy_ns / duration_ns,
        "mfu_fraction": _of_busy_time(totals.ideal_compute_s, totals),
        "mbu_fraction": _of_busy_time(totals.ideal_memory_s, totals),
        "preemptions": totals.preemptions,
        "crashes": totals.crashes,
        "cache_hit_fraction": totals.prefix_hit_tokens / max(totals.prefix_query_tokens, 1),
        "useful_kv_fraction": totals.useful_kv_fraction_sum / max(totals.usage_samples, 1),
        "held_kv_fraction": totals.held_kv_fraction_sum / max(totals.usage_samples, 1),
        "extrapolated_steps": spec.costs.extrapolated_steps,
        "energy_j": totals.energy_j + spec.costs.idle_watts * duration_ns / NS_PER_S,
    }


def _of_busy_time(ideal_s: float, totals: WorkerTotals) -> float | None:
    """MFU and MBU, while steps run; None where the device's peaks are not known."""
    return ideal_s * NS_PER_S / totals.busy_ns if ideal_s > 0 and totals.busy_ns else None


def _cluster(run: ClusterRun) -> dict[str, float]:
    workers = list(run.workers.values())
    tokens = max(sum(run.outcomes.output_tokens), 1)
    hours = run.heap.now_s / 3600
    energy_j = sum(
        worker.totals.energy_j + worker.spec.costs.idle_watts * run.heap.now_s for worker in workers
    )
    price = sum(worker.spec.price_per_hour for worker in workers) * hours
    return {
        "energy_j": energy_j,
        "joules_per_output_token": energy_j / tokens,
        "price": price,
        "price_per_million_output_tokens": price / tokens * 1e6,
    }
