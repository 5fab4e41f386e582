"""The histogram counts as Prometheus does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from plait.metrics import Histogram

BOUNDS = (0.1, 1.0, 10.0)


@given(st.lists(st.one_of(st.floats(0, 20), st.sampled_from(BOUNDS))))
def test_it_counts_what_prometheus_client_counts(values: list[float]):
    ours = Histogram(BOUNDS)
    registry = CollectorRegistry()
    reference = Reference("reference", "The library's own.", buckets=BOUNDS, registry=registry)
    for value in values:
        ours.observe(value)
        reference.observe(value)
    for bound, count in ours.cumulative():
        assert registry.get_sample_value("reference_bucket", {"le": bound}) == count
    assert registry.get_sample_value("reference_sum") == pytest.approx(ours.total)


def test_a_value_can_be_counted_several_times_at_once():
    ours = Histogram(BOUNDS)
    ours.observe(0.5, times=3)
    assert ours.cumulative() == [("0.1", 0.0), ("1.0", 3.0), ("10.0", 3.0), ("+Inf", 3.0)]
    assert ours.total == 1.5
