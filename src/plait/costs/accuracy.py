"""How far predictions are from measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.errors import MissingCost


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionErrors:
    """Of `count` predictions: relative errors, as fractions of what was measured.

    `bias` keeps the sign (above 0: predicted too long). `log_spread` is the standard deviation of
    log(measured / predicted), which `NoisyCosts` draws from.
    """

    count: int
    median: float
    p95: float
    mean: float
    bias: float
    log_spread: float


def prediction_errors(predicted_s: Sequence[float], measured_s: Sequence[float]) -> PredictionErrors:
    """Compare; the two are in the same order.

    Raises:
        MissingCost: there is nothing to compare.
    """
    if not measured_s:
        raise MissingCost("there are no measurements to compare predictions with")
    predicted, measured = np.asarray(predicted_s, dtype=float), np.asarray(measured_s, dtype=float)
    signed = predicted / measured - 1.0
    off = np.abs(signed)
    return PredictionErrors(
        count=len(measured),
        median=float(np.median(off)),
        p95=float(np.quantile(off, 0.95)),
        mean=float(off.mean()),
        bias=float(signed.mean()),
        log_spread=float(np.log(measured / np.maximum(predicted, 1e-300)).std()),
    )
