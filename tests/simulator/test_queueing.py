"""Waits are those of queueing theory (queues.py).

The bounds of the quick tests are about four standard errors; the slow ones hold to one in a hundred at a million
arrivals, and so does `bench/queueing.py`.
"""

import pytest
from queues import QUEUES, erlang_wait_s, mean_wait_s


def test_erlang_c_is_what_it_is_for_one_server() -> None:
    assert erlang_wait_s(1, 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("queue", QUEUES)
def test_waits_are_those_of_queueing_theory(queue: str) -> None:
    service, servers, rate, expected_s, bound = QUEUES[queue]
    found_s = mean_wait_s(service(3), servers, rate, 3_000, seed=3)
    assert found_s == pytest.approx(expected_s, rel=2 * bound)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("queue", QUEUES)
def test_waits_are_within_one_in_a_hundred_at_a_million_arrivals(queue: str) -> None:
    service, servers, rate, expected_s, _ = QUEUES[queue]
    assert mean_wait_s(service(3), servers, rate, 1_000_000, seed=3) == pytest.approx(expected_s, rel=0.01)
