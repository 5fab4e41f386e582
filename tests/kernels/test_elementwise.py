"""The small kernels: right against float64, and the same bits on every instruction set."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.engine.moe import route
from plait.kernels import isa_names, native_available
from plait.model import RouterSpec

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)

from plait.kernels import _native

ISAS = isa_names()
# Shorter than the sixteen lanes, exactly some of them, a bit more; more than a block of fold_top.
WIDTHS = (1, 7, 15, 16, 17, 64, 130, 1000)


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def same_on_all(function: Callable[[str], Any]) -> Any:
    """The result of `function(isa)`, whose bits are the same for every instruction set."""
    results = [function(isa) for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        first, other = np.atleast_1d(results[0]), np.atleast_1d(result)
        assert first.dtype == other.dtype and first.tobytes() == other.tobytes(), (
            f"{isa} differs from {ISAS[0]}"
        )
    return results[0]


def changed(row: np.ndarray, change: Callable[[np.ndarray], None]) -> np.ndarray:
    copy = row.copy()
    change(copy)
    return copy


def units_in_the_last_place(got: np.ndarray, exact: np.ndarray) -> float:
    unit = np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - exact) / unit))


# ---- exponential and what comes of it -------------------------------------------------------------------


def test_exp_is_within_two_units_in_the_last_place() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(-87, 88, 400_000), rng.uniform(-1, 1, 100_000), [-87, 88]]).astype(
        np.float32
    )
    assert units_in_the_last_place(_native.exp(x), np.exp(x.astype(np.float64))) <= 2


def test_sigmoid_is_within_three_units_in_the_last_place() -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(-87, 88, 400_000), rng.uniform(-1, 1, 100_000), [-87, 88]]).astype(
        np.float32
    )
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert units_in_the_last_place(_native.sigmoid(x), exact) <= 3


def test_tanh_is_within_three_units_in_the_last_place() -> None:
    rng = np.random.default_rng(3)
    near_zero = 10 ** rng.uniform(-30, -1, 100_000) * rng.choice([-1, 1], 100_000)
    x = np.concatenate(
        [rng.uniform(-12, 12, 300_000), rng.uniform(-0.3, 0.3, 200_000), near_zero, [0.25, 9.0]]
    )
    x = x.astype(np.float32)
    assert units_in_the_last_place(_native.tanh(x), np.tanh(x.astype(np.float64))) <= 3


def test_erf_is_within_six_ten_millionths() -> None:
    x = np.random.default_rng(6).uniform(-6, 6, 500_000).astype(np.float32)
    exact = torch.erf(torch.from_numpy(x).double()).numpy()
    # 1.5e-7 by the formula; the rest by roundings of its terms, which are as large as 1.45.
    np.testing.assert_allclose(_native.erf(x), exact, rtol=0, atol=6e-7)


def test_exp_sigmoid_and_tanh_keep_their_limits() -> None:
    edges = np.array([-np.inf, -1e30, -87.01, -0.0, 0.0, 1e30, np.inf], np.float32)
    exp, sigmoid, tanh = _native.exp(edges), _native.sigmoid(edges), _native.tanh(edges)
    assert list(exp[:5]) == [0, 0, 0, 1, 1]
    assert np.all(exp[5:] > 1e38) and np.all(np.isfinite(exp))  # what is above 88 counts as 88
    assert np.all(sigmoid[:3] < 1e-37) and list(sigmoid[3:]) == [0.5, 0.5, 1, 1]
    assert list(tanh) == [-1, -1, -1, 0, 0, 1, 1]
    assert list(np.signbit(tanh[3:5])) == [True, False]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_measured_exp_sigmoid_and_tanh(isa: str) -> None:
    x = np.random.default_rng(4).uniform(-20, 20, 2000).astype(np.float32)
    tanh = changed(x, lambda row: _native.softcap_row(row, 1.0, isa))
    assert tanh.tobytes() == _native.tanh(x).tobytes()

    experts, weights = _native.route_row(x, len(x), sigmoid=True, isa=isa)
    assert weights.tobytes() == _native.sigmoid(x[experts]).tobytes()

    # Softmax over 0 and far smaller numbers divides by exactly 1.
    logits = np.random.default_rng(5).uniform(-87, -21, (200, 15)).astype(np.float32)
    logits[:, 0] = 0
    for row in logits:
        experts, weights = _native.route_row(row, 15, isa=isa)
        assert weights.tobytes() == _native.exp(row[experts]).tobytes()


# ---- rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_has_float32_accuracy(kind: str, width: int) -> None:
    row, weight, bias = numbers(width, seed=1, size=3) + 2, numbers(width, seed=2), numbers(width, seed=3)
    wide = row.astype(np.float64)
    wide -= wide.mean() if kind == "layer" else 0
    exact = wide / np.sqrt(np.mean(wide**2) + 1e-5)
    for parts in ({}, {"weight": weight}, {"weight": weight, "bias": bias}):
        got = same_on_all(lambda isa, parts=parts: _native.norm_row(row, kind, 1e-5, isa=isa, **parts))
        want = exact * parts.get("weight", 1) + parts.get("bias", 0)
        np.testing.assert_allclose(
            got, want, rtol=2e-6, atol=4e-6
        )  # a layer's mean is rounded: 2 * 2^-23 * |x|


def test_a_row_of_zeros_has_a_norm_of_zeros() -> None:
    assert not np.any(
        same_on_all(lambda isa: _native.norm_row(np.zeros(50, np.float32), "rms", 1e-6, isa=isa))
    )


@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (128, 128), (128, 32), (80, 20), (96, 72), (6, 2)])
def test_rotation_turns_pairs_and_leaves_the_rest(dim: int, rotary_dim: int) -> None:
    heads, half = 3, rotary_dim // 2
    row, angles = numbers(heads, dim), numbers(half, seed=1, size=3)
    cosines, sines = np.cos(angles), np.sin(angles)
    got = same_on_all(
        lambda isa: changed(row.reshape(-1), lambda out: _native.rotate(out, heads, dim, cosines, sines, isa))
    ).reshape(heads, dim)
    first, second = row[:, :half], row[:, half:rotary_dim]
    assert np.array_equal(got[:, :half], first * cosines - second * sines)
    assert np.array_equal(got[:, half:rotary_dim], second * cosines + first * sines)
    assert np.array_equal(got[:, rotary_dim:], row[:, rotary_dim:])


@pytest.mark.parametrize("width", WIDTHS)
def test_scaling_adding_and_capping_a_row(width: int) -> None:
    row, other, factor = numbers(width, size=40), numbers(width, seed=1), np.float32(-1.7)
    scaled = same_on_all(lambda isa: changed(row, lambda out: _native.scale_row(out, factor, isa)))
    assert np.array_equal(scaled, row * factor)
    added = same_on_all(lambda isa: changed(row, lambda out: _native.add_row(out, other, factor, isa)))
    assert np.array_equal(added, row + other * factor)
    capped = same_on_all(lambda isa: changed(row, lambda out: _native.softcap_row(out, 30.0, isa)))
    np.testing.assert_allclose(
        capped, np.tanh(row.astype(np.float64) / 30) * 30, rtol=5e-7
    )  # 3 + 1 roundings
    assert same_on_all(lambda isa: _native.row_max(row, isa)) == row.max()
    assert same_on_all(lambda isa: _native.row_max(-np.abs(row), isa)) == (-np.abs(row)).max()


def test_the_maximum_of_an_empty_row_is_minus_infinity() -> None:
    assert same_on_all(lambda isa: _native.row_max(np.empty(0, np.float32), isa)) == -np.inf


@pytest.mark.parametrize(("columns", "depth"), [(1, 5), (3, 16), (4, 64), (8, 100), (37, 200), (64, 2048)])
def test_a_small_product_has_float32_accuracy(columns: int, depth: int) -> None:
    weights, bias, row = numbers(columns, depth), numbers(columns, seed=1), numbers(depth, seed=2)
    got = same_on_all(lambda isa: _native.small_linear(weights, bias, row, isa))
    exact = weights.astype(np.float64) @ row + bias
    np.testing.assert_allclose(got, exact, atol=2e-6 * np.sqrt(depth))  # as a random walk of roundings
    without = same_on_all(lambda isa: _native.small_linear(weights, None, row, isa))
    assert np.array_equal(without + bias, got)


def test_a_column_of_a_small_product_does_not_depend_on_its_neighbours() -> None:
    weights, row = numbers(11, 75), numbers(75, seed=1)
    together = _native.small_linear(weights, None, row)
    alone = [_native.small_linear(weights[n : n + 1], None, row)[0] for n in range(11)]
    assert np.array_equal(together, alone)


# ---- the best k -----------------------------------------------------------------------------------------


def best_by_sorting(values: np.ndarray, k: int) -> list[int]:
    def rank(index: int) -> tuple[bool, float, int]:
        value = float(values[index])
        return (not np.isnan(value), 0.0 if np.isnan(value) else -value, index)

    return sorted(range(len(values)), key=rank)[:k]


def best_by_folding(pieces: list[tuple[int, np.ndarray]], k: int, isa: str) -> tuple[np.ndarray, np.ndarray]:
    values, ids, filled = np.empty(k, np.float32), np.empty(k, np.int32), 0
    for first_id, piece in pieces:
        filled = _native.fold_top(piece, first_id, values, ids, filled, isa)
    return values[:filled], ids[:filled]


@given(
    values=st.lists(st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1.0, 1.5, 3.0, np.inf, np.nan]), max_size=700),
    k=st.integers(0, 40),
    cuts=st.lists(st.integers(0, 700), max_size=4),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_folding_pieces_in_any_order_finds_what_sorting_finds(
    values: list[float], k: int, cuts: list[int], order: Any
) -> None:
    row = np.array(values, np.float32)
    bounds = sorted({0, len(row), *(cut for cut in cuts if cut < len(row))})
    pieces = [(start, row[start:stop]) for start, stop in pairwise(bounds)]
    order.shuffle(pieces)
    expected = best_by_sorting(row, k)
    for isa in ISAS:
        best, ids = best_by_folding(pieces, k, isa)
        assert list(ids) == expected
        assert np.array_equal(best, row[ids], equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 8, 100, 1500])
def test_folding_a_vocabulary_finds_what_sorting_finds(isa: str, k: int) -> None:
    row = np.round(numbers(5003, seed=k) * 200).astype(np.float32)  # with equals
    pieces = [(start, row[start : start + 640]) for start in range(0, len(row), 640)]
    _, ids = best_by_folding(pieces, k, isa)
    assert list(ids) == best_by_sorting(row, k)
    _, ids = best_by_folding([(7, np.sort(row))], k, isa)  # every value is a new best
    assert list(ids) == [index + 7 for index in best_by_sorting(np.sort(row), k)]


@pytest.mark.parametrize("isa", ISAS)
def test_equals_of_the_worst_win_by_their_id_and_what_is_no_number_wins_over_all(isa: str) -> None:
    ones = np.ones(512, np.float32)
    _, ids = best_by_folding(
        [(1000, ones), (0, ones)], 3, isa
    )  # every value of the second piece equals the worst
    assert list(ids) == [0, 1, 2]
    unknown = np.zeros(512, np.float32)
    unknown[300] = np.nan
    best, ids = best_by_folding([(1000, ones), (0, unknown)], 3, isa)
    assert list(ids) == [300, 1000, 1001]
    assert np.array_equal(best, np.array([np.nan, 1, 1], np.float32), equal_nan=True)


# ---- routers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize(
    ("groups", "kept_groups", "rank"), [(1, 1, "best"), (8, 3, "best"), (8, 4, "best_two")]
)
def test_routing_chooses_and_weighs_as_the_reference_does(
    score: Any, renormalises: bool, corrects: bool, groups: int, kept_groups: int, rank: Any
) -> None:
    for experts, chosen, seed in ((8, 2, 1), (40, 6, 2), (256, 8, 3)):
        spec = RouterSpec(
            score=score,
            renormalises=renormalises,
            scale=2.5,
            correction=corrects,
            groups=groups,
            kept_groups=kept_groups,
            group_rank=rank if experts > groups else "best",
        )
        logits = numbers(experts, seed=seed, size=2)
        correction = numbers(experts, seed=seed + 10, size=0.3) if corrects else None
        reference, reference_weights = route(
            torch.from_numpy(logits)[None],
            spec,
            chosen,
            torch.eye(experts),
            None,
            None if correction is None else torch.from_numpy(correction),
        )
        ids, weights = (
            same_on_all(
                lambda isa, part=part, spec=spec, logits=logits, chosen=chosen, correction=correction: (
                    _native.route_row(
                        logits,
                        chosen,
                        sigmoid=spec.score == "sigmoid",
                        renormalises=spec.renormalises,
                        scale=spec.scale,
                        groups=spec.groups,
                        kept_groups=spec.kept_groups,
                        best_two=spec.group_rank == "best_two",
                        correction=correction,
                        isa=isa,
                    )[part]
                )
            )
            for part in (0, 1)
        )
        assert list(ids) == reference[0].tolist()
        np.testing.assert_allclose(weights, reference_weights[0].numpy(), rtol=2e-6)


def test_routing_takes_the_lower_of_equal_experts_and_groups() -> None:
    logits = np.array([1, 3, 3, 1, 3, 1, 1, 3], np.float32)
    assert list(same_on_all(lambda isa: _native.route_row(logits, 5, isa=isa)[0])) == [1, 2, 4, 7, 0]
    grouped = same_on_all(lambda isa: _native.route_row(logits, 4, groups=4, kept_groups=2, isa=isa)[0])
    assert list(grouped) == [1, 2, 0, 3]


# ---- what Python may not do -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda row: _native.norm_row(row, "square", 1e-5), "'rms' or 'layer'"),
        (lambda row: _native.norm_row(row, "rms", -1.0), "eps"),
        (lambda row: _native.norm_row(row, "rms", 1e-5, weight=row[:3]), "weight has 3 numbers, not 8"),
        (lambda row: _native.rotate(row, 3, 4, row[:2], row[:2]), "not heads"),
        (lambda row: _native.rotate(row, 2, 4, row[:2], row[:1]), "as many sines"),
        (lambda row: _native.rotate(row, 2, 4, row[:3], row[:3]), "more than the head"),
        (lambda row: _native.add_row(row, row[:7], 1.0), "differ in length"),
        (lambda row: _native.softcap_row(row, 0.0), "positive"),
        (lambda row: _native.small_linear(row.reshape(2, 4), None, row), "4 inputs"),
        (lambda row: _native.small_linear(row.reshape(2, 4), row, row[:4]), "bias has 8 numbers, not 2"),
        (lambda row: _native.route_row(row, 9), "chosen"),
        (lambda row: _native.route_row(row, 2, groups=3), "divide"),
        (lambda row: _native.route_row(row, 2, groups=4, kept_groups=5), "kept_groups"),
        (lambda row: _native.route_row(row, 5, groups=4, kept_groups=2), "chosen"),
        (lambda row: _native.route_row(row, 2, correction=row[:2]), "correction has 2 numbers, not 8"),
        (lambda row: _native.fold_top(row, 0, row, np.zeros(7, np.int32), 0), "differ in length"),
        (lambda row: _native.fold_top(row, 0, row, np.zeros(8, np.int32), 9), "filled"),
        (lambda row: _native.fold_top(row, 2**31 - 4, row, np.zeros(8, np.int32), 0), "ids"),
        (lambda row: _native.row_max(row, "mmx"), "no instruction set 'mmx'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(
    call: Callable[[np.ndarray], Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(numbers(8))


@pytest.mark.parametrize("row", [np.zeros(8), np.zeros((2, 4), np.float32), np.zeros(16, np.float32)[::2]])
def test_a_row_of_another_type_or_shape_is_refused_and_not_copied(row: np.ndarray) -> None:
    with pytest.raises(TypeError):
        _native.scale_row(row, 2.0)
