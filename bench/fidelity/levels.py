"""From runs to figures: what each level compares, and how much two live runs of the same differ.

Every figure of the simulator against the engine stands beside the same figure of the engine against itself, its floor:
the largest difference of one repeat from the others.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fidelity.live import LiveRun, RequestTimes
from plait.costs import CostModel, Profile
from plait.metrics import (
    Objectives,
    kendall_tau,
    ks_distance,
    mean_absolute_error,
    mean_absolute_relative_error,
    pick_regret,
    relative_error,
)
from plait.simulator import work_of

Floats = NDArray[np.float64]
Requests = Sequence[RequestTimes]
_CONTEXT_BUCKET_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table: `value` has to stay within `goal`, or within `floor` where that is larger."""

    level: str
    what: str
    value: float
    goal: float
    floor: float | None = None
    unit: str = "fraction"
    at_least: bool = False

    @property
    def holds(self) -> bool:
        if self.at_least:
            return self.value >= min(self.goal, self.goal if self.floor is None else self.floor)
        return abs(self.value) <= max(self.goal, self.floor or 0.0)


def output_tokens_per_s(requests: Requests) -> float:
    """Over the time from the first arrival to the last token."""
    begin_s = min(one.arrival_s for one in requests)
    return sum(one.tokens for one in requests) / (
        max(one.arrival_s + one.end_s for one in requests) - begin_s
    )


def latencies(requests: Requests) -> dict[str, Floats]:
    """Samples in seconds, by what they are."""
    tpots = [one.tpot_s for one in requests]
    return {
        "TTFT": np.array([one.first_s for one in requests]),
        "TPOT": np.array([each for each in tpots if each is not None]),
        "E2E": np.array([one.end_s for one in requests]),
    }


# L1


def operation_figures(profile: Profile) -> list[Figure]:
    """Points that the tables were not shown."""
    errors = profile.errors["operations"]
    return [
        Figure(level="L1", what="operations, median error", value=errors.median, goal=0.05),
        Figure(level="L1", what="operations, error at 95 %", value=errors.p95, goal=0.15),
    ]


# L2


@dataclass(frozen=True, slots=True)
class _Step:
    key: tuple[int, ...]
    device_s: float
    seconds: float
    predicted_device_s: float
    predicted_s: float


def step_figures(runs: Sequence[Sequence[LiveRun]], costs: CostModel) -> tuple[list[Figure], dict[str, Any]]:
    """Steps of live runs that calibrated nothing; `runs` are repeats of each trace. Steps in which the engine's thread
    was held up, and those before it went idle, are left out, for the simulator and for the floor alike."""
    kept: list[list[_Step]] = []
    all_steps = 0
    for repeats in runs:
        for number, run in enumerate(repeats):
            while number >= len(kept):
                kept.append([])
            all_steps += len(run.steps)
            kept[number].extend(_clean_steps(run, costs))
    steps = [step for repeat in kept for step in repeat]
    device_s, predicted_device_s = (
        np.array([getattr(step, name) for step in steps]) for name in ("device_s", "predicted_device_s")
    )
    seconds, predicted_s = (
        np.array([getattr(step, name) for step in steps]) for name in ("seconds", "predicted_s")
    )
    floors = [_floor_of_steps(one, other) for one, other in permutations(kept, 2) if one and other] or [
        (0.0, 0.0)
    ]
    off, bias = (max(abs(floor[place]) for floor in floors) for place in (0, 1))
    figures = [
        Figure(
            level="L2",
            what="steps, mean error (MAPE)",
            value=mean_absolute_relative_error(predicted_s, seconds),
            goal=0.05,
            floor=off,
        ),
        Figure(
            level="L2",
            what="steps, bias",
            value=float((predicted_s / seconds - 1).mean()),
            goal=0.03,
            floor=bias,
        ),
    ]
    details = {
        "steps": all_steps,
        "judged": len(steps),
        "kernels_mape": mean_absolute_relative_error(predicted_device_s, device_s),
        "kernels_bias": float((predicted_device_s / device_s - 1).mean()),
        "kernels_total_error": relative_error(float(predicted_device_s.sum()), float(device_s.sum())),
        "steps_mae_s": mean_absolute_error(predicted_s, seconds),
        "steps_median_error": float(np.median(np.abs(predicted_s / seconds - 1))),
        "steps_p95_error": float(np.quantile(np.abs(predicted_s / seconds - 1), 0.95)),
        "steps_total_error": relative_error(float(predicted_s.sum()), float(seconds.sum())),
        "kernels_share_of_steps": float(device_s.sum() / seconds.sum()),
    }
    return figures, details


def _clean_steps(run: LiveRun, costs: CostModel) -> list[_Step]:
    found: list[_Step] = []
    for step, times in zip(run.steps, run.step_times, strict=True):
        if times.interrupted or times.seconds is None:
            continue
        work = work_of(step.decision)
        features = work.features
        key = (
            features.tokens,
            features.decodes,
            work.sampled,
            features.context_tokens // _CONTEXT_BUCKET_TOKENS,
        )
        device_s = costs.step_s(work)
        found.append(_Step(key, times.device_s, times.seconds, device_s, device_s + costs.host_s(work)))
    return found


def _floor_of_steps(one: Sequence[_Step], other: Sequence[_Step]) -> tuple[float, float]:
    """MAPE and bias of a table that knows nothing but the steps of another repeat, of nearly the same work."""
    known: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for step in other:
        known[step.key].append(step.seconds)
    pairs = [(float(np.mean(known[step.key])), step.seconds) for step in one if step.key in known]
    if not pairs:
        return 0.0, 0.0
    predicted, seconds = np.array(pairs).T
    return mean_absolute_relative_error(predicted, seconds), float((predicted / seconds - 1).mean())


# L3


def request_figures(
    load: float, live: Sequence[Sequence[RequestTimes]], simulated: Requests
) -> tuple[list[Figure], dict[str, Any]]:
    """One load; `live` are repeats, each of all seeds in the order of `simulated`."""
    at = f"{load:.0%}".replace("%", " %")
    statistics: list[tuple[str, Callable[[Requests], float], float]] = [
        ("throughput", _mean_throughput, 0.03),
        ("TPOT P50", _percentile("TPOT", 50), 0.03),
        ("TTFT P50", _percentile("TTFT", 50), 0.05),
        ("TPOT P99", _percentile("TPOT", 99), 0.10),
        ("TTFT P99", _percentile("TTFT", 99), 0.10),
    ]
    figures: list[Figure] = []
    details: dict[str, Any] = {"requests": len(simulated), "repeats": len(live)}
    for name, statistic, goal in statistics:
        values = [statistic(repeat) for repeat in live]
        predicted = statistic(simulated)
        floor = max(
            (abs(relative_error(value, _mean_without(values, place))) for place, value in enumerate(values)),
            default=0.0,
        )
        error = relative_error(predicted, float(np.mean(values)))
        figures.append(Figure(level="L3", what=f"{at}: {name}", value=error, goal=goal, floor=floor))
        details[name] = {"live": values, "simulated": predicted}
    samples = [latencies(repeat) for repeat in live]
    ours = latencies(simulated)
    for name in ("TTFT", "TPOT"):
        everybody = np.concatenate([each[name] for each in samples])
        floor = max(
            ks_distance(samples[place][name], _without(samples, place, name)) for place in range(len(live))
        )
        figures.append(
            Figure(
                level="L3",
                what=f"{at}: {name}, KS distance",
                value=ks_distance(ours[name], everybody),
                goal=0.1,
                floor=floor,
                unit="",
            )
        )
    for name in ("TTFT", "E2E"):
        pairs = [(ours[name], each[name]) for each in samples]
        selves = [(one[name], other[name]) for one, other in permutations(samples, 2)]
        details[f"{name} of each request"] = {
            "mae_s": float(np.mean([mean_absolute_error(*pair) for pair in pairs])),
            "mape": float(np.mean([mean_absolute_relative_error(*pair) for pair in pairs])),
            "floor_mae_s": float(np.mean([mean_absolute_error(*pair) for pair in selves])),
            "floor_mape": float(np.mean([mean_absolute_relative_error(*pair) for pair in selves])),
        }
    return figures, details


def _mean_throughput(requests: Requests) -> float:
    """Of the traces in it, each of which begins anew at 0: they follow each other in the order of arrival."""
    traces: list[list[RequestTimes]] = []
    for one in requests:
        if not traces or one.arrival_s < traces[-1][-1].arrival_s:
            traces.append([])
        traces[-1].append(one)
    return float(np.mean([output_tokens_per_s(trace) for trace in traces]))


def _percentile(name: str, percent: float) -> Callable[[Requests], float]:
    return lambda requests: float(np.percentile(latencies(requests)[name], percent))


def _mean_without(values: Sequence[float], place: int) -> float:
    others = [value for number, value in enumerate(values) if number != place]
    return float(np.mean(others)) if others else values[place]


def _without(samples: Sequence[dict[str, Floats]], place: int, name: str) -> Floats:
    others = [each[name] for number, each in enumerate(samples) if number != place]
    return np.concatenate(others) if others else samples[place][name]


# L4


def ranking_figures(
    names: Sequence[str], live: Sequence[Sequence[Requests]], simulated: Sequence[Requests]
) -> tuple[list[Figure], dict[str, Any]]:
    """Configurations in the order of `names`; `live` are repeats of each. Limits of goodput are twice the medians of
    the first configuration's first repeat."""
    samples = latencies(live[0][0])
    limits = Objectives(
        ttft_s=2 * float(np.median(samples["TTFT"])), tpot_s=2 * float(np.median(samples["TPOT"]))
    )
    figures: list[Figure] = []
    details: dict[str, Any] = {"limits": {"ttft_s": limits.ttft_s, "tpot_s": limits.tpot_s}}
    measures: list[tuple[str, Callable[[Requests], float]]] = [
        ("P90 of E2E", _percentile("E2E", 90)),
        ("goodput", lambda requests: goodput_per_s(requests, limits)),
    ]
    for name, measure in measures:
        repeats = [[measure(run) for run in runs] for runs in zip(*live, strict=True)]
        known = [float(np.mean(values)) for values in zip(*repeats, strict=True)]
        predicted = [measure(run) for run in simulated]
        pairs = list(permutations(repeats, 2))
        tau_floor = min((kendall_tau(one, other) for one, other in pairs), default=1.0)
        figures.append(
            Figure(
                level="L4",
                what=f"ranking by {name}, Kendall's tau",
                value=kendall_tau(known, predicted),
                goal=0.8,
                floor=tau_floor,
                unit="",
                at_least=True,
            )
        )
        if name != "goodput":
            figures.append(
                Figure(
                    level="L4",
                    what=f"regret of the pick by {name}",
                    value=pick_regret(known, predicted),
                    goal=0.05,
                    floor=max((pick_regret(one, other) for one, other in pairs), default=0.0),
                )
            )
        else:
            best = max(known)
            lost = 1 - known[int(np.argmax(predicted))] / best if best else 0.0
            figures.append(Figure(level="L4", what="regret of the pick by goodput", value=lost, goal=0.05))
        details[name] = [
            {
                "configuration": one,
                "live": [repeat[place] for repeat in repeats],
                "simulated": predicted[place],
            }
            for place, one in enumerate(names)
        ]
    return figures, details


def goodput_per_s(requests: Requests, limits: Objectives) -> float:
    """Requests within the limits, over the time from the first arrival to the last token."""
    begin_s = min(one.arrival_s for one in requests)
    length_s = max(one.arrival_s + one.end_s for one in requests) - begin_s
    return sum(limits.met_by(one.first_s, one.end_s, one.tokens, 0.0) for one in requests) / length_s
