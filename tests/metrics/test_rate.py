"""Tokens per second over a sliding window."""

from hypothesis import given
from hypothesis import strategies as st

from plait.metrics import TokenRate


def test_a_steady_stream_has_its_own_rate():
    rate = TokenRate(window_s=5)
    for tenth in range(200):
        rate.add(3, now_s=100 + tenth / 10)
    assert abs(rate.per_s(now_s=119.9) - 30) < 1


def test_it_falls_to_zero_when_nothing_comes():
    rate = TokenRate(window_s=5)
    rate.add(1000, now_s=50.0)
    assert rate.per_s(now_s=52.0) > 0
    assert rate.per_s(now_s=56.0) == 0
    assert rate.per_s(now_s=1e6) == 0


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 100)), max_size=50))
def test_it_counts_what_came_within_the_window(arrivals: list[tuple[float, int]]):
    rate = TokenRate(window_s=5)
    arrivals.sort()
    for now_s, tokens in arrivals:
        rate.add(tokens, now_s)
    now_s = arrivals[-1][0] if arrivals else 0.0
    counted = sum(tokens for at_s, tokens in arrivals if int(at_s) >= int(now_s) - 5)
    assert round(rate.per_s(now_s) * (5 + now_s - int(now_s))) == counted
