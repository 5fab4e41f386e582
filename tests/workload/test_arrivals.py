import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import (
    all_at_once_s,
    arrival_times_s,
    constant_arrivals_s,
    gamma_arrivals_s,
    poisson_arrivals_s,
)

COUNT = 50_000


@pytest.mark.parametrize("variation", [0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_they_were_asked_for(variation: float) -> None:
    gaps_s = np.diff(gamma_arrivals_s(COUNT, 4.0, variation, np.random.default_rng(1)))
    # Four standard errors of the mean of COUNT gaps.
    assert gaps_s.mean() == pytest.approx(0.25, rel=4 * variation / COUNT**0.5)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(variation, rel=0.05)


def test_a_poisson_process_counts_with_a_variance_equal_to_its_mean() -> None:
    arrivals_s = poisson_arrivals_s(COUNT, 10.0, np.random.default_rng(2))
    per_second = np.bincount(arrivals_s.astype(int))[:-1]
    assert per_second.mean() == pytest.approx(10.0, rel=0.03)
    assert per_second.var() / per_second.mean() == pytest.approx(1.0, rel=0.1)


@given(
    count=st.integers(0, 50),
    rate_per_s=st.floats(1e-3, 1e4),
    burstiness=st.floats(0.05, 50),
    seed=st.integers(0, 100),
)
def test_arrivals_ascend_from_zero_and_repeat_with_the_seed(
    count: int, rate_per_s: float, burstiness: float, seed: int
) -> None:
    arrivals_s = arrival_times_s(count, rate_per_s, burstiness, np.random.default_rng(seed))
    again_s = arrival_times_s(count, rate_per_s, burstiness, np.random.default_rng(seed))
    assert len(arrivals_s) == count
    assert (np.diff(arrivals_s, prepend=0.0) >= 0).all()
    assert (arrivals_s == again_s).all()


def test_burstiness_is_the_shape_of_the_gaps_as_in_vllm() -> None:
    gaps_s = np.diff(arrival_times_s(COUNT, 2.0, 0.25, np.random.default_rng(3)))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(2.0, rel=0.05)


def test_an_infinite_rate_sends_all_at_once_and_infinite_burstiness_is_a_metronome() -> None:
    rng = np.random.default_rng(4)
    assert (arrival_times_s(5, float("inf"), 1.0, rng) == all_at_once_s(5)).all()
    assert (arrival_times_s(5, 2.0, float("inf"), rng) == constant_arrivals_s(5, 2.0)).all()
    assert constant_arrivals_s(3, 2.0).tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize(("rate_per_s", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -2.0)])
def test_a_rate_or_burstiness_that_is_not_positive_is_refused(rate_per_s: float, burstiness: float) -> None:
    with pytest.raises(BadSetup, match="positive"):
        arrival_times_s(3, rate_per_s, burstiness, np.random.default_rng(0))
