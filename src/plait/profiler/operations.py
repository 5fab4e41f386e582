"""The passes of a grid, timed, as samples of operations; and the tables and the regression made of them.

Rounds over the whole grid follow each other, so that a disturbance of seconds spoils one repeat of many points and not
all repeats of one. How seconds are made of repeats is in `estimate.py`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from plait.costs import (
    OperationSample,
    OperationTables,
    PredictionErrors,
    StepWork,
    fit_steps,
    predict,
    prediction_errors,
    tables_of,
)
from plait.profiler.estimate import Estimate, Repeat, dense_curve, estimate_part, estimate_whole, settled
from plait.profiler.grid import GridPoint, ProfileGrid
from plait.profiler.stopwatch import Clock, PassMaker

Progress = Callable[[int, int], None]
_PART = {"dense": "dense", "head": "head", "prefill": "attention", "decode": "attention"}
_MORE_ROUNDS = 2  # for each repeat
_PAUSE_S = 0.004  # before a pass: who has just slept is left alone for a while
_WARM_PASSES = 4
_WARM_S = 0.02
"""An engine's steps follow each other: a pass that comes after a sleep, or after one of another shape, finds caches
without the weights, and of a small model takes twice as long. So others of its shape go before it, long enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPass:
    """Whole passes of one shape: seconds, without the head."""

    work: StepWork
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredOperations:
    """What came of a grid: samples with the predictions of their held-out points, tables, coefficients."""

    samples: tuple[OperationSample, ...]
    tables: OperationTables
    regression: tuple[float, ...]
    errors: dict[str, PredictionErrors]


def measure_operations(
    maker: PassMaker,
    grid: ProfileGrid,
    *,
    tells_operations: bool,
    clock: Clock,
    repeats: int,
    rng: np.random.Generator,
    on_progress: Progress | None = None,
) -> MeasuredOperations:
    """Measure all points of a grid, and fit."""
    points = grid.points()
    taken = [list[Repeat]() for _ in points]
    rounds = (
        1 + repeats + _MORE_ROUNDS * repeats
    )  # the first one warms up, the last ones are for what is disturbed
    for number in range(rounds):
        disturbed = [
            index
            for index, point in enumerate(points)
            if number <= repeats or not settled(taken[index], _PART[point.operation], clock)
        ]
        for place, index in enumerate(map(int, rng.permutation(disturbed))):
            time.sleep(_PAUSE_S)
            repeat = _measure_warm(maker, points[index], grid, tells_operations)
            if number:
                taken[index].append(repeat)
            if on_progress is not None:
                on_progress(number * len(points) + place + 1, rounds * len(points))
    dense = {
        point.place: estimate_part(repeated, "dense", clock)
        for point, repeated in zip(points, taken, strict=True)
        if point.operation == "dense"
    }
    curve = dense_curve(dense)
    samples, passes = list[OperationSample](), list[MeasuredPass]()
    for point, repeated in zip(points, taken, strict=True):
        tokens = sum(new for new, _ in _sequences(point, grid))
        known: Estimate = (
            dense[point.place]
            if point.operation == "dense"
            else estimate_part(repeated, _PART[point.operation], clock, dense_s=curve.at(tokens))
        )
        samples.append(
            OperationSample(
                operation=point.operation,
                row=point.row,
                place=point.place,
                seconds=known.seconds,
                spread_fraction=known.spread_fraction,
                held_out=point.held_out,
            )
        )
        if point.operation != "head" and not point.held_out:
            work = StepWork.of(_sequences(point, grid), sampled=0)
            passes.append(MeasuredPass(work=work, seconds=estimate_whole(repeated, clock).seconds))
    return _fit(samples, passes, grid.most_context_tokens)


def _fit(
    samples: Sequence[OperationSample], passes: Sequence[MeasuredPass], most_context_tokens: int
) -> MeasuredOperations:
    shown = tables_of(samples, most_context_tokens, use_held_out=False)
    judged = tuple(
        replace(sample, predicted_s=predict(shown, sample)) if sample.held_out else sample
        for sample in samples
    )
    errors: dict[str, PredictionErrors] = {}
    for operation in ("dense", "head", "prefill", "decode"):
        held_out = [each for each in judged if each.operation == operation and each.held_out]
        if held_out:
            errors[operation] = _errors(held_out)
    errors["operations"] = _errors([sample for sample in judged if sample.held_out])
    return MeasuredOperations(
        samples=judged,
        tables=tables_of(samples, most_context_tokens),
        regression=fit_steps([each.work for each in passes], [each.seconds for each in passes]),
        errors=errors,
    )


def _errors(held_out: Sequence[OperationSample]) -> PredictionErrors:
    return prediction_errors(
        [sample.predicted_s or 0.0 for sample in held_out], [sample.seconds for sample in held_out]
    )


def _sequences(point: GridPoint, grid: ProfileGrid) -> list[tuple[int, int]]:
    match point.operation:
        case "dense":  # short ones: attention is next to nothing
            whole, rest = divmod(point.place, grid.block_tokens)
            return [(grid.block_tokens, 0)] * whole + [(rest, 0)] * (rest > 0)
        case "head":
            return [(1, 0)] * point.place
        case "prefill":
            return [(point.row, point.place)]
        case "decode":
            return [(1, point.place)] * point.row


def _measure_warm(maker: PassMaker, point: GridPoint, grid: ProfileGrid, tells_operations: bool) -> Repeat:
    """One repeat of a point, in caches as an engine leaves them."""
    began_s = time.perf_counter()
    for _ in range(_WARM_PASSES):
        _measure(maker, point, grid, tells_operations)
        if time.perf_counter() - began_s > _WARM_S:
            break
    return _measure(maker, point, grid, tells_operations)


def _measure(maker: PassMaker, point: GridPoint, grid: ProfileGrid, tells_operations: bool) -> Repeat:
    """One repeat of a point."""
    sequences = _sequences(point, grid)
    sampled = point.place if point.operation == "head" else 0
    if tells_operations:
        times = maker.run(sequences, sampled)
        return Repeat(whole_s=times.device_s, parts=times.parts, interruptions=times.interruptions)
    # Tokens that attend to nothing but themselves are everything but attention; a difference is the rest.
    alone = maker.run([(1, 0)] * sum(new for new, _ in sequences), 0)
    if point.operation == "dense":
        return Repeat(alone.device_s, {"dense": alone.device_s}, alone.interruptions)
    whole = maker.run(sequences, sampled)
    difference_s = max(whole.device_s - alone.device_s, 1e-9)
    interruptions = alone.interruptions + whole.interruptions
    return Repeat(whole.device_s, {_PART[point.operation]: difference_s}, interruptions)
