"""What the words about a request's times mean, and what samples of them say: one definition for all that measure.

With arrival a, first token f, last token e and N tokens, all as the client sees them:

    TTFT                 f - a, queueing included
    ITL                  the gaps between tokens, pooled over requests
    TPOT                 (e - f) / (N - 1) of a request; none for N = 1
    E2E                  e - a
    normalised latency   (e - a) / N
    stall                a gap above a limit
    attainment           share of the offered requests within all limits; those refused or failed are not
    goodput              requests within all limits, per second
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_FEW = 2000


def tpot_s(first_s: float, end_s: float, tokens: int) -> float | None:
    """Time per output token after the first; None if there is only one."""
    return (end_s - first_s) / (tokens - 1) if tokens > 1 else None


def normalised_latency_s(end_s: float, tokens: int) -> float:
    """Time per token from arrival to end: Yu et al. 2022 (ORCA), section 6."""
    return end_s / tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Limits that a good request stays within; None does not limit. `widest_gap_s` limits every gap between tokens."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    widest_gap_s: float | None = None

    def met_by(self, first_s: float, end_s: float, tokens: int, widest_gap_s: float) -> bool:
        """Whether a request that got all its tokens was good; times count from its arrival."""
        each = tpot_s(first_s, end_s, tokens)
        return (
            (self.ttft_s is None or first_s <= self.ttft_s)
            and (self.tpot_s is None or each is None or each <= self.tpot_s)
            and (self.widest_gap_s is None or widest_gap_s <= self.widest_gap_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A statistic of samples, and the interval that holds 95 of 100 of its bootstrap resamples."""

    value: float
    low: float
    high: float


def mean_estimate(samples: Sequence[float] | NDArray[np.float64], rng: np.random.Generator) -> Estimate:
    """The mean of at least one sample. Of more than a few thousand, resampled means are normal, and are taken to be."""
    values = np.asarray(samples, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count <= _FEW:
        means = values[rng.integers(0, count, (_RESAMPLES, count))].mean(axis=1)
    else:
        means = rng.normal(mean, float(values.std()) / count**0.5, _RESAMPLES)
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(value=mean, low=float(low), high=float(high))


def percentile_estimate(
    samples: Sequence[float] | NDArray[np.float64], percent: float, rng: np.random.Generator
) -> Estimate:
    """A percentile of at least one sample.

    The k-th smallest of n resampled values is the sample at rank n * U, where U is the k-th smallest of n uniform
    numbers, which is Beta(k, n + 1 - k): so a resampled percentile is one draw and no sort.
    """
    values = np.sort(np.asarray(samples, dtype=np.float64))
    count = len(values)
    rank = min(max(round(percent / 100 * (count - 1)) + 1, 1), count)
    places = (count * rng.beta(rank, count + 1 - rank, _RESAMPLES)).astype(np.intp)
    drawn = values[np.minimum(places, count - 1)]
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(value=float(np.percentile(values, percent)), low=float(low), high=float(high))
