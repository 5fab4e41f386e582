"""The third of the cost models: non-negative least squares on sums over a step.

    seconds = a + b * tokens + c * decodes + d * sum(context) + e * sum(chunk * context) + f * sum(chunk^2)

Six numbers that fit any device with a few measurements, and that extrapolate. Errors are weighed relatively, or the
longest steps would be the only ones that count.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from plait.costs.blend import Curve
from plait.costs.measured import Domain, MeasuredCosts, SpanFacts
from plait.costs.model import HostOverhead
from plait.costs.work import StepWork
from plait.errors import MissingCost

FEATURES = ("1", "tokens", "decodes", "context", "chunk*context", "chunk^2")
_ATTENTION = slice(3, 6)  # of the features: those that count keys
Floats = NDArray[np.float64]


def step_features(work: StepWork) -> tuple[float, ...]:
    """The values of `FEATURES`."""
    features = work.features
    return (
        1.0,
        features.tokens,
        features.decodes,
        features.context_tokens,
        features.chunk_times_context,
        features.chunk_squared,
    )


class RegressionCosts(MeasuredCosts):
    """The `CostModel` of a span, from six coefficients in the order of `FEATURES`.

    They leave the head out, which is a curve over sampled rows; None for a span without it. Work outside of `domain`
    (None: nothing is) is answered like any other, and counted.
    """

    def __init__(
        self,
        coefficients: Sequence[float],
        facts: SpanFacts,
        host: HostOverhead,
        *,
        block_share: float = 1.0,
        head: Curve | None = None,
        domain: Domain | None = None,
    ) -> None:
        if len(coefficients) != len(FEATURES):
            raise MissingCost(f"a regression has {len(FEATURES)} coefficients, not {len(coefficients)}")
        super().__init__(facts, host, block_share=block_share)
        self._coefficients = tuple(coefficients)
        self._head = head
        self._domain = domain

    def step_s(self, work: StepWork) -> float:
        self._extrapolated += self._domain is not None and self._domain.beyond(work) is not None
        return self._seconds(work)

    def attention_s(self, work: StepWork) -> float:
        terms = list(zip(self._coefficients, step_features(work), strict=True))
        return self._block_share * sum(factor * value for factor, value in terms[_ATTENTION])

    def energy_j(self, work: StepWork) -> float:
        return self._facts.power.step_j(self._seconds(work))

    def _seconds(self, work: StepWork) -> float:
        terms = zip(self._coefficients, step_features(work), strict=True)
        seconds = self._block_share * sum(factor * value for factor, value in terms)
        return seconds + self._head.at(work.sampled) if self._head and work.sampled else seconds


def fit_steps(works: Sequence[StepWork], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of measured steps (without their heads), by relative error.

    Raises:
        MissingCost: there are fewer steps than coefficients.
    """
    return _fit([step_features(work) for work in works], seconds)


def fit_host(works: Sequence[StepWork], seconds: Sequence[float]) -> HostOverhead:
    """The host's overhead of measured steps, by relative error.

    Raises:
        MissingCost: there are fewer steps than coefficients.
    """
    rows = [(1.0, work.features.sequences, work.features.tokens, work.sampled) for work in works]
    per_step_s, per_sequence_s, per_token_s, per_sample_s = _fit(rows, seconds)
    return HostOverhead(
        per_step_s=per_step_s,
        per_sequence_s=per_sequence_s,
        per_token_s=per_token_s,
        per_sample_s=per_sample_s,
    )


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 with the least |matrix x - target|: Lawson and Hanson 1974, chapter 23."""
    columns = matrix.shape[1]
    solution, free = np.zeros(columns), np.zeros(columns, dtype=bool)
    tolerance = 1e-12 * float(np.abs(matrix.T @ target).max(initial=1e-300))
    for _ in range(10 * columns):
        gradient = matrix.T @ (target - matrix @ solution)
        if free.all() or gradient[~free].max() <= tolerance:
            break
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        while True:
            trial = np.zeros(columns)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                solution = trial
                break
            # As far towards the unbounded solution as nothing becomes negative; what reaches 0 stays there.
            falling = free & (trial <= 0)
            step = float((solution[falling] / (solution[falling] - trial[falling])).min())
            solution = solution + step * (trial - solution)
            free &= solution > 1e-15 * max(1.0, float(solution.max()))
            solution[~free] = 0.0
    return solution


def _fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    matrix, target = np.array(rows, dtype=float), np.array(seconds, dtype=float)
    measurable = target > 0  # what is too short for the clock says nothing of relative errors
    matrix, target = matrix[measurable], target[measurable]
    if len(target) < matrix.shape[-1]:
        raise MissingCost(
            f"{len(target)} measured steps are too few for {matrix.shape[-1]} coefficients; measure more"
        )
    scale_s, found = target, np.zeros(matrix.shape[-1])
    for _ in range(2):  # then by what is predicted: weights by what was measured prefer what came out short
        weighed = matrix / scale_s[:, None]
        scale = np.maximum(np.abs(weighed).max(axis=0), 1e-300)
        found = non_negative_least_squares(weighed / scale, target / scale_s) / scale
        scale_s = np.maximum(matrix @ found, 1e-3 * target)
    return tuple(found.tolist())
