"""Hidden states on the wire: exact lengths, bounded errors, nothing invented."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from plait.errors import BadFrame
from plait.wire import HiddenFormat, decode_hidden, encode_hidden, hidden_bytes, surely_finite
from plait.wire.hidden import INT8_BLOCK_VALUES

FORMATS: tuple[HiddenFormat, ...] = ("float32", "bfloat16", "int8")
finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
states = arrays.arrays(
    np.float32, st.tuples(st.integers(0, 5), st.integers(1, 3 * INT8_BLOCK_VALUES)), elements=finite
)


def through(values: NDArray[np.float32], format: HiddenFormat) -> NDArray[np.float32]:
    buffers = encode_hidden(values, format)
    assert tuple(len(buffer) for buffer in buffers) == hidden_bytes(format, *values.shape)
    decoded = decode_hidden([bytes(buffer) for buffer in buffers], format, *values.shape)
    assert decoded.dtype == np.float32 and decoded.shape == values.shape
    return decoded


@given(states)
def test_float32_is_exact(values: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(through(values, "float32"), values)


@given(states)
def test_bfloat16_is_the_nearest(values: NDArray[np.float32]) -> None:
    error = np.abs(through(values, "bfloat16").astype(np.float64) - values)
    assert (error <= np.abs(values.astype(np.float64)) * 2.0**-8).all()  # half of the last of 8 bits


def test_bfloat16_rounds_ties_to_even() -> None:
    step = 2.0**-7  # between neighbours above 1
    values = np.array(
        [[1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), 1 + step / 2 + 2.0**-20]], np.float32
    )
    assert through(values, "bfloat16").tolist() == [[1, 1 + 2 * step, -1, 1 + step]]


@given(states)
def test_int8_errs_by_half_a_step_of_its_block(values: NDArray[np.float32]) -> None:
    decoded = through(values, "int8").astype(np.float64)
    for start in range(0, values.shape[1], INT8_BLOCK_VALUES):
        block = values[:, start : start + INT8_BLOCK_VALUES].astype(np.float64)
        error = np.abs(decoded[:, start : start + INT8_BLOCK_VALUES] - block)
        if block.size:
            # A step is the largest value / 127, and the scale that is sent at most 1/128 above that.
            bound = np.abs(block).max(axis=1, keepdims=True) / 127 * (1 + 2.0**-7) / 2 + 2.0**-126
            assert (error <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_does_not_depend_on_its_batch(format: HiddenFormat) -> None:
    values = np.random.default_rng(0).standard_normal((7, 200)).astype(np.float32)
    alone = np.concatenate([through(values[row : row + 1], format) for row in range(7)])
    np.testing.assert_array_equal(through(values, format), alone)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(format: HiddenFormat, wrong: float) -> None:
    values = np.ones((2, 130), np.float32)
    values[1, 70] = wrong
    decoded = through(values, format)
    assert not np.isfinite(decoded[1, 70])
    assert np.isfinite(decoded[0]).all() and np.isfinite(decoded[1, :64]).all()


def test_nan_of_any_payload_stays_nan_in_bfloat16() -> None:
    bits = np.array([[0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF80FFFF]], np.uint32)
    assert np.isnan(through(bits.view(np.float32), "bfloat16")).all()


def test_rows_of_a_larger_array_can_be_sent() -> None:
    values = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    for format in FORMATS:
        np.testing.assert_array_equal(through(values[::2], format), through(values[::2].copy(), format))


def test_float32_is_not_copied() -> None:
    values = np.zeros((2, 4), np.float32)
    (buffer,) = encode_hidden(values, "float32")
    values[1, 3] = 1
    assert decode_hidden([buffer], "float32", 2, 4)[1, 3] == 1


@pytest.mark.parametrize("format", FORMATS)
def test_buffers_of_another_size_are_refused(format: HiddenFormat) -> None:
    good = [bytes(buffer) for buffer in encode_hidden(np.zeros((3, 70), np.float32), format)]
    for bad in ([], good[:-1], [*good, b""], [good[0] + b"\0", *good[1:]]):
        with pytest.raises(BadFrame, match="bytes for"):
            decode_hidden(bad, format, 3, 70)
    with pytest.raises(BadFrame, match="unknown format"):
        decode_hidden(good, "float8", 3, 70)  # type: ignore[arg-type]


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(width=32))
)
def test_what_is_surely_finite_is_finite(values: NDArray[np.float32]) -> None:
    assert np.isfinite(values).all() or not surely_finite(values)


def test_a_token_of_ordinary_numbers_is_seen_to_be_finite() -> None:
    rows = np.random.default_rng(0).normal(0, 1000, (1, 4096)).astype(np.float32)
    assert surely_finite(rows)
    for wrong in (np.nan, np.inf, -np.inf):
        rows[0, 17] = wrong
        assert not surely_finite(rows)
