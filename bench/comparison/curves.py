"""Medians over seeds, the rate that a latency allows, and how many times as much one policy sustains as another."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

Sample = dict[str, Any]


def of(samples: Iterable[Sample], **wanted: object) -> list[Sample]:
    """The samples with these values."""
    return [sample for sample in samples if all(sample[key] == value for key, value in wanted.items())]


def names(samples: Iterable[Sample], key: str) -> list[Any]:
    """Different values, in order of appearance."""
    return list(dict.fromkeys(sample[key] for sample in samples))


def curve(samples: Sequence[Sample], x: str, y: str) -> tuple[list[float], list[float]]:
    """Medians over the seeds of one policy in one case, a point for each load that all seeds reached."""
    seeds = len(names(samples, "seed"))
    points = [of(samples, load=load) for load in sorted(names(samples, "load"))]
    full = [same for same in points if len(same) == seeds]
    return (
        [statistics.median(sample[x] for sample in same) for same in full],
        [statistics.median(sample[y] for sample in same) for same in full],
    )


def sustained_per_s(samples: Sequence[Sample], latency: str, limit_s: float) -> tuple[float, bool]:
    """The rate at which one policy's latency crosses a limit in one seed, between two measured rates; and whether it
    does: without, the highest rate is only a lower bound. 0 where even the lowest rate is above the limit."""
    points = sorted((sample["rate_per_s"], sample[latency]) for sample in samples)
    if points[0][1] > limit_s:
        return 0.0, True
    for (low, below_s), (high, above_s) in pairwise(points):
        if above_s > limit_s:
            return low + (high - low) * (limit_s - below_s) / (above_s - below_s), True
    return points[-1][0], False


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [float(f"{each:.4g}") for each in (statistics.median(values), min(values), max(values))]


def sustained(
    samples: Sequence[Sample], latency: str = "normalised_mean_s", *, times_idle: float
) -> dict[str, list[float]]:
    """By policy of one case: median, least and most over the seeds of what a multiple of the idle latency allows.

    Idle is the least latency of any policy at the lowest load of the same seed.
    """
    found: dict[str, list[float]] = {}
    for policy in names(samples, "policy"):
        rates: list[float] = []
        for seed in names(samples, "seed"):
            same_seed = of(samples, seed=seed)
            limit_s = times_idle * idle_s(same_seed)
            rates.append(sustained_per_s(of(same_seed, policy=policy), latency, limit_s)[0])
        found[policy] = spread(rates)
    return found


def idle_s(samples: Sequence[Sample]) -> float:
    """The least mean normalised latency at the lowest load."""
    lowest = min(sample["load"] for sample in samples)
    return min(sample["normalised_mean_s"] for sample in samples if sample["load"] == lowest)


def times_as_much(
    samples: Sequence[Sample],
    policy: str,
    other: str,
    *,
    limit_s: float | None = None,
    times_idle: float = 0.0,
    latency: str = "normalised_mean_s",
    other_latency: str | None = None,
) -> list[Any] | None:
    """How many times the rate of `other` a policy sustains in one case: median, least and most over the seeds.

    The latency is `limit_s`, or a multiple of the idle one. A fourth entry says "at least" where the policy did not
    reach the limit at its highest rate, "at most" where the other did not, "unknown" where neither did. None where the
    other sustains nothing.
    """
    ratios: list[float] = []
    open_ended = set[str]()
    for seed in names(samples, "seed"):
        same_seed = of(samples, seed=seed)
        mine, others = of(same_seed, policy=policy), of(same_seed, policy=other)
        if not (mine and others):
            continue
        limit = times_idle * idle_s(same_seed) if limit_s is None else limit_s
        rate, crossed = sustained_per_s(mine, latency, limit)
        others_rate, others_crossed = sustained_per_s(others, other_latency or latency, limit)
        if others_rate:
            ratios.append(rate / others_rate)
            open_ended |= {"at least"} if not crossed else set()
            open_ended |= {"at most"} if not others_crossed else set()
    if not ratios:
        return None
    bounds = ["unknown"] if len(open_ended) == 2 else sorted(open_ended)
    return [*spread(ratios), *bounds]


def at_load(
    samples: Sequence[Sample], load: float, keys: Iterable[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """By policy of one case: medians over the seeds at one load."""
    for policy in names(samples, "policy"):
        same = of(samples, policy=policy, load=load)
        if same:
            yield policy, {key: statistics.median(sample[key] for sample in same) for key in keys}
