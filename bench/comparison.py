"""Batching and memory policies at the scale of their papers, on the same traces: what ORCA and vLLM claim, simulated.

OPT-13B, 66B and 175B on A100s by roofline (peaks add up over the GPUs of one model), lengths as ShareGPT's and as
ORCA's synthetic trace, Poisson arrivals. Only the policy differs; scheduler, pool and step times are the same:

    static            a batch runs to its end before the next begins; room for the answer is reserved
    orca, oracle      iterations; room for prompt and answer is reserved, as if its length were known
    orca, max         iterations; room for the whole context is reserved, since it is not
    paged             blocks on demand, preemption

Latency is per generated token, from arrival to the last one (normalised latency). The rate at a latency of twice that
of an idle machine, interpolated, is how much each policy sustains. This reproduces shapes and signs: absolute numbers
are those of a roofline.

    python bench/comparison.py            about four minutes of one core
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import Figure, write_result

from plait.simulator import latency_samples, parse_scenario, run_of_scenario

POLICIES = {
    "static": ("static", "answer"),
    "orca, oracle": ("orca", "answer"),
    "orca, max": ("orca", "context"),
    "paged": ("paged", "answer"),
}
TIMES_IDLE = 2.0
SCENARIO = """
model: {model}
machines:
  - {{name: server, device: {device}, devices: {devices}, host_s: 0.002, scheduling: {scheduling}}}
workload: {{requests: {requests}, lengths: {lengths}, rate_per_s: {rate}, asks: {asks}}}
network: {{within: {{one_way_s: 0, bandwidth_bytes_per_s: 1.0e+12}}}}
seed: {seed}
run: {{check: end, patience_s: 1.0e+9}}
"""


@dataclass(frozen=True)
class Case:
    """A model on its GPUs, a workload, and rates around what it sustains."""

    model: str
    device: str
    devices: int
    lengths: str
    rates_per_s: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.model} on {self.devices} x {self.device}, {self.lengths}"


CASES = (
    Case("opt-13b", "a100-40gb", 1, "sharegpt-like", (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)),
    Case("opt-13b", "a100-40gb", 1, "uniform", (1.0, 2.0, 4.0, 6.0, 8.0, 12.0)),
    Case("opt-66b", "a100-40gb", 4, "sharegpt-like", (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)),
    Case("opt-175b", "a100-80gb", 8, "sharegpt-like", (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)),
)


def point(case: Case, policy: str, rate_per_s: float, seed: int, requests: int) -> dict[str, Any]:
    """One run."""
    scheduling, asks = POLICIES[policy]
    text = SCENARIO.format(
        model=case.model,
        device=case.device,
        devices=case.devices,
        lengths=case.lengths,
        rate=rate_per_s,
        scheduling=scheduling,
        asks=asks,
        requests=requests,
        seed=seed,
    )
    run = run_of_scenario(parse_scenario(text, "comparison"), Path("."))
    run.run()
    samples = latency_samples(run.outcomes)
    totals = next(iter(run.workers.values())).totals
    return {
        "case": case.name,
        "policy": policy,
        "rate_per_s": rate_per_s,
        "seed": seed,
        "mean_normalised_s": float(samples["normalised"].mean()),
        "p99_normalised_s": float(np.percentile(samples["normalised"], 99)),
        "median_ttft_s": float(np.median(samples["ttft"])),
        "output_tokens_per_s": sum(run.outcomes.output_tokens) / run.heap.now_s,
        "mean_batch": totals.step_sequences / totals.steps,
        "useful_kv_fraction": totals.useful_kv_fraction_sum / max(totals.usage_samples, 1),
        "held_kv_fraction": totals.held_kv_fraction_sum / max(totals.usage_samples, 1),
        "preemptions": totals.preemptions,
        "digest": run.heap.digest(),
    }


def curve(
    samples: Sequence[dict[str, Any]], case: str, policy: str, what: str
) -> tuple[list[float], list[float]]:
    """Medians over the seeds, one for each rate."""
    mine = [sample for sample in samples if (sample["case"], sample["policy"]) == (case, policy)]
    rates = sorted({sample["rate_per_s"] for sample in mine})
    return rates, [
        statistics.median(sample[what] for sample in mine if sample["rate_per_s"] == rate) for rate in rates
    ]


def sustained_per_s(rates: Sequence[float], latencies_s: Sequence[float], limit_s: float) -> float:
    """The rate at which a curve crosses a limit; the last one where it does not, 0 where it begins above."""
    if latencies_s[0] > limit_s:
        return 0.0
    for (low, below), (high, above) in zip(
        zip(rates, latencies_s, strict=True), zip(rates[1:], latencies_s[1:], strict=False), strict=False
    ):
        if above > limit_s:
            return low + (high - low) * (limit_s - below) / (above - below)
    return rates[-1]


def summarised(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What each policy sustains, its batch and its memory at the highest rate, and the ratios that papers state."""
    summary: dict[str, Any] = {}
    for case in dict.fromkeys(sample["case"] for sample in samples):
        curves = {policy: curve(samples, case, policy, "mean_normalised_s") for policy in POLICIES}
        idle_s = min(latencies[0] for _, latencies in curves.values())
        sustained = {
            policy: round(sustained_per_s(rates, latencies, TIMES_IDLE * idle_s), 3)
            for policy, (rates, latencies) in curves.items()
        }
        at_top = {
            policy: {
                what: round(curve(samples, case, policy, what)[1][-1], 3)
                for what in ("mean_batch", "useful_kv_fraction", "output_tokens_per_s", "mean_normalised_s")
            }
            for policy in POLICIES
        }
        summary[case] = {
            "latency_limit_s": round(TIMES_IDLE * idle_s, 4),
            "sustained_requests_per_s": sustained,
            "paged over others": {
                policy: round(sustained["paged"] / sustained[policy], 2) if sustained[policy] else "beyond"
                for policy in POLICIES
                if policy != "paged"
            },
            "at the highest rate": at_top,
        }
    return summary


def figures(samples: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    for case in dict.fromkeys(sample["case"] for sample in samples):
        figure = Figure(case, "requests/s", "mean latency per token (s)", log_y=True)
        for policy in POLICIES:
            figure.add_line(policy, *curve(samples, case, policy, "mean_normalised_s"))
        yield figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    samples: list[dict[str, Any]] = []
    for case in CASES:
        for seed in range(options.seeds):
            for rate in case.rates_per_s:
                for policy in POLICIES:
                    samples.append(point(case, policy, rate, seed, options.requests))
                    print(samples[-1], flush=True)
    write_result(
        "comparison",
        settings=vars(options) | {"times_idle": TIMES_IDLE, "cases": [case.name for case in CASES]},
        samples=samples,
        summary=summarised(samples),
        figures=list(figures(samples)),
    )


if __name__ == "__main__":
    main()
