from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.costs import (
    CostModel,
    Curve,
    Grid,
    HostOverhead,
    NoisyCosts,
    OperationTables,
    RegressionCosts,
    SpanFacts,
    StepWork,
    TableCosts,
    fit_host,
    fit_steps,
    non_negative_least_squares,
    prediction_errors,
)
from plait.errors import BadSetup, MissingCost, OutsideDomain

FACTS = SpanFacts(weight_bytes=1000, kv_bytes_per_token=10, hidden_bytes_per_token=4)
TABLES = OperationTables(
    dense=Curve((1.0, 8.0, 64.0), (1.0, 1.0, 8.0)),
    head=Curve((1.0, 16.0), (0.5, 2.0)),
    prefill=Grid((2.0, 64.0), (Curve((0.0, 100.0), (0.01, 0.11)), Curve((0.0, 100.0), (0.03, 0.13)))),
    decode=Grid((1.0, 16.0), (Curve((0.0, 100.0), (0.0, 0.5)), Curve((0.0, 100.0), (0.0, 8.0)))),
    most_context_tokens=1000,
)
chunks = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 4000)), min_size=1, max_size=8)


def table_costs(**changes: object) -> TableCosts:
    return TableCosts(TABLES, FACTS, HostOverhead(per_step_s=0.25), **changes)


def test_a_curve_is_exact_at_its_places_linear_between_and_flat_before_them() -> None:
    curve = Curve((2.0, 4.0, 8.0), (1.0, 3.0, 11.0))
    assert [curve.at(place) for place in (0, 2, 3, 4, 6, 8, 10)] == [1.0, 1.0, 2.0, 3.0, 7.0, 11.0, 15.0]
    assert Curve((2.0, 4.0), (1.0, 0.0)).at(100.0) == 0.0
    with pytest.raises(BadSetup, match="ascend"):
        Curve((2.0, 2.0), (1.0, 1.0))
    with pytest.raises(BadSetup, match="a value for each"):
        Curve((1.0,), ())


@given(st.floats(0, 20), st.floats(0, 200))
def test_a_grid_reproduces_a_bilinear_function(row: float, place: float) -> None:
    def truth(row: float, place: float) -> float:
        return 1.0 + 2.0 * row + 0.5 * place + 0.25 * row * place

    rows = (0.0, 3.0, 9.0)
    grid = Grid(rows, tuple(Curve((0.0, 50.0), (truth(r, 0.0), truth(r, 50.0))) for r in rows))
    assert grid.at(row, place) == pytest.approx(truth(row, place))


def test_a_step_is_the_sum_of_its_operations() -> None:
    costs = table_costs()
    # 8 tokens pass everything; 4 of them decode at a mean context of 50, the others are a chunk behind 100.
    work = StepWork.of([(1, 40), (1, 60), (1, 100), (1, 0), (4, 100)], sampled=4)
    decode = 0.25 * 3 / 15 * 12 + 0.25 * 12 / 15 + 4.0 * 3 / 15 - 0.25 * 3 / 15 * 12
    prefill = 4 * (0.11 + 0.02 * 2 / 62)
    head = 0.5 + 1.5 * 3 / 15
    assert costs.step_s(work) == pytest.approx(1.0 + decode + prefill + head)
    assert costs.attention_s(work) == pytest.approx(decode + prefill)
    assert costs.host_s(work) == 0.25


def test_spans_add_up_and_only_the_last_has_the_head() -> None:
    work = StepWork.of([(1, 40), (9, 10)], sampled=2)
    parts = [table_costs(block_share=0.25, decides=False), table_costs(block_share=0.75)]
    assert sum(part.step_s(work) for part in parts) == pytest.approx(table_costs().step_s(work))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (StepWork.of([(65, 0)], sampled=0), "65 tokens and the table ends at 64"),
        (StepWork.of([(1, 0)] * 17, sampled=0), "17 decoding sequences and the table ends at 16"),
        (StepWork.of([(1, 100)] * 11, sampled=0), "1100 tokens of context and the table ends at 1000"),
        (StepWork.of([(1, 101)], sampled=0), "a context of 101 tokens and the table ends at 100"),
        (StepWork.of([(2, 0)], sampled=17), "17 sampled rows and the table ends at 16"),
    ],
)
def test_work_beyond_the_tables_is_refused_unless_it_may_be_extrapolated(
    work: StepWork, message: str
) -> None:
    costs = table_costs()
    with pytest.raises(OutsideDomain, match=message):
        costs.step_s(work)
    assert costs.extrapolated_steps == 0
    willing = table_costs(extrapolates=True)
    assert willing.step_s(work) > 0
    assert willing.extrapolated_steps == 1
    willing.step_s(StepWork.of([(1, 0)], sampled=1))
    assert willing.extrapolated_steps == 1


@pytest.mark.parametrize("missing", ["head", "prefill", "decode"])
def test_an_operation_that_was_not_measured_is_named(missing: str) -> None:
    costs = TableCosts(replace(TABLES, **{missing: None}), FACTS, HostOverhead())
    with pytest.raises(
        MissingCost, match={"head": "head", "prefill": "prompts", "decode": "decoding"}[missing]
    ):
        costs.step_s(StepWork.of([(1, 40), (9, 10)], sampled=2))


@given(st.integers(0, 10**6))
def test_least_squares_without_negative_numbers_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(12, 5)), rng.normal(size=12)
    found = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (target - matrix @ found)
    assert (found >= 0).all()  # Karush, Kuhn and Tucker: nothing can grow or shrink with profit
    assert (gradient <= 1e-9).all()
    assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-9


def test_a_regression_finds_the_coefficients_of_steps_that_have_some() -> None:
    truth = (1e-3, 2e-5, 0.0, 1e-7, 3e-9, 5e-8)
    rng = np.random.default_rng(3)
    works = [
        StepWork.of(
            [
                (int(new), int(context))
                for new, context in zip(rng.integers(1, 99, 6), rng.integers(0, 999, 6), strict=True)
            ],
            sampled=0,
        )
        for _ in range(40)
    ] + [StepWork.of([(1, 100 * count)] * count, sampled=0) for count in range(1, 20)]
    exact = RegressionCosts(truth, FACTS, HostOverhead())
    assert fit_steps(works, [exact.step_s(work) for work in works]) == pytest.approx(truth, abs=1e-9)
    with pytest.raises(MissingCost, match="3 measured steps are too few"):
        fit_steps(works[:3], [1.0] * 3)


def test_host_overhead_is_found_from_steps() -> None:
    truth = HostOverhead(per_step_s=1e-4, per_sequence_s=2e-5, per_token_s=1e-7, per_sample_s=3e-5)
    works = [StepWork.of([(1 + step % 3, 5)] * (1 + step % 7), sampled=step % 4) for step in range(60)]
    seconds = [truth.of(work) for work in works]
    seconds[7] = 0.0  # too short for the clock
    found = fit_host(works, seconds)
    assert found.per_step_s == pytest.approx(truth.per_step_s)
    assert found.per_sample_s == pytest.approx(truth.per_sample_s)


@given(chunks, st.integers(0, 1000))
def test_noise_has_mean_one_in_order_and_by_seed(pairs: list[tuple[int, int]], seed: int) -> None:
    model = RegressionCosts((1e-3, 1e-5, 1e-5, 1e-8, 1e-9, 1e-9), FACTS, HostOverhead())
    work = StepWork.of(pairs, sampled=1)
    noisy: list[CostModel] = [NoisyCosts(model, 0.1, np.random.default_rng(seed)) for _ in range(2)]
    drawn = [[each.step_s(work) for _ in range(5)] for each in noisy]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 5


def test_noise_has_the_spread_that_was_asked_for() -> None:
    model = RegressionCosts((1.0, 0, 0, 0, 0, 0), FACTS, HostOverhead())
    noisy = NoisyCosts(model, 0.2, np.random.default_rng(5))
    work = StepWork.of([(1, 1)], sampled=1)
    drawn = np.array([noisy.step_s(work) for _ in range(40_000)])
    assert drawn.mean() == pytest.approx(1.0, abs=0.005)
    assert np.log(drawn).std() == pytest.approx(0.2, abs=0.005)
    assert NoisyCosts(model, 0.0, np.random.default_rng(5)).step_s(work) == 1.0


def test_errors_of_predictions_by_hand() -> None:
    errors = prediction_errors([1.1, 0.8, 1.0, 3.0], [1.0, 1.0, 1.0, 2.0])
    assert errors.count == 4
    assert errors.median == pytest.approx(0.15)
    assert errors.mean == pytest.approx((0.1 + 0.2 + 0 + 0.5) / 4)
    assert errors.bias == pytest.approx((0.1 - 0.2 + 0 + 0.5) / 4)
    assert errors.p95 == pytest.approx(0.2 + 0.85 * 0.3)
