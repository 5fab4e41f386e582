"""Three factors that turn seconds of a grid into those of an engine.

In a grid every pass is one operation's, over memory of its own. In an engine prompts and decoding sequences share a
pass, keys lie where blocks were free, and caches hold what the step before left. That is a matter of the machine and
not of the step, so one factor for each kind of table says it; they are fitted to some of an engine's steps, and others
judge them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.costs.tables import StepParts

_PRIOR_STEPS = 0.05
"""What 1 is worth beside steps that are all of one kind: steps scatter by some 5 %, factors by some 20, and the square
of that is this. A kind of work that hardly occurred keeps its 1."""
_MOST = 2.0
_DISTURBED = 4.0  # times the median error, at least a few hundredths
_LEAST_ERROR = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFactors:
    """What an engine takes over what the grid says; `dense` is of everything but attention."""

    dense: float = 1.0
    prefill: float = 1.0
    decode: float = 1.0


def fit_live_factors(parts: Sequence[StepParts], seconds: Sequence[float]) -> LiveFactors:
    """Factors of steps whose parts by tables, and whose seconds in the engine, are these; by relative error.

    Steps that are far from all others were disturbed and are left out of a second fit.
    """
    if not parts:
        return LiveFactors()
    measured = np.array(seconds, dtype=float)
    rows = np.array([(each.dense_s, each.prefill_s, each.decode_s) for each in parts]) / measured[:, None]
    found = _ridge(rows)
    errors = np.abs(rows @ found - 1.0)
    calm = errors <= _DISTURBED * max(float(np.median(errors)), _LEAST_ERROR)
    dense, prefill, decode = np.clip(_ridge(rows[calm]), 1 / _MOST, _MOST).tolist()
    return LiveFactors(dense=dense, prefill=prefill, decode=decode)


def _ridge(rows: np.ndarray) -> np.ndarray:
    prior = _PRIOR_STEPS**0.5 * np.eye(rows.shape[1])
    matrix = np.concatenate([rows, prior])
    target = np.concatenate([np.ones(len(rows)), prior.sum(axis=1)])
    return np.linalg.lstsq(matrix, target, rcond=None)[0]
