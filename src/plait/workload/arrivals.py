"""When requests arrive.

Every process is a renewal process whose gaps have mean `1 / rate_per_s`; the first request comes after the
first gap. Gaps are drawn independently and are not rescaled afterwards, so a run's rate varies around the one
asked for as that of real traffic does (vLLM's benchmark stretches each run to its exact duration instead).
"""

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from plait.errors import BadSetup


def arrival_times_s(count: int, rate_per_s: float, burstiness: float, rng: Generator) -> NDArray[np.float64]:
    """Arrival times of `count` requests, ascending, by the two numbers that vLLM's benchmark uses.

    An infinite rate sends all at once. `burstiness` is the shape of gamma-distributed gaps: 1 is a Poisson
    process, below 1 is burstier, above 1 more regular, infinite constant.

    Raises:
        BadSetup: a rate or burstiness that is not positive.
    """
    if math.isinf(rate_per_s) and rate_per_s > 0:
        return all_at_once_s(count)
    if math.isinf(burstiness) and burstiness > 0:
        return constant_arrivals_s(count, rate_per_s)
    if not burstiness > 0:
        raise BadSetup(f"burstiness must be positive (1 is a Poisson process), not {burstiness}")
    return gamma_arrivals_s(count, rate_per_s, burstiness**-0.5, rng)


def poisson_arrivals_s(count: int, rate_per_s: float, rng: Generator) -> NDArray[np.float64]:
    """Independent users: exponential gaps."""
    return gamma_arrivals_s(count, rate_per_s, 1.0, rng)


def gamma_arrivals_s(count: int, rate_per_s: float, variation: float, rng: Generator) -> NDArray[np.float64]:
    """Bursts: gamma-distributed gaps whose standard deviation is `variation` times their mean."""
    _check(count, rate_per_s)
    if not (variation > 0 and math.isfinite(variation)):
        raise BadSetup(f"the variation of arrival gaps must be positive, not {variation}")
    shape = variation**-2
    return np.cumsum(rng.gamma(shape, 1.0 / (shape * rate_per_s), size=count))


def constant_arrivals_s(count: int, rate_per_s: float) -> NDArray[np.float64]:
    """A metronome: equal gaps."""
    _check(count, rate_per_s)
    return np.arange(1, count + 1, dtype=np.float64) / rate_per_s


def all_at_once_s(count: int) -> NDArray[np.float64]:
    """A batch job: everything at time 0."""
    _check(count, 1.0)
    return np.zeros(count)


def _check(count: int, rate_per_s: float) -> None:
    if count < 0:
        raise BadSetup(f"a number of requests cannot be negative: {count}")
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise BadSetup(f"a request rate must be a positive number of requests per second, not {rate_per_s}")
