"""A policy's runs at rising rates, for each case and seed, in several processes."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from comparison.cases import COMMON_LOAD, IDLE_LOAD, LIMITS_TIMES_IDLE, LOW_LOADS, Case
from comparison.point import capacity_per_s, point
from comparison.policies import PAGED, Policy

_LOST_TIMES_IDLE = 2 * LIMITS_TIMES_IDLE[-1]
"""Latency from which on a policy has lost: it runs at no higher rate but the common one."""


@dataclass(frozen=True)
class Series:
    """What one process runs."""

    case: Case
    policy: Policy
    seed: int


def run_all(cases: Sequence[Case], seeds: int, jobs: int, keep: Path | None = None) -> list[dict[str, Any]]:
    """All samples, in a fixed order; progress is printed. Series that are kept in a folder are not run again."""
    wanted = [
        Series(case, policy, seed) for case in cases for policy in case.policies for seed in range(seeds)
    ]
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        found = pool.map(_run_series, wanted, [keep] * len(wanted))
        return [sample for samples in found for sample in samples]


@cache
def _capacity_per_s(case: Case) -> float:
    return capacity_per_s(case, PAGED, seed=0)


def _run_series(series: Series, keep: Path | None) -> list[dict[str, Any]]:
    named = f"{series.case.name} {series.policy.name} {series.seed}"
    return kept(keep, named, lambda: _samples_of(series))


def kept(keep: Path | None, name: str, compute: Callable[[], Any]) -> Any:
    """What is found by `compute`, as JSON has it; from a file of the folder if it is there, else put there."""
    if keep is None:
        return json.loads(json.dumps(compute()))
    file = keep / f"{name.replace(' ', '-').replace(',', '')}.json"
    if not file.exists():
        file.write_text(json.dumps(compute()))
    return json.loads(file.read_text())


def _samples_of(series: Series) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    lost = False
    for load in series.case.loads:
        if (lost and load != COMMON_LOAD) or (load in LOW_LOADS and not series.policy.slow):
            continue
        case = series.case
        if load == IDLE_LOAD:
            case = replace(case, requests=case.requests // 3)
        rate_per_s = load * _capacity_per_s(series.case)
        found = point(case, series.policy, rate_per_s, series.seed)
        samples.append(
            {
                "case": series.case.name,
                "policy": series.policy.name,
                "seed": series.seed,
                "load": load,
                "rate_per_s": float(f"{rate_per_s:.5g}"),
                **found,
            }
        )
        first_s = samples[0]["normalised_mean_s"]
        lost = lost or found["normalised_mean_s"] > _LOST_TIMES_IDLE * first_s
    _report(samples)
    return samples


def _report(samples: Iterable[dict[str, Any]]) -> None:
    for sample in samples:
        line = (
            f"{sample['case']:44} {sample['policy']:14} seed {sample['seed']} load {sample['load']:4.2f} "
            f"{sample['normalised_mean_s']:8.4f} s a token, batch {sample['mean_batch']:6.1f}"
        )
        print(line, flush=True)
