# pyright: standard
"""Attention by parts: near the whole, and the same bits whatever parts a context is cut into."""

from collections.abc import Iterable

import numpy as np
import pytest
from test_attention import FEATURES, FORMATS, ISAS, Sequence, Shape

from plait.kernels import _native

TOKENS = 1100
Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def part_of(sequence: Sequence, blocks: Iterable[int], rows: slice, isa: str = "", threads: int = 1) -> Part:
    """The part that these blocks of the table are of the attention of the rows, all of which come later."""
    shape = sequence.shape
    description = {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "dim": shape.dim,
        **{name: value for name, value in shape.options().items() if name != "sinks"},
    }
    lender = _native.Lender(
        _native.Pool(threads),
        [description] * 2,
        sequence.format,
        shape.kv_heads,
        shape.dim,
        sequence.block_tokens,
        2**20,
        isa,
    )
    count, chosen = rows.stop - rows.start, sorted(blocks)
    part = (
        np.full((count, shape.heads), np.nan),
        np.full((count, shape.heads), np.nan),
        np.full((count, shape.heads, shape.dim), np.nan),
    )
    lender.attend(
        sequence.kv.bytes,
        sequence.LAYER,
        sequence.table[chosen],
        np.array(chosen, dtype=np.int64) * sequence.block_tokens,
        rows.start,
        sequence.queries[rows].copy(),
        part,
    )
    return part


def merged(parts: list[Part]) -> Part:
    most = np.max([part[0] for part in parts], axis=0)
    factors = [np.exp2(part[0] - np.where(np.isinf(most), 0, most)) for part in parts]
    weight = sum(factor * part[1] for factor, part in zip(factors, parts, strict=True))
    summed = sum(factor[..., None] * part[2] for factor, part in zip(factors, parts, strict=True))
    return most, np.asarray(weight), np.asarray(summed)


def written(shape: Shape, format: str, block_tokens: int = 16) -> Sequence:
    sequence = Sequence(shape, format, TOKENS, block_tokens=block_tokens)
    sequence.append(TOKENS)
    return sequence


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
@pytest.mark.parametrize("rows", [slice(1088, 1089), slice(1072, 1100)], ids=["decoding", "chunk"])
def test_a_part_is_near_float64(shape: Shape, format: str, rows: slice) -> None:
    """Of the keys before the rows' first, in blocks that are cut at random places."""
    sequence = written(shape, format)
    _, weight, summed = part_of(sequence, range(rows.start // 16), rows)
    keys, values = (
        np.repeat(each[: rows.start].astype(np.float64), shape.group, axis=1)
        for each in (sequence.keys, sequence.values)
    )
    scores: np.ndarray = (
        np.einsum("qhd,khd->hqk", sequence.queries[rows].astype(np.float64), keys) * shape.scale
    )
    if shape.softcap:
        scores = np.tanh(scores / shape.softcap) * shape.softcap
    positions = np.arange(rows.start)
    if shape.slopes is not None:
        scores += shape.slopes[:, None, None] * positions
    for row, position in enumerate(range(rows.start, rows.stop)):
        scores[:, row, : shape.first_key(position)] = -np.inf
    seen = np.isfinite(
        scores.max(-1)
    )  # [heads, rows]; a chunk's later rows may see nothing of what is before it
    assert np.array_equal(weight.T > 0, seen) and seen.any()
    weights = np.exp(scores - np.where(seen, scores.max(-1), 0)[..., None])
    wanted = np.einsum("hqk,khd->qhd", weights, values) / np.where(seen, weights.sum(-1), 1).T[..., None]
    found = summed / np.where(seen.T, weight, 1)[..., None]
    # Keys, queries, values and weights are rounded to 8 bits each; scores of up to 20 turn that into 2^-5.
    assert np.abs(found - wanted).max() < 2**-4 * np.abs(values).max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_tokens", [16, 48, 64, 1024])
@pytest.mark.parametrize("shape", [FEATURES[0], FEATURES[3], FEATURES[8]], ids=str)
def test_parts_have_the_same_bits_whatever_the_cut(shape: Shape, format: str, block_tokens: int) -> None:
    """After rounding to float32, as the attention that is made of them is."""
    sequence = written(shape, format, block_tokens)
    rng = np.random.default_rng(5)
    blocks = np.arange(1088 // block_tokens)
    for rows in (slice(1088, 1089), slice(1088, 1100)):
        _, weight, summed = part_of(sequence, blocks, rows, threads=2)
        seen = weight > 0
        whole = (summed[seen] / weight[seen][:, None]).astype(np.float32)
        for holders in (2, 3, 7):
            holder = rng.integers(0, holders, len(blocks))
            parts = [part_of(sequence, blocks[holder == number], rows) for number in range(holders)]
            _, weight, summed = merged(parts)
            assert np.array_equal(weight > 0, seen)
            assert np.array_equal((summed[seen] / weight[seen][:, None]).astype(np.float32), whole)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_every_instruction_set_gives_parts_of_the_same_bits(shape: Shape, format: str) -> None:
    sequence = written(shape, format)
    blocks = [*range(10, 40), *range(45, 68)]
    expected = part_of(sequence, blocks, slice(1088, 1094), ISAS[0])
    for isa in ISAS[1:]:
        for ours, theirs in zip(part_of(sequence, blocks, slice(1088, 1094), isa), expected, strict=True):
            assert np.array_equal(ours, theirs), isa


@pytest.mark.parametrize("format", FORMATS)
def test_a_part_that_a_row_sees_nothing_of_is_empty(format: str) -> None:
    sequence = written(FEATURES[3], format)  # a window of 100
    for blocks in ([], [0, 1, 2]):
        most, weight, summed = part_of(sequence, blocks, slice(1088, 1090))
        assert np.all(most == -np.inf) and not weight.any() and not summed.any()
    sequence.keys[5] = np.nan
    sequence.written = 0
    sequence.append(TOKENS)
    part = part_of(sequence, [0, 65, 66, 67], slice(1088, 1089))
    assert all(np.isfinite(each).all() for each in part)  # what is not seen spoils nothing
