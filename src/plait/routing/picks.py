"""Which chain of a front: latency, throughput, a limit, or a point between."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.errors import BadRequest
from plait.routing.graph import Floats


@dataclass(frozen=True, slots=True)
class LatencyFirst:
    """Least of the first objective."""


@dataclass(frozen=True, slots=True)
class ThroughputFirst:
    """Least of the second objective (the greatest rate, where that is the rate)."""


@dataclass(frozen=True, slots=True)
class Balanced:
    """Nearest to the ideal point by the weighted Chebyshev distance; no weights are equal ones."""

    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """Best in the second objective among those whose first is within a limit (seconds, for the objectives of the
    study)."""

    limit: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """Any of them, at random, so that clients which choose at once spread out."""


Pick = LatencyFirst | ThroughputFirst | Balanced | Budget | Sampled


def parse_pick(text: str) -> Pick:
    """Read `balanced`, `latency-first`, `throughput-first`, `sampled`, `budget=0.4` or `weights=0.7,0.3`.

    Raises:
        BadRequest: it is none of these, or its numbers make no sense.
    """
    name, _, argument = text.partition("=")
    try:
        numbers = tuple(float(number) for number in argument.split(",")) if argument else ()
    except ValueError:
        raise BadRequest(f"{argument!r} are no numbers, in route pick {text!r}", param="route") from None
    if any(not 0 <= number < np.inf for number in numbers):
        raise BadRequest(f"numbers must be finite and at least 0, in route pick {text!r}", param="route")
    match name, numbers:
        case "latency-first", ():
            return LatencyFirst()
        case "throughput-first", ():
            return ThroughputFirst()
        case "balanced", ():
            return Balanced()
        case "sampled", ():
            return Sampled()
        case "budget", (limit,):
            return Budget(limit)
        case "weights", (_, _, *_) if sum(numbers) > 0:
            return Balanced(numbers)
        case _:
            raise BadRequest(
                f"route pick {text!r} is unknown; write balanced, latency-first, throughput-first, sampled, "
                "budget=SECONDS or weights=A,B",
                param="route",
            )


def pick_member(
    costs: Floats, tie_breaks: Sequence[tuple[object, ...]], pick: Pick, rng: np.random.Generator
) -> tuple[int, str]:
    """Choose a row of [members, objectives], all minimised, and say why.

    Ties go to the member whose entry of `tie_breaks` is the least. Objectives are compared as shares of the front's
    extent.

    Raises:
        BadRequest: the number of weights is not that of the objectives.
    """
    count, objectives = costs.shape
    if isinstance(pick, Balanced) and pick.weights and len(pick.weights) != objectives:
        raise BadRequest(f"{len(pick.weights)} weights for {objectives} objectives", param="route")
    if count == 1:
        return 0, "the front has one chain"
    match pick:
        case LatencyFirst():
            scores, why = costs[:, 0], "least of the first objective"
        case ThroughputFirst():
            scores, why = costs[:, 1], "best in the second objective"
        case Sampled():
            return int(rng.integers(count)), "drawn from the front"
        case Budget(limit):
            within = costs[:, 0] <= limit
            if within.any():
                scores = np.where(within, costs[:, 1], np.inf)
                why = f"best in the second objective within {limit:g}"
            else:
                scores, why = costs[:, 0], f"no chain is within {limit:g}: the least of the first objective"
        case Balanced(weights):
            extent = np.ptp(costs, axis=0)
            shares = (costs - costs.min(axis=0)) / np.where(extent > 0, extent, 1.0)
            used = np.array(weights) if weights else np.ones(objectives)
            scores = (shares * used / used.sum()).max(axis=1)
            why = "nearest to the best of each objective"
    best = [row for row in range(count) if scores[row] == scores.min()]
    return min(best, key=lambda row: tie_breaks[row]), why
