"""Factors between a grid and an engine, with the truth known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.costs import (
    Curve,
    Grid,
    HostOverhead,
    LiveFactors,
    OperationTables,
    SpanFacts,
    StepParts,
    StepWork,
    TableCosts,
    apply_factors,
    fit_live_factors,
)

TRUTH = LiveFactors(dense=1.1, prefill=1.2, decode=0.8, per_step_s=5e-4)
TABLES = OperationTables(
    dense=Curve((1.0, 512.0), (1e-3, 3e-2)),
    head=Curve((1.0, 64.0), (1e-4, 1e-3)),
    prefill=Grid((2.0, 512.0), (Curve((0.0, 900.0), (5e-6, 6e-5)), Curve((0.0, 900.0), (6e-5, 9e-5)))),
    decode=Grid((1.0, 64.0), (Curve((0.0, 900.0), (1e-5, 2e-4)), Curve((0.0, 900.0), (4e-4, 2e-2)))),
    most_context_tokens=60_000,
)


def costs(tables: OperationTables) -> TableCosts:
    facts = SpanFacts(weight_bytes=1, kv_bytes_per_token=1, hidden_bytes_per_token=1)
    return TableCosts(tables, facts, HostOverhead())


def steps(count: int, rng: np.random.Generator) -> list[StepWork]:
    made: list[StepWork] = []
    for _ in range(count):
        decodes = [(1, int(context)) for context in rng.integers(0, 800, rng.integers(1, 40))]
        prompts = [(int(rng.integers(2, 300)), 0)] * int(rng.integers(0, 2))
        made.append(StepWork.of([*decodes, *prompts], sampled=len(decodes)))
    return made


def measured(works: list[StepWork], rng: np.random.Generator, noise: float) -> list[float]:
    engine = costs(apply_factors(TABLES, TRUTH))
    return [engine.step_s(work) * float(np.exp(noise * rng.standard_normal())) for work in works]


def test_factors_are_found_through_noise_and_disturbed_steps() -> None:
    rng = np.random.default_rng(1)
    works = steps(120, rng)
    seconds = measured(works, rng, 0.02)
    for disturbed in range(0, 120, 10):
        seconds[disturbed] *= 3
    found = fit_live_factors([costs(TABLES).parts_s(work) for work in works], seconds)
    for name in ("dense", "prefill", "decode"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.05), name
    assert found.per_step_s == pytest.approx(TRUTH.per_step_s, rel=0.25)


def test_steps_that_were_not_fitted_are_predicted_without_bias() -> None:
    rng = np.random.default_rng(2)
    works = steps(160, rng)
    seconds = measured(works, rng, 0.03)
    found = fit_live_factors([costs(TABLES).parts_s(work) for work in works[::2]], seconds[::2])
    engine = costs(apply_factors(TABLES, found))
    errors = [engine.step_s(work) / at - 1 for work, at in zip(works[1::2], seconds[1::2], strict=True)]
    assert abs(np.mean(errors)) < 0.01
    assert np.mean(np.abs(errors)) < 0.03
    before = [costs(TABLES).step_s(work) / at - 1 for work, at in zip(works, seconds, strict=True)]
    assert np.mean(np.abs(before)) > 0.05


def test_work_that_did_not_occur_keeps_what_the_grid_says() -> None:
    works = [StepWork.of([(1, 100)] * count, sampled=count) for count in range(1, 40)]
    seconds = measured(works, np.random.default_rng(0), 0.0)
    found = fit_live_factors([costs(TABLES).parts_s(work) for work in works], seconds)
    assert found.prefill == pytest.approx(1.0)
    engine = costs(apply_factors(TABLES, found))
    assert [engine.step_s(work) for work in works] == pytest.approx(seconds, rel=0.03)


def test_the_constant_is_of_the_whole_model() -> None:
    half = apply_factors(TABLES, TRUTH, block_share=0.5)
    assert half.dense.at(1) == pytest.approx(1.1 * 1e-3 + 0.5 * 5e-4)
    assert fit_live_factors([], []) == LiveFactors()


@given(st.lists(st.tuples(*[st.floats(1e-9, 1e3)] * 4), min_size=1, max_size=12))
def test_factors_stay_between_a_half_and_two(rows: list[tuple[float, float, float, float]]) -> None:
    parts = [StepParts(dense, prefill, decode) for dense, prefill, decode, _ in rows]
    found = fit_live_factors(parts, [seconds for *_, seconds in rows])
    assert all(0.5 <= value <= 2.0 for value in (found.dense, found.prefill, found.decode))
    assert 0 <= found.per_step_s <= 2 * max(seconds for *_, seconds in rows)
