"""Linear maps of packed weights: exact integers, one order of additions, the same bits on every instruction set."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from plait.kernels import isa_names, native_available

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)

from plait.kernels import _native

ISAS = isa_names()
FORMATS = {"bf16": 0, "int8": 1, "int4_g32": 2, "int4_g128": 3}  # csrc/table.h
GROUPS = {"int4_g32": 32, "int4_g128": 128}
PANEL = 64
GUARD = 64
"""Numbers around an output that nothing may write to."""


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    return torch.from_numpy(values).bfloat16().float().numpy()


def depth_unit(format: str) -> int:
    return max(32, GROUPS.get(format, 0))


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass
class Packed:
    """A packed matrix, and what it says by the layout of csrc/table.h."""

    format: str
    columns: int
    depth: int
    memory: np.ndarray  # uint8

    @property
    def padded_depth(self) -> int:
        return round_up(self.depth, depth_unit(self.format))

    @property
    def panels(self) -> np.ndarray:
        """uint8 [panels, bytes]"""
        return self.memory.reshape(round_up(self.columns, PANEL) // PANEL, -1)

    def codes(self) -> np.ndarray:
        """int64 [columns, padded depth]; not for bf16"""
        depth = self.padded_depth
        if self.format == "int8":
            words = self.panels[:, : depth * PANEL].view(np.int8).reshape(-1, depth // 4, PANEL, 4)
            return words.transpose(0, 2, 1, 3).reshape(-1, depth)[: self.columns].astype(np.int64)
        group = GROUPS[self.format]
        pairs = self.groups()[:, :, : group * PANEL // 2].reshape(-1, depth // group, group // 8, PANEL, 4)
        halves = np.stack((pairs & 15, pairs >> 4), axis=-2).astype(np.int64) - 8
        return halves.transpose(0, 3, 1, 2, 4, 5).reshape(-1, depth)[: self.columns]

    def groups(self) -> np.ndarray:
        """int4: uint8 [panels, groups, bytes]"""
        return self.panels.reshape(len(self.panels), self.padded_depth // GROUPS[self.format], -1)

    def scales(self) -> np.ndarray:
        """float32 [columns, groups], one group for int8"""
        if self.format == "int8":
            raw = self.panels[:, self.padded_depth * PANEL :][:, : PANEL * 4].copy()
            return raw.view(np.float32).reshape(-1, 1)[: self.columns]
        halves = self.groups()[:, :, GROUPS[self.format] * PANEL // 2 :].copy().view(np.uint16)
        wide = (halves.astype(np.uint32) << 16).view(np.float32)  # [panels, groups, 64]
        return wide.transpose(0, 2, 1).reshape(-1, wide.shape[1])[: self.columns]

    def set_codes(self, codes: np.ndarray) -> None:
        """Replace an int8 matrix's codes, int [columns, depth], with their sums."""
        full = np.zeros((len(self.panels) * PANEL, self.padded_depth), np.int8)
        full[: self.columns, : self.depth] = codes
        words = full.reshape(-1, PANEL, self.padded_depth // 4, 4).transpose(0, 2, 1, 3)
        end = self.padded_depth * PANEL
        self.panels[:, :end] = words.reshape(len(self.panels), -1).view(np.uint8)
        sums = (-128 * full.astype(np.int32).sum(axis=1, dtype=np.int32)).reshape(-1, PANEL)
        self.panels[:, end + PANEL * 4 :] = sums.view(np.uint8)


def pack(weights: np.ndarray | torch.Tensor, format: str, isa: str = "") -> Packed:
    columns, depth = weights.shape
    size = _native.packed_bytes(FORMATS[format], columns, depth)
    memory = _native.Arena(size).memory[:size]
    rows = np.full(round_up(columns, PANEL), -1)
    rows[:columns] = np.arange(columns)
    _native.pack_into(memory, 0, weights, rows, 0, depth, FORMATS[format], 1, isa)
    return Packed(format, columns, depth, memory)


def quantize(values: np.ndarray, format: str, isa: str = "") -> _native.QuantizedRows:
    return _native.QuantizedRows(values, FORMATS[format], isa)


def guarded(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """All of the memory, and the output [rows, width] inside."""
    flat = np.full(rows * width + 2 * GUARD, 1234.5, np.float32)
    return flat, flat[GUARD : GUARD + rows * width].reshape(rows, width)


def linear(
    packed: Packed,
    rows: _native.QuantizedRows,
    isa: str = "",
    *,
    epilogue: str = "store",
    before: float | np.ndarray = 0.0,
    input_rows: np.ndarray | None = None,
    **options: object,
) -> np.ndarray:
    """The outputs; what lies around them must not have been touched."""
    width = packed.columns // 2 if epilogue == "gate_up" else packed.columns
    flat, out = guarded(len(rows.codes) if input_rows is None else len(input_rows), width)
    out[:] = before
    _native.linear(
        packed.memory, 0, packed.columns, rows, out, epilogue, input_rows=input_rows, isa=isa, **options
    )
    assert (flat[:GUARD] == 1234.5).all() and (flat[GUARD + out.size :] == 1234.5).all()
    return out


def expected(packed: Packed, rows: _native.QuantizedRows) -> np.ndarray:
    """Sums as the contract defines them, operation by operation in float32 and int64."""
    if packed.format == "bf16":
        return sequential_bf16(packed, rows)
    if packed.format == "int8":
        codes = rows.codes.astype(np.int64) - 128
        sums = codes @ packed.codes().T
        return sums.astype(np.float32) * (rows.scales * packed.scales().T)
    group = GROUPS[packed.format]
    groups = packed.padded_depth // group
    codes = rows.codes.view(np.int8).astype(np.int64).reshape(-1, groups, group)
    weights, scales = packed.codes().reshape(-1, groups, group), packed.scales()
    total = np.zeros((len(codes), packed.columns), np.float32)
    for index in range(groups):
        sums = codes[:, index] @ weights[:, index].T
        total += sums.astype(np.float32) * (rows.scales[:, index, None] * scales[None, :, index])
    return total


def sequential_bf16(packed: Packed, rows: _native.QuantizedRows) -> np.ndarray:
    """One float32 a column, pair after pair, the odd one first; products of two bfloat16 are exact."""
    words = packed.panels.view(np.uint16).reshape(-1, packed.padded_depth // 2, PANEL, 2)
    columns = words.transpose(0, 2, 1, 3).reshape(-1, packed.padded_depth)[: packed.columns]
    weights = (columns.astype(np.uint32) << 16).view(np.float32)
    inputs = (rows.codes.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    total = np.zeros((len(inputs), packed.columns), np.float32)
    for even in range(0, packed.padded_depth, 2):
        total += inputs[:, even + 1, None] * weights[None, :, even + 1]
        total += inputs[:, even, None] * weights[None, :, even]
    return total


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """NaN where NaN is wanted; its bits are the processor's business."""
    nan = np.isnan(want)
    return bool((np.isnan(got) == nan).all()) and got[~nan].tobytes() == want[~nan].tobytes()


# ---- packing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_weights_are_rounded_to_nearest_even(isa: str) -> None:
    weights = numbers(70, 45)
    packed = pack(weights, "bf16", isa)
    assert (_native.unpack_from(packed.memory, 0, 70, 45, 0, isa) == to_bf16(weights)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_int8_weights_have_one_scale_a_column_and_round_to_nearest_even(isa: str) -> None:
    weights = numbers(70, 45)
    weights[3] = 0.0
    weights[4] = np.arange(45) - 22.5  # ties
    weights[4, 0] = 127.0
    largest = np.abs(weights).max(axis=1, keepdims=True)
    packed = pack(weights, "int8", isa)
    assert (packed.scales() == largest / np.float32(127)).all()
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    assert (packed.codes()[:, :45] == np.rint(weights * inverse)).all()
    assert (packed.codes()[:, 45:] == 0).all()
    unpacked = _native.unpack_from(packed.memory, 0, 70, 45, 1, isa)
    assert (unpacked == packed.codes()[:, :45].astype(np.float32) * packed.scales()).all()


@pytest.mark.parametrize("format", GROUPS)
@pytest.mark.parametrize("isa", ISAS)
def test_int4_scales_are_at_least_as_good_as_taking_the_largest_value_to_minus_eight(
    isa: str, format: str
) -> None:
    group = GROUPS[format]
    weights = numbers(70, 2 * group + 7)
    weights[3] = 0.0
    packed = pack(weights, format, isa)
    padded = np.zeros((70, packed.padded_depth), np.float32)
    padded[:, : packed.depth] = weights
    values = padded.reshape(70, -1, group)
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=2)[:, :, None], axis=2)
    plain_scales = to_bf16(largest / np.float32(-8))
    inverse = np.divide(1, plain_scales, out=np.zeros_like(plain_scales), where=plain_scales != 0)
    plain = np.clip(np.rint(values * inverse), -8, 7) * plain_scales
    unpacked = _native.unpack_from(packed.memory, 0, 70, packed.depth, FORMATS[format], isa)
    whole = packed.codes().astype(np.float32).reshape(70, -1, group) * packed.scales()[:, :, None]
    assert (unpacked == whole.reshape(70, -1)[:, : packed.depth]).all()
    errors, plain_errors = ((whole - values) ** 2).sum(axis=2), ((plain - values) ** 2).sum(axis=2)
    assert (errors <= plain_errors * (1 + 1e-5) + 1e-12).all()
    assert errors.sum() < 0.95 * plain_errors.sum()


@pytest.mark.parametrize("format", FORMATS)
def test_packing_gives_the_same_bytes_from_bfloat16_and_on_every_instruction_set(format: str) -> None:
    halves = torch.from_numpy(numbers(100, 77)).bfloat16()
    first = pack(halves.float().numpy(), format, ISAS[0]).memory
    for isa in ISAS:
        assert (pack(halves, format, isa).memory == first).all(), isa
        assert (pack(halves.float().numpy(), format, isa).memory == first).all(), isa


@pytest.mark.parametrize("format", FORMATS)
def test_packed_columns_are_the_rows_that_are_named(format: str) -> None:
    weights = numbers(10, 64)
    rows = np.full(64, -1)
    rows[5], rows[6] = 9, 2
    size = _native.packed_bytes(FORMATS[format], 64, 64)
    memory = _native.Arena(size).memory[:size]
    _native.pack_into(memory, 0, weights, rows, 0, 64, FORMATS[format], 1)
    values = _native.unpack_from(memory, 0, 64, 64, FORMATS[format])
    whole = _native.unpack_from(pack(weights, format).memory, 0, 10, 64, FORMATS[format])
    assert (values[5] == whole[9]).all() and (values[6] == whole[2]).all()
    assert (np.delete(values, (5, 6), axis=0) == 0).all()


# ---- activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 16, 31, 32, 100, 128, 300])
@pytest.mark.parametrize("isa", ISAS)
def test_int8_rows_have_one_scale_and_codes_above_128(isa: str, depth: int) -> None:
    values = numbers(3, depth)
    values[1] = 0.0
    rows = quantize(values, "int8", isa)
    largest = np.abs(values).max(axis=1, keepdims=True)
    assert (rows.scales == largest / np.float32(127)).all()
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    assert (rows.codes[:, :depth] == np.rint(values * inverse) + 128).all()
    assert (rows.codes[:, depth:] == 128).all()
    assert rows.finite.all()


@pytest.mark.parametrize("depth", [1, 31, 32, 100, 128, 300])
@pytest.mark.parametrize("format", GROUPS)
@pytest.mark.parametrize("isa", ISAS)
def test_int4_rows_have_a_scale_and_a_sum_of_codes_for_each_group(isa: str, format: str, depth: int) -> None:
    group = GROUPS[format]
    values = np.zeros((3, round_up(depth, group)), np.float32)
    values[:, :depth] = numbers(3, depth)
    rows = quantize(np.ascontiguousarray(values[:, :depth]), format, isa)
    groups = values.reshape(3, -1, group)
    largest = np.abs(groups).max(axis=2)
    assert (rows.scales == largest / np.float32(127)).all()
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.rint(groups * inverse[:, :, None]).astype(np.int64)
    assert (rows.codes.view(np.int8).reshape(codes.shape) == codes).all()
    assert (rows.eight_sums == 8 * codes.sum(axis=2)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_rows_are_rounded_to_nearest_even(isa: str) -> None:
    values = numbers(3, 45)
    codes = quantize(values, "bf16", isa).codes.view(np.uint16)
    assert ((codes.astype(np.uint32) << 16).view(np.float32)[:, :45] == to_bf16(values)).all()
    assert (codes[:, 45:] == 0).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_value_that_is_not_finite_spoils_its_own_row_alone(isa: str, format: str, value: float) -> None:
    packed = pack(numbers(70, 200), format)
    values = numbers(8, 200, seed=1)
    clean = linear(packed, quantize(values, format), isa)
    values[5, 199] = value
    rows = quantize(values, format, isa)
    assert rows.finite.ravel().tolist() == [True] * 5 + [False] + [True] * 2
    got = linear(packed, rows, isa)
    assert np.isnan(got[5]).all()
    others = np.arange(8) != 5
    assert got[others].tobytes() == clean[others].tobytes()


# ---- sums -----------------------------------------------------------------------------------------------

# Inputs: one, less and more than a group, not a multiple of 64. Columns: not a multiple of 16, one panel and more.
SHAPES = [(1, 1), (31, 15), (40, 17), (64, 64), (100, 65), (257, 130)]


@pytest.mark.parametrize(("depth", "columns"), SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_the_definition_bit_for_bit_for_1_to_17_rows(
    isa: str, format: str, depth: int, columns: int
) -> None:
    packed = pack(numbers(columns, depth), format)
    rows = quantize(numbers(17, depth, seed=1), format)
    want = expected(packed, rows)
    for count in range(1, 18):
        got = linear(packed, rows, isa, input_rows=np.arange(count, dtype=np.int32))
        assert same_bits(got, want[:count]), f"{count} rows"


def extreme_values(columns: int, depth: int, choices: tuple[float, ...], seed: int) -> Iterator[np.ndarray]:
    """All of one, all of another, taking turns, and at random."""
    for value in choices:
        yield np.full((columns, depth), value, np.float32)
    yield np.tile(np.float32([choices[0], choices[-1]]), (columns, depth))[:, :depth].copy()
    yield np.random.default_rng(seed).choice(np.float32(choices), (columns, depth))


@pytest.mark.parametrize("isa", ISAS)
def test_int8_sums_are_exact_at_the_extreme_codes(isa: str) -> None:
    columns, depth = 33, 200
    packed = pack(numbers(columns, depth), "int8")
    for weights in extreme_values(columns, depth, (127, -127, 0), seed=1):
        packed.set_codes(weights.astype(np.int8))
        assert (packed.codes()[:, :depth] == weights).all()
        for values in extreme_values(7, depth, (1, -1, 0), seed=2):  # codes 255, 1 and 128
            rows = quantize(values, "int8")
            assert set(np.unique(rows.codes)) <= {1, 128, 255}
            assert same_bits(linear(packed, rows, isa), expected(packed, rows))


@pytest.mark.parametrize("format", GROUPS)
@pytest.mark.parametrize("isa", ISAS)
def test_int4_sums_are_exact_at_the_extreme_codes(isa: str, format: str) -> None:
    columns, depth = 33, 256
    packed = pack(numbers(columns, depth), format)
    codes = packed.groups()[:, :, : GROUPS[format] * PANEL // 2]
    for pair in (0x00, 0xFF, 0x0F, 0xF0):
        codes[:] = pair
        assert set(np.unique(packed.codes())) <= {-8, 7}
        for values in extreme_values(7, depth, (1, -1, 0), seed=2):
            rows = quantize(values, format)
            assert same_bits(linear(packed, rows, isa), expected(packed, rows))


@pytest.mark.skipif("avx2" not in ISAS, reason="this machine has no AVX2")
@pytest.mark.parametrize("sign", [1, -1])
def test_avx2_does_not_saturate_where_two_products_of_bytes_leave_16_bits(sign: int) -> None:
    """maddubs adds 255 * 127 twice, 64770, and would stop at 32767."""
    depth = 96
    packed = pack(np.ones((64, depth), np.float32), "int8")
    packed.set_codes(np.full((64, depth), 127 * sign))
    rows = quantize(np.ones((3, depth), np.float32), "int8")
    assert (rows.codes == 255).all()
    got = linear(packed, rows, "avx2")
    scale = rows.scales * packed.scales().T
    assert (got == np.float32(127 * 127 * depth * sign) * scale).all()


@pytest.mark.parametrize("format", FORMATS)
def test_all_instruction_sets_agree_to_the_bit_on_a_large_matrix(format: str) -> None:
    packed = pack(numbers(200, 1500), format)
    values = numbers(29, 1500, seed=1)
    results = [linear(packed, quantize(values, format, isa), isa) for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        assert result.tobytes() == results[0].tobytes(), f"{isa} differs from {ISAS[0]}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_the_same_bits_alone_in_any_batch_in_any_place_and_on_any_threads(
    isa: str, format: str
) -> None:
    packed = pack(numbers(130, 300), format)
    rows = quantize(numbers(40, 300, seed=1), format)
    together = linear(packed, rows, isa)
    for row in range(0, 40, 7):
        alone = linear(packed, rows, isa, input_rows=np.int32([row]))
        assert alone.tobytes() == together[row].tobytes()
    chosen = np.random.default_rng(2).integers(0, 40, 75).astype(np.int32)
    assert linear(packed, rows, isa, input_rows=chosen).tobytes() == together[chosen].tobytes()
    for unit_rows in (1, 4, 7, 13):
        assert linear(packed, rows, isa, unit_rows=unit_rows).tobytes() == together.tobytes()
    pool = _native.Pool(3)
    assert linear(packed, rows, isa, unit_rows=5, pool=pool).tobytes() == together.tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_sums_are_near_those_of_the_unquantised_weights(format: str) -> None:
    weights, values = numbers(100, 1024), numbers(9, 1024, seed=1)
    got = linear(pack(weights, format), quantize(values, format)).astype(np.float64)
    want = values.astype(np.float64) @ weights.astype(np.float64).T
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    # Of both sides: 2^-9 of bfloat16 (uniform), steps of 1 / 127 of the largest of 1024 or 100, eighths for int4.
    assert error < {"bf16": 0.004, "int8": 0.015, "int4_g32": 0.11, "int4_g128": 0.13}[format]


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_sums_are_within_their_rounding_of_float64(isa: str) -> None:
    weights, values = to_bf16(numbers(70, 1024)), to_bf16(numbers(5, 1024, seed=1))
    got = linear(pack(weights, "bf16"), quantize(values, "bf16"), isa)
    exact = values.astype(np.float64) @ weights.astype(np.float64).T
    size = np.abs(values).astype(np.float64) @ np.abs(weights).astype(np.float64).T
    # 1024 additions, each within half a unit in the last place of a sum that grows to `size` at most.
    assert (np.abs(got - exact) <= 1024 * 2.0**-24 * size).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_gives_the_bits_of_the_definition(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(list(FORMATS)))
    isa = data.draw(st.sampled_from(ISAS))
    depth, columns, count = data.draw(
        st.tuples(st.integers(1, 300), st.integers(1, 200), st.integers(1, 40)), label="depth, columns, rows"
    )
    seed = data.draw(st.integers(0, 1000))
    packed = pack(numbers(columns, depth, seed=seed, size=0.02), format, isa)
    rows = quantize(numbers(count, depth, seed=seed + 1, size=3.0), format, isa)
    assert same_bits(linear(packed, rows, isa), expected(packed, rows))


# ---- epilogues ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_bias_and_residual_are_added_in_this_order(isa: str, format: str, columns: int) -> None:
    packed = pack(numbers(columns, 96), format)
    rows = quantize(numbers(9, 96, seed=1), format)
    bias, before = numbers(columns, seed=2), numbers(9, columns, seed=3)
    sums = expected(packed, rows)
    assert same_bits(linear(packed, rows, isa, bias=bias), sums + bias)
    added = linear(packed, rows, isa, epilogue="add", before=before, bias=bias, scale=0.3)
    assert same_bits(added, before + (sums + bias) * np.float32(0.3))
    assert same_bits(linear(packed, rows, isa, epilogue="add", before=before), before + sums)


def activations_of(values: np.ndarray, activation: str, isa: str) -> np.ndarray:
    """act(values), as the bias of a map of zeros."""
    packed = pack(np.zeros((len(values), 32), np.float32), "bf16")
    rows = quantize(np.zeros((1, 32), np.float32), "bf16")
    return linear(packed, rows, isa, epilogue="activate", activation=activation, bias=values)[0]


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_near_the_exact_ones_and_the_same_bits_everywhere(activation: str) -> None:
    values = np.concatenate((np.linspace(-12, 12, 5000), [0.0, 1e-8, -1e-8, 80.0, -80.0])).astype(np.float32)
    results = [activations_of(values, activation, isa) for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        assert result.tobytes() == results[0].tobytes(), f"{isa} differs from {ISAS[0]}"
    exact = ACTIVATIONS[activation](torch.from_numpy(values).double()).numpy()
    # Absolutely within 1e-6 of the input's size: erf is known to 3e-7.
    assert (np.abs(results[0] - exact) <= 1e-6 * np.maximum(1, np.abs(values))).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_let_what_is_not_a_number_through(isa: str, activation: str) -> None:
    values = np.float32([1.0, np.nan, -1.0])
    assert np.isnan(activations_of(values, activation, isa)).tolist() == [False, True, False]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "clamped_swiglu"])
@pytest.mark.parametrize("format", FORMATS)
def test_gates_and_ups_of_a_panel_are_multiplied(format: str, activation: str) -> None:
    packed = pack(numbers(192, 64), format)
    rows = quantize(numbers(9, 64, seed=1), format)
    bias = numbers(192, seed=2)
    options = {"activation": activation, "bias": bias, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    results = [linear(packed, rows, isa, epilogue="gate_up", **options) for isa in ISAS]
    for isa, result in zip(ISAS, results, strict=True):
        assert result.tobytes() == results[0].tobytes(), f"{isa} differs from {ISAS[0]}"
    sums = torch.from_numpy(expected(packed, rows) + bias).double().view(9, 3, 2, 32)
    gate, up = sums[:, :, 0].flatten(1), sums[:, :, 1].flatten(1)
    if activation == "clamped_swiglu":
        assert (gate > 7).any() and (up.abs() > 7).any(), "nothing is clamped"
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        want = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    else:
        want = ACTIVATIONS[activation](gate) * up
    scale = np.maximum(1, np.abs(gate.numpy())) * np.maximum(1, np.abs(up.numpy()))
    assert (np.abs(results[0] - want.numpy()) <= 2e-6 * scale).all()


# ---- what is refused ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    packed = pack(numbers(64, 64), "int8")
    rows = quantize(numbers(3, 64), "int8")
    out = np.zeros((3, 64), np.float32)

    def refuses(sentence: str, **changed: object) -> None:
        arguments = {
            "memory": packed.memory,
            "offset": 0,
            "columns": 64,
            "rows": rows,
            "out": out,
        } | changed
        with pytest.raises(ValueError, match=sentence):
            _native.linear(**arguments)

    refuses("more than the .* leave", columns=65)
    refuses("more than the .* leave", rows=quantize(numbers(3, 65), "int8"))
    refuses("more than the .* leave", offset=64)
    refuses("more than the .* leave", offset=-64)
    refuses("at least one column", columns=0)
    refuses(
        "aligned to 64 bytes", memory=packed.memory[1:], columns=60, rows=quantize(numbers(3, 32), "int8")
    )
    refuses(r"out is \[2, 64\], not \[3, 64\]", out=out[:2])
    refuses(r"out is \[3, 64\], not \[3, 32\]", epilogue="gate_up")
    refuses("there is no epilogue 'none'; there are: store", epilogue="none")
    refuses("there is no activation 'tanh'; there are: silu", activation="tanh")
    refuses("wants gates and ups", epilogue="activate", activation="clamped_swiglu")
    refuses("bias has 63 numbers", bias=numbers(63))
    refuses("no row 3", input_rows=np.int32([0, 3, 1]))
    refuses("no row -1", input_rows=np.int32([0, -1, 1]))
    refuses("not negative", unit_rows=-1)
    refuses("no instruction set 'mmx'", isa="mmx")
    with pytest.raises(ValueError, match="no weight format 4"):
        _native.QuantizedRows(numbers(3, 64), 4)
    with pytest.raises(ValueError, match="cannot be quantised"):
        _native.QuantizedRows(np.zeros((3, 0), np.float32), 1)


def test_no_rows_are_no_work() -> None:
    packed = pack(numbers(64, 64), "int8")
    assert linear(packed, quantize(np.zeros((0, 64), np.float32), "int8")).shape == (0, 64)


# ---- measures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_measures_say_how_much_they_did(isa: str) -> None:
    memory = _native.Arena(5 << 20).memory
    pool = _native.Pool(2)
    assert _native.read_stream(memory[: (3 << 20) + 7], isa=isa) == 3 << 20
    assert _native.read_stream(memory, pool, isa) == 5 << 20
    assert _native.repeat_dot(FORMATS["bf16"], 1000, isa=isa) == 1000 * 64
    assert _native.repeat_dot(FORMATS["int8"], 1000, pool, isa) == 2 * 1000 * 128
    assert _native.repeat_dot(FORMATS["int4_g32"], 1000, isa=isa) == 1000 * 128
    with pytest.raises(ValueError, match="at least a mebibyte"):
        _native.read_stream(memory[:100])
