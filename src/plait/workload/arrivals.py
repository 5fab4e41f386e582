"""When requests arrive.

Every process is a renewal process whose gaps have mean `1 / rate_per_s`; the first request comes after the
first gap. Gaps are drawn independently and are not rescaled afterwards, so a run's rate varies around the one
asked for as that of real traffic does (vLLM's benchmark stretches each run to its exact duration instead).
"""

import math
from dataclasses import dataclass

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


def on_off_arrivals_s(
    count: int, rate_per_s: float, busy_fraction: float, mean_busy_s: float, rng: Generator
) -> NDArray[np.float64]:
    """Silence and bursts: Poisson arrivals during busy periods only, which last `mean_busy_s` on average.

    Busy and silent periods are exponential; the rate within a burst is `rate_per_s / busy_fraction`. Azure's trace of
    code completion is of this kind: 2.57 requests/s, and 73 % of its seconds empty.
    """
    _check(count, rate_per_s)
    if not (0 < busy_fraction < 1 and mean_busy_s > 0):
        raise BadSetup(
            f"busy periods are a fraction of the time between 0 and 1 and last longer than 0 s, not {busy_fraction} "
            f"and {mean_busy_s} s"
        )
    busy_s = poisson_arrivals_s(count, rate_per_s / busy_fraction, rng)  # on a clock that stops in silence
    periods = int(busy_s[-1] / mean_busy_s * 1.1) + 50 if count else 0
    ends_s = np.cumsum(rng.exponential(mean_busy_s, periods))
    while count and ends_s[-1] < busy_s[-1]:
        ends_s = np.concatenate([ends_s, ends_s[-1] + np.cumsum(rng.exponential(mean_busy_s, periods))])
    mean_silent_s = mean_busy_s * (1 - busy_fraction) / busy_fraction
    silent_s = np.cumsum(rng.exponential(mean_silent_s, len(ends_s)))
    begins_silent = rng.random() >= busy_fraction  # as somebody finds it who looks at any time
    before = np.searchsorted(ends_s, busy_s) + begins_silent
    return busy_s + np.concatenate([[0.0], silent_s])[before]


@dataclass(frozen=True, slots=True, kw_only=True)
class DailyRate:
    """A rate that follows the sun: a cosine of `swing` around 1, highest at `peak_s`, times a factor for each weekday.

    Factors count relative to their mean, so that the rate over whole weeks is the one asked for. The trace begins at
    the start of the first day.
    """

    swing: float = 0.5
    peak_s: float = 15 * 3600.0
    weekdays: tuple[float, ...] = (1.0,) * 7
    day_s: float = 86400.0

    def __post_init__(self) -> None:
        if not (0 <= self.swing <= 1 and self.day_s > 0):
            raise BadSetup(
                f"a daily swing is between 0 and 1, not {self.swing}, and a day is longer than 0 s"
            )
        if not self.weekdays or min(self.weekdays) < 0 or not any(self.weekdays):
            raise BadSetup("factors of weekdays are not negative, and not all 0")


def daily_arrivals_s(
    count: int, rate_per_s: float, variation: float, daily: DailyRate, rng: Generator
) -> NDArray[np.float64]:
    """Gamma renewals (see `gamma_arrivals_s`) on a clock that runs as fast as the rate of the hour.

    The mean rate over whole weeks is `rate_per_s`.
    """
    even_s = gamma_arrivals_s(count, rate_per_s, variation, rng)
    if not count:
        return even_s
    week_s = daily.day_s * len(daily.weekdays)
    steps = np.linspace(0.0, week_s, 1440 * len(daily.weekdays) + 1)
    # The integral of the rate over one week, by the trapezoids of its minutes.
    phase = 2 * math.pi * (steps - daily.peak_s) / daily.day_s
    factors = np.asarray(daily.weekdays)[
        np.minimum(steps // daily.day_s, len(daily.weekdays) - 1).astype(int)
    ]
    rates = (1 + daily.swing * np.cos(phase)) * factors
    passed = np.concatenate([[0.0], np.cumsum((rates[1:] + rates[:-1]) / 2)])
    passed *= week_s / passed[-1]
    weeks, rest_s = np.divmod(even_s, week_s)
    return weeks * week_s + np.interp(rest_s, passed, steps)


def _check(count: int, rate_per_s: float) -> None:
    if count < 0:
        raise BadSetup(f"a number of requests cannot be negative: {count}")
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise BadSetup(f"a request rate must be a positive number of requests per second, not {rate_per_s}")
