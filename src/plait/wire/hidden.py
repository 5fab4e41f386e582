"""Hidden states on the wire: float32 as they are, bfloat16, or int8 with a scale for each block of values.

    float32    4 bytes a value, exact
    bfloat16   2 bytes, rounded to nearest even
    int8       1 byte, and a bfloat16 scale (largest magnitude / 127, rounded up) for every 64 values of a token

Of the blocks and scales that take as many bytes, these err least: at 1.03 bytes a value 0.71 % of the embedded model's
hidden states, against 0.82 % for blocks of 128 with float32 scales (bench/hidden_formats.py measures both, and what
either does to a model's answers).

A block never crosses a token, so a token's bytes do not depend on what it travels with: the same input gives the same
output in any batch. What is not finite stays visible: NaN and infinity pass float32 and bfloat16, and make their whole
block NaN in int8.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from plait.errors import BadFrame
from plait.wire.frame import Buffer

HiddenFormat = Literal["float32", "bfloat16", "int8"]
INT8_BLOCK_VALUES = 64
_INT8_MAX = 127.0
# Of the arrays' type: Python's integers would be converted each time, which takes longer than a token's arithmetic.
_HALF_BITS, _ROUNDING, _ONE = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_QUICK_VALUES = 1 << 13
_Value = TypeVar("_Value", bound=np.generic)


def hidden_bytes(format: HiddenFormat, tokens: int, hidden: int) -> tuple[int, ...]:
    """Lengths of the buffers that [tokens, hidden] values become."""
    match format:
        case "float32":
            return (4 * tokens * hidden,)
        case "bfloat16":
            return (2 * tokens * hidden,)
        case "int8":
            return (tokens * hidden, 2 * tokens * _blocks(hidden))


def encode_hidden(values: NDArray[np.float32], format: HiddenFormat) -> tuple[memoryview, ...]:
    """The buffers of float32 [tokens, hidden]; those of "float32" are the array itself, if it is contiguous."""
    assert values.dtype == np.float32 and values.ndim == 2
    match format:
        case "float32":
            return (_bytes(np.ascontiguousarray(values, "<f4")),)
        case "bfloat16":
            return (_bytes(_to_bfloat16(values)),)
        case "int8":
            codes, scales = _to_int8(values)
            return (_bytes(codes), _bytes(scales))


def decode_hidden(
    buffers: Sequence[Buffer], format: HiddenFormat, tokens: int, hidden: int
) -> NDArray[np.float32]:
    """Float32 [tokens, hidden] from the buffers of `encode_hidden`; "float32" is a view of its buffer.

    Raises:
        BadFrame: the buffers are not those of so many values.
    """
    if format not in get_args(HiddenFormat):
        raise BadFrame(f"hidden states in an unknown format {format!r}")
    expected = hidden_bytes(format, tokens, hidden)
    found = tuple(memoryview(buffer).nbytes for buffer in buffers)
    if found != expected:
        raise BadFrame(
            f"buffers of {found} bytes for [{tokens}, {hidden}] hidden states in {format}, which take {expected}"
        )
    match format:
        case "float32":
            return np.frombuffer(buffers[0], "<f4").reshape(tokens, hidden)
        case "bfloat16":
            return _from_bfloat16(np.frombuffer(buffers[0], "<u2")).reshape(tokens, hidden)
        case "int8":
            codes = np.frombuffer(buffers[0], np.int8).reshape(tokens, hidden)
            scales = np.frombuffer(buffers[1], "<u2").reshape(tokens, _blocks(hidden))
            return _from_int8(codes, scales)


def surely_finite(values: NDArray[np.float32]) -> bool:
    """True only if no value is infinite or NaN; False also says nothing: of many or huge values it does not tell.

    A tenth of the time that looking at each takes, where that is most of the work: for a token or two.
    """
    if values.size > _QUICK_VALUES:  # BLAS would use threads
        return False
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        return math.isfinite(flat.dot(flat))


def _blocks(hidden: int) -> int:
    return -(-hidden // INT8_BLOCK_VALUES)


def _bytes(array: NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the floats, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> _HALF_BITS
    rounded &= _ONE
    rounded += _ROUNDING
    rounded += bits
    rounded >>= _HALF_BITS
    halves = rounded.astype("<u2")
    if not surely_finite(values):  # of NaN the carry could have made infinity or zero
        halves[np.isnan(values)] = 0x7FC0
    return halves


def _from_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    bits = halves.astype(np.uint32)
    bits <<= _HALF_BITS
    return bits.view(np.float32)


def _to_int8(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """Codes int8 [tokens, hidden] and scales bfloat16 [tokens, blocks]."""
    tokens, hidden = values.shape
    padded = _in_blocks(values)  # [tokens, blocks, block values]
    with np.errstate(all="ignore"):
        largest = np.abs(padded).max(axis=2)
        scales = _to_bfloat16_upward(largest / np.float32(_INT8_MAX))
        divisor = _from_bfloat16(scales)
        steps = np.rint(padded / np.where(divisor == 0, np.float32(1), divisor)[:, :, None])
    codes = np.clip(np.nan_to_num(steps, nan=0.0), -_INT8_MAX, _INT8_MAX).astype(np.int8)
    return np.ascontiguousarray(
        codes.reshape(tokens, scales.shape[1] * INT8_BLOCK_VALUES)[:, :hidden]
    ), scales


def _to_bfloat16_upward(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The least bfloat16 that is not below each value: no code then exceeds 127. What is not finite becomes NaN."""
    bits = values.view(np.uint32)
    halves = ((bits + np.uint32(0xFFFF)) >> 16).astype("<u2")
    halves[~np.isfinite(values)] = 0x7FC0
    return halves


def _from_int8(codes: NDArray[np.int8], scales: NDArray[np.uint16]) -> NDArray[np.float32]:
    tokens, hidden = codes.shape
    padded = _in_blocks(codes).astype(np.float32)
    with np.errstate(all="ignore"):
        padded *= _from_bfloat16(scales)[:, :, None]
    return np.ascontiguousarray(padded.reshape(tokens, scales.shape[1] * INT8_BLOCK_VALUES)[:, :hidden])


def _in_blocks(values: NDArray[_Value]) -> NDArray[_Value]:
    """[tokens, hidden] as [tokens, blocks, block values], filled up with zeros."""
    tokens, hidden = values.shape
    blocks = _blocks(hidden)
    missing = blocks * INT8_BLOCK_VALUES - hidden
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return values.reshape(tokens, blocks, INT8_BLOCK_VALUES)
