"""How far two sets of measurements agree: a prediction with what happened, or one run with the same run again.

relative error       (predicted - measured) / measured, with its sign
MAPE, MAE            means of absolute errors, relative and in the unit of what is measured
KS distance          the largest difference of the two shares that are at most x, over all x
Kendall's tau (b)    agreement of two rankings, from -1 to 1; pairs that are equal in one of them count half
regret               what choosing by the prediction costs, over what the best choice would have
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = Sequence[float] | NDArray[np.float64]


def relative_error(predicted: float, measured: float) -> float:
    """Signed, as a fraction of what was measured; 0 where both are 0."""
    return (predicted - measured) / measured if measured else (0.0 if predicted == measured else np.inf)


def mean_absolute_error(predicted: Floats, measured: Floats) -> float:
    """Of pairs in the same order, at least one."""
    return float(np.abs(np.asarray(predicted) - np.asarray(measured)).mean())


def mean_absolute_relative_error(predicted: Floats, measured: Floats) -> float:
    """MAPE, as a fraction, of pairs in the same order, at least one; nothing measured may be 0."""
    return float(np.abs(np.asarray(predicted) / np.asarray(measured) - 1.0).mean())


def ks_distance(samples: Floats, others: Floats) -> float:
    """The Kolmogorov-Smirnov statistic of two samples, each of at least one value."""
    first, second = np.sort(np.asarray(samples)), np.sort(np.asarray(others))
    places = np.concatenate([first, second])
    shares = np.searchsorted(first, places, "right") / len(first)
    return float(np.abs(shares - np.searchsorted(second, places, "right") / len(second)).max())


def kendall_tau(values: Floats, others: Floats) -> float:
    """Tau-b of two lists about the same things, of at least two; 0 where one of them cannot tell any two apart.

    Kendall 1945, section 3.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    row, column = np.triu_indices(len(first), 1)
    signs = np.sign(first[row] - first[column])
    other_signs = np.sign(second[row] - second[column])
    told_apart = float(np.abs(signs).sum()) * float(np.abs(other_signs).sum())
    return float((signs * other_signs).sum()) / told_apart**0.5 if told_apart else 0.0


def pick_regret(measured: Floats, predicted: Floats) -> float:
    """Of costs (lower is better): how much more than the best the one that is predicted best costs, as a fraction."""
    costs = np.asarray(measured, dtype=np.float64)
    return float(costs[int(np.argmin(np.asarray(predicted)))] / costs.min() - 1.0)
