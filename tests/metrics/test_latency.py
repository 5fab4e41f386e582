import numpy as np
import pytest

from plait.metrics import Objectives, mean_estimate, normalised_latency_s, percentile_estimate, tpot_s


def test_a_single_token_has_no_time_per_further_token() -> None:
    assert tpot_s(0.5, 0.5, 1) is None
    assert tpot_s(0.5, 1.5, 5) == pytest.approx(0.25)
    assert normalised_latency_s(1.5, 5) == pytest.approx(0.3)


def test_objectives_limit_only_what_they_name() -> None:
    assert Objectives().met_by(100.0, 200.0, 2, 100.0)
    limits = Objectives(ttft_s=1.0, tpot_s=0.1, widest_gap_s=0.5)
    assert limits.met_by(1.0, 1.4, 5, 0.4)
    assert not limits.met_by(1.1, 1.4, 5, 0.4)
    assert not limits.met_by(1.0, 1.6, 5, 0.4)
    assert not limits.met_by(1.0, 1.4, 5, 0.6)
    assert limits.met_by(1.0, 1.0, 1, 0.0)


@pytest.mark.parametrize("count", [40, 5000])
def test_intervals_hold_the_truth_about_as_often_as_they_say(count: int) -> None:
    rng = np.random.default_rng(0)
    held_mean = held_p90 = 0
    runs = 200 if count < 1000 else 100
    for _ in range(runs):
        samples = rng.exponential(1.0, count)
        mean = mean_estimate(samples, rng)
        p90 = percentile_estimate(samples, 90, rng)
        assert mean.low <= mean.value <= mean.high and p90.low <= p90.value <= p90.high
        held_mean += mean.low <= 1.0 <= mean.high
        held_p90 += p90.low <= np.log(10) <= p90.high
    assert 0.85 * runs <= held_mean <= runs
    assert 0.85 * runs <= held_p90 <= runs


def test_a_resampled_percentile_agrees_with_one_of_actual_resamples() -> None:
    rng = np.random.default_rng(1)
    samples = rng.lognormal(0.0, 1.0, 300)
    quick = percentile_estimate(samples, 50, rng)
    medians = np.median(rng.choice(samples, (4000, 300)), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    assert quick.low == pytest.approx(low, rel=0.05) and quick.high == pytest.approx(high, rel=0.05)
