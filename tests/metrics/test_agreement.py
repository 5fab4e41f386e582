"""Statistics of agreement, on examples worked out by hand."""

import math

import pytest

from plait.metrics import (
    kendall_tau,
    ks_distance,
    mean_absolute_error,
    mean_absolute_relative_error,
    pick_regret,
    relative_error,
)


def test_relative_errors_keep_their_sign() -> None:
    assert relative_error(11.0, 10.0) == pytest.approx(0.1)
    assert relative_error(9.0, 10.0) == pytest.approx(-0.1)
    assert relative_error(0.0, 0.0) == 0.0
    assert math.isinf(relative_error(1.0, 0.0))


def test_mean_errors_of_pairs() -> None:
    # errors 1 and 2 in the unit; 1/10 and 2/40 relative
    assert mean_absolute_error([11.0, 38.0], [10.0, 40.0]) == pytest.approx(1.5)
    assert mean_absolute_relative_error([11.0, 38.0], [10.0, 40.0]) == pytest.approx(0.075)


def test_ks_distance_is_the_widest_gap_of_the_shares() -> None:
    assert ks_distance([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.0
    assert ks_distance([1.0, 2.0], [3.0, 4.0]) == 1.0
    # at 2: three quarters of the first, a quarter of the second
    assert ks_distance([1.0, 2.0, 2.0, 5.0], [2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.5)
    # samples of different sizes: at 1, all of the first and a third of the second
    assert ks_distance([1.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / 3)


def test_kendall_tau_counts_pairs() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert kendall_tau([1, 2, 3, 4], [40, 30, 20, 10]) == pytest.approx(-1.0)
    # five of six pairs agree: (5 - 1) / 6
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # a tie in one: two of three pairs agree, the third is told apart by the second only
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0.0


def test_regret_is_what_the_wrong_pick_costs() -> None:
    assert pick_regret([3.0, 2.0, 2.5], [9.0, 5.0, 7.0]) == 0.0
    assert pick_regret([3.0, 2.0, 2.5], [9.0, 8.0, 7.0]) == pytest.approx(0.25)
