"""Seconds of an operation from several repeats on a machine that others use too.

By the wall's clock, those repeats count in which the process was interrupted least, and their median. By the
processor's clock (one thread), the whole of a pass is known well however often it was interrupted, but its parts are
timed on the wall. A short part that was left alone at least twice has two fastest repeats that agree; a large part is
what the others leave of the whole; and whoever measures goes on for a while with those that are neither (`settled`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plait.costs import Curve
from plait.profiler.stopwatch import Clock

_AGREE_FRACTION = 0.05
_CLEAN_FRACTION = 0.1
"""Repeats so close to the fastest were left alone: an interruption costs milliseconds."""
_SHORT_S = 0.006
"""What takes longer is never left alone on a busy machine: repeats that agree were interrupted equally often."""
_LARGE_FRACTION = 0.1
"""From this part of the whole on, an error of the whole by a hundredth is one of the part by at most ten."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """One pass: the whole by the chosen clock, its parts on the wall, and how often it was interrupted."""

    whole_s: float
    parts: Mapping[str, float]
    interruptions: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, and half the distance between the quartiles of the repeats over them; rounded to what they are worth."""

    seconds: float
    spread_fraction: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", float(f"{self.seconds:.5g}"))
        object.__setattr__(self, "spread_fraction", float(f"{self.spread_fraction:.3g}"))


def estimate_whole(repeats: Sequence[Repeat], clock: Clock) -> Estimate:
    """Of whole passes. By processor time the lower quartile: neighbours only ever make a pass longer."""
    if clock == "wall":
        return _middle([repeat.whole_s for repeat in calmest(repeats)])
    values = [repeat.whole_s for repeat in repeats]
    return Estimate(float(np.quantile(values, 0.25)), _middle(values).spread_fraction)


def estimate_part(
    repeats: Sequence[Repeat], part: str, clock: Clock, *, dense_s: float | None = None
) -> Estimate:
    """Of one part; `dense_s` is what the `dense` part of these passes takes, where that is known."""
    if clock == "wall" or len(repeats[0].parts) == 1:
        chosen = repeats if clock == "cpu" else calmest(repeats)
        return _middle([repeat.parts[part] for repeat in chosen])
    clean = _left_alone(repeats, part)
    if clean is not None:
        return clean
    fastest_s = min(repeat.parts[part] for repeat in repeats)
    whole = estimate_whole(repeats, clock)
    if fastest_s < _LARGE_FRACTION * whole.seconds:
        return Estimate(fastest_s, _middle([repeat.parts[part] for repeat in repeats]).spread_fraction)
    others_s = 0.0
    for other in repeats[0].parts:
        if other == part:
            continue
        alone = _left_alone(repeats, other)
        if alone is not None:
            others_s += alone.seconds
        elif other == "dense" and dense_s is not None:
            others_s += dense_s
        else:
            others_s += min(_share_s(repeats, other, whole), min(repeat.parts[other] for repeat in repeats))
    seconds = min(max(whole.seconds - others_s, 1e-9), fastest_s)
    return Estimate(seconds, whole.spread_fraction * whole.seconds / seconds)


def settled(repeats: Sequence[Repeat], part: str, clock: Clock) -> bool:
    """Whether more repeats would hardly change the estimate of a part."""
    if clock == "wall" or len(repeats[0].parts) == 1 or _left_alone(repeats, part) is not None:
        return True
    fastest_s = min(repeat.parts[part] for repeat in repeats)
    return fastest_s >= _LARGE_FRACTION * estimate_whole(repeats, clock).seconds


def dense_curve(dense: Mapping[int, Estimate]) -> Curve:
    """The dense part over tokens."""
    places = sorted(dense)
    return Curve(tuple(map(float, places)), tuple(dense[place].seconds for place in places))


def calmest(repeats: Sequence[Repeat]) -> Sequence[Repeat]:
    """Those that were interrupted as little as the better half."""
    most = sorted(repeat.interruptions for repeat in repeats)[(len(repeats) - 1) // 2]
    return [repeat for repeat in repeats if repeat.interruptions <= most]


def _left_alone(repeats: Sequence[Repeat], part: str) -> Estimate | None:
    """What the repeats agree on that were left alone; None if fewer than two were."""
    walls = sorted(repeat.parts[part] for repeat in repeats)
    if len(walls) < 2 or walls[0] > _SHORT_S or walls[1] > (1 + _AGREE_FRACTION) * walls[0]:
        return None
    return _middle([wall for wall in walls if wall <= (1 + _CLEAN_FRACTION) * walls[0]])


def _share_s(repeats: Sequence[Repeat], part: str, whole: Estimate) -> float:
    """Of passes so long that all parts were interrupted alike."""
    on_the_wall_s = sum(sum(repeat.parts.values()) for repeat in repeats)
    return whole.seconds * sum(repeat.parts[part] for repeat in repeats) / on_the_wall_s


def _middle(values: Sequence[float]) -> Estimate:
    low, middle, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75)).tolist()
    return Estimate(middle, (high - low) / 2 / middle if middle > 0 else 0.0)
