"""What turns seconds of a grid into those of an engine: three factors, and a constant for each step.

In a grid every pass is one operation's, over memory of its own, and others of its shape went before it. In an engine
prompts and decoding sequences share a pass, keys lie where blocks were free, and between two passes the host runs, so
that a part of the weights has to come from further away again: the same for small steps and large ones. All that is a
matter of the machine and not of the step. It is fitted to some of an engine's steps, and others judge it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.costs.regression import non_negative_least_squares
from plait.costs.tables import StepParts

_PRIOR_STEPS = 0.05
"""What 1 is worth beside steps that are all of one kind: steps scatter by some 5 %, factors by some 20, and the square
of that is this. A kind of work that hardly occurred keeps its 1."""
_MOST = 2.0
_DISTURBED = 4.0  # times the median error, at least a few hundredths
_LEAST_ERROR = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFactors:
    """What an engine takes over what the grid says; `dense` is of everything but attention. `per_step_s` is of all
    blocks of the model."""

    dense: float = 1.0
    prefill: float = 1.0
    decode: float = 1.0
    per_step_s: float = 0.0


def fit_live_factors(parts: Sequence[StepParts], seconds: Sequence[float]) -> LiveFactors:
    """Factors of steps whose parts by tables, and whose seconds in the engine, are these; by relative error.

    Steps that are far from all others were disturbed and are left out of a second fit.
    """
    if not parts:
        return LiveFactors()
    measured = np.array(seconds, dtype=float)
    unit_s = float(np.median(measured))
    rows = np.array([(each.dense_s, each.prefill_s, each.decode_s, unit_s) for each in parts])
    # Weighed by what is predicted: weights by what was measured would prefer the steps that came out short.
    found = _solve(rows, measured, rows[:, :3].sum(axis=1))
    predicted = rows @ found
    errors = np.abs(measured / predicted - 1.0)
    calm = errors <= _DISTURBED * max(float(np.median(errors)), _LEAST_ERROR)
    dense, prefill, decode, constant = _solve(rows[calm], measured[calm], predicted[calm]).tolist()
    return LiveFactors(
        dense=_bounded(dense),
        prefill=_bounded(prefill),
        decode=_bounded(decode),
        per_step_s=min(constant, _MOST) * unit_s,
    )


def _solve(
    rows: NDArray[np.float64], measured: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Factors near 1 and a constant, none negative; errors count in parts of `scale`."""
    prior = _PRIOR_STEPS**0.5 * np.eye(4)[:3]
    matrix = np.concatenate([rows / scale[:, None], prior])
    return non_negative_least_squares(matrix, np.concatenate([measured / scale, prior.sum(axis=1)]))


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / _MOST), _MOST)
