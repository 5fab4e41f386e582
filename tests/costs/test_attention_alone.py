"""Attention apart from the rest of a step: what machines do for each other when one holds another's keys."""

import pytest

from plait.costs import Formats, RooflineCosts, SpanShape, StepWork, device_named
from plait.model import published_spec
from plait.profiler import shipped_profile


def roofline(name: str) -> RooflineCosts:
    spec = published_spec(name)
    shape = SpanShape(spec, range(len(spec.blocks)), Formats(weights="bf16", kv="bf16"))
    return RooflineCosts(shape=shape, device=device_named("a100-80gb"))


def test_attention_is_what_a_step_takes_longer_with_more_context() -> None:
    costs = roofline("llama-2-7b")
    short, long = (StepWork.of([(1, context)] * 4, sampled=4) for context in (1000, 50_000))
    more_s = costs.step_s(long) - costs.step_s(short)
    assert costs.attention_s(long) - costs.attention_s(short) == pytest.approx(more_s)
    assert 0 < costs.attention_s(long) < costs.step_s(long)


def test_tables_and_regression_know_their_attention_too() -> None:
    profile = shipped_profile("tiny-zen4")
    work = StepWork.of([(1, 200), (1, 350)], sampled=2)
    tables = profile.table_costs(extrapolates=True)
    assert 0 < tables.attention_s(work) < tables.step_s(work)


def test_what_travels_is_as_the_formula_says() -> None:
    """H * d values out, H * (d + 2) numbers back, for each layer (Lin et al. 2024)."""
    shape = roofline("llama-3-8b").shape
    assert shape.query_bytes_per_token == 32 * 32 * 128 * 2
    assert shape.part_bytes_per_token == 32 * 32 * (128 + 2) * 4
