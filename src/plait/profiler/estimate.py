"""Seconds of an operation from several repeats on a machine that others use too.

By the wall's clock, those repeats count in which the process was interrupted least, and their median. By the
processor's clock (one thread), the whole of a pass is known well however often it was interrupted, and a part that is
short was left alone in most repeats, so that its lower quartile on the wall is right. A part that is long is what the
others leave of the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plait.costs import Curve
from plait.profiler.stopwatch import Clock

_LEFT_ALONE_S = 0.0015
"""A part as short as this is rarely interrupted: the smallest slice of a Linux scheduler is 0.7 to 3 ms."""


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
    """Of whole passes."""
    chosen = repeats if clock == "cpu" else calmest(repeats)
    return _middle([repeat.whole_s for repeat in chosen])


def estimate_part(
    repeats: Sequence[Repeat], part: str, clock: Clock, *, dense_s: float | None = None
) -> Estimate:
    """Of one part; `dense_s` is what the `dense` part of these passes takes, where that is known."""
    if clock == "wall" or len(repeats[0].parts) == 1:
        chosen = repeats if clock == "cpu" else calmest(repeats)
        return _middle([repeat.parts[part] for repeat in chosen])
    short = _left_alone_s(repeats, part)
    if short is not None:
        return Estimate(short, _middle([repeat.parts[part] for repeat in calmest(repeats)]).spread_fraction)
    whole = estimate_whole(repeats, clock)
    others_s = 0.0
    for other in repeats[0].parts:
        if other == part:
            continue
        other_s = _left_alone_s(repeats, other)
        if other_s is None:
            other_s = dense_s if other == "dense" and dense_s is not None else _share_s(repeats, other, whole)
        others_s += other_s
    # What is left cannot be less than nothing, nor more than the fastest that was seen.
    most_s = min(repeat.parts[part] for repeat in repeats)
    seconds = min(max(whole.seconds - others_s, 0.1 * most_s), most_s)
    return Estimate(seconds, whole.spread_fraction * whole.seconds / seconds)


def dense_curve(dense: Mapping[int, Estimate]) -> Curve:
    """The dense part over tokens."""
    places = sorted(dense)
    return Curve(tuple(map(float, places)), tuple(dense[place].seconds for place in places))


def calmest(repeats: Sequence[Repeat]) -> Sequence[Repeat]:
    """Those that were interrupted as little as the better half."""
    most = sorted(repeat.interruptions for repeat in repeats)[(len(repeats) - 1) // 2]
    return [repeat for repeat in repeats if repeat.interruptions <= most]


def _left_alone_s(repeats: Sequence[Repeat], part: str) -> float | None:
    """Seconds of a part that is short enough to have been left alone in most repeats; None for longer ones."""
    low = float(np.quantile([repeat.parts[part] for repeat in repeats], 0.25))
    return low if low <= _LEFT_ALONE_S else None


def _share_s(repeats: Sequence[Repeat], part: str, whole: Estimate) -> float:
    """Of passes so long that all parts were interrupted alike."""
    on_the_wall_s = sum(sum(repeat.parts.values()) for repeat in repeats)
    return whole.seconds * sum(repeat.parts[part] for repeat in repeats) / on_the_wall_s


def _middle(values: Sequence[float]) -> Estimate:
    low, middle, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75)).tolist()
    return Estimate(middle, (high - low) / 2 / middle if middle > 0 else 0.0)
