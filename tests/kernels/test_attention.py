"""Attention over paged keys and values: near float64, and the same bits however the work is cut.

Three references, from far to near: attention in float64 over the numbers that were given; the same over the numbers
that are stored (bfloat16, or codes and scales); and the canonical order of csrc/attention.inl, operation by operation,
which is compared bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.kernels import isa_names, native_available

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)

from plait.kernels import _native

ISAS = isa_names()
BEST = ISAS[0]
FORMATS = ("bf16", "int8")
TILE = 16
PARTITION = 512
MOST_PRODUCT_ROWS = 64
LOG2_E = np.float32(1.44269504088896341)
GARBAGE = 0xFF  # NaN as bfloat16 and as float32, -1 as a code


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Shape:
    """What attention is done with; the names are those of KvPages.attend."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    window_tokens: int = 0
    chunk_tokens: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    has_slopes: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def sinks(self) -> np.ndarray | None:
        return np.linspace(-2, 4, self.heads, dtype=np.float32) if self.has_sinks else None

    @property
    def slopes(self) -> np.ndarray | None:
        return np.float32(2) ** -np.arange(1, self.heads + 1, dtype=np.float32) if self.has_slopes else None

    def options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "window_tokens": self.window_tokens,
            "chunk_tokens": self.chunk_tokens,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "slopes": self.slopes,
        }

    def first_key(self, position: int) -> int:
        first = 0
        if self.window_tokens:
            first = max(first, position - self.window_tokens + 1)
        if self.chunk_tokens:
            first = max(first, position - position % self.chunk_tokens)
        return first


FEATURES = (
    Shape(),
    Shape(heads=8, kv_heads=1, dim=16),
    Shape(heads=3, kv_heads=3, dim=80),
    Shape(heads=7, kv_heads=1, dim=128, window_tokens=100),
    Shape(heads=6, kv_heads=2, dim=32, chunk_tokens=96),
    Shape(heads=5, kv_heads=1, softcap=3.0),
    Shape(heads=2, kv_heads=2, dim=256, has_sinks=True),
    Shape(heads=4, kv_heads=1, has_slopes=True),
    Shape(heads=12, kv_heads=4, dim=48, window_tokens=200, softcap=5.0, has_sinks=True, has_slopes=True),
)


@dataclass
class Sequence:
    """A sequence of random tokens in KV memory of its own, which held garbage before."""

    shape: Shape
    format: str
    tokens: int
    isa: str = BEST
    block_tokens: int = 16
    threads: int = 1
    seed: int = 0
    kv: _native.KvPages = field(init=False)
    table: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    values: np.ndarray = field(init=False)
    queries: np.ndarray = field(init=False)
    written: int = field(init=False, default=0)

    LAYER = 1

    def __post_init__(self) -> None:
        shape = self.shape
        blocks = -(-self.tokens // self.block_tokens)
        self.kv = _native.KvPages(
            self.format, 2, shape.kv_heads, shape.dim, self.block_tokens, blocks + 3, self.threads
        )
        self.kv.bytes[:] = GARBAGE
        order = np.random.default_rng([self.seed, self.block_tokens]).permutation(blocks + 3)
        self.table = order[:blocks].astype(np.int32)
        self.keys = normal(self.tokens, shape.kv_heads, shape.dim, seed=self.seed + 1)
        self.values = normal(self.tokens, shape.kv_heads, shape.dim, seed=self.seed + 2)
        self.queries = 2 * normal(self.tokens, shape.heads, shape.dim, seed=self.seed + 3)

    def append(self, end: int) -> None:
        """Write the tokens up to `end`."""
        new = slice(self.written, end)
        self.kv.append(self.isa, self.LAYER, self.table, self.written, self.keys[new], self.values[new])
        self.written = end

    def attend(self, start: int, end: int, **options: Any) -> _native.AttentionRun:
        """The rows of the positions from `start` to `end`."""
        parts = np.array([[0, start, end - start]])
        known = self.shape.options() | {"isa": self.isa} | options
        isa = known.pop("isa")
        return self.kv.attend(isa, self.LAYER, self.queries[start:end].copy(), parts, [self.table], **known)

    def whole(self, **options: Any) -> np.ndarray:
        """All rows, [tokens, heads, dim], in one prefill."""
        self.append(self.tokens)
        return self.attend(0, self.tokens, **options).out


def assert_same_bits(got: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes(), f"{what}: {np.abs(got - expected).max()} apart"


# ---- references -----------------------------------------------------------------------------------------


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def codes_of(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes -127 .. 127 of the vectors on the last axis, and the step of each."""
    bound = np.abs(vectors).max(-1, keepdims=True)
    return np.rint(vectors * (np.float32(127) / bound)), bound / np.float32(127)


def stored(vectors: np.ndarray, format: str) -> np.ndarray:
    """What the cache keeps of keys or values, as float64."""
    if format == "bf16":
        return bf16(vectors).astype(np.float64)
    codes, step = codes_of(vectors)
    return codes.astype(np.float64) * step


def seen_queries(shape: Shape, queries: np.ndarray, format: str) -> np.ndarray:
    """Queries times the scale as the scores see them, as float64."""
    if format == "bf16":
        # The scale and log2 e are multiplied in before rounding, unless a softcap comes between.
        factor = np.float32(shape.scale) * (np.float32(1) if shape.softcap else LOG2_E)
        return bf16(queries * factor).astype(np.float64) / (1.0 if shape.softcap else float(LOG2_E))
    codes, step = codes_of(queries)
    return codes.astype(np.float64) * step * shape.scale


def attention_float64(
    shape: Shape, scaled_queries: np.ndarray, keys: np.ndarray, values: np.ndarray, start: int
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Attention of rows from position `start` on, [rows, heads, dim], and the weights of each row and head."""
    out = np.zeros(scaled_queries.shape)
    weights: list[list[np.ndarray]] = []
    for row in range(len(scaled_queries)):
        position = start + row
        seen = slice(shape.first_key(position), position + 1)
        weights.append([])
        for head in range(shape.heads):
            kv_head = head // shape.group
            scores = keys[seen, kv_head].astype(np.float64) @ scaled_queries[row, head].astype(np.float64)
            if shape.softcap:
                scores = np.tanh(scores / shape.softcap) * shape.softcap
            if shape.slopes is not None:
                scores = scores + shape.slopes[head] * np.arange(seen.start, seen.stop, dtype=np.float64)
            peak, total = scores.max(), 0.0
            if shape.sinks is not None:
                peak = max(peak, shape.sinks[head])
                total = np.exp(shape.sinks[head] - peak)
            weight = np.exp(scores - peak)
            total += weight.sum()
            weights[-1].append(weight / total)
            out[row, head] = weights[-1][-1] @ values[seen, kv_head].astype(np.float64)
    return out, weights


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_attention_is_that_of_float64_over_what_is_stored(shape: Shape, format: str) -> None:
    sequence = Sequence(shape, format, tokens=600)
    sequence.append(600)
    start = 597
    got = sequence.attend(start, 600).out
    keys, values = stored(sequence.keys, format), stored(sequence.values, format)
    queries = seen_queries(shape, sequence.queries[start:], format)
    exact, weights = attention_float64(shape, queries, keys, values, start)
    for row in range(len(got)):
        first = shape.first_key(start + row)
        for head in range(shape.heads):
            seen = np.abs(values[first : start + row + 1, head // shape.group])
            weight = weights[row][head]
            if format == "bf16":  # each weight is rounded by at most 2^-9 of itself
                bound = weight @ seen * 2**-9
            else:  # each weight times its value's scale, by at most half a step of its tile: a code is at most 127
                steps = seen.max(-1) / 127
                tiles = np.arange(first, start + row + 1) // TILE
                largest = np.zeros(tiles.max() + 1)
                np.maximum.at(largest, tiles, weight * steps)
                bound = np.full(shape.dim, (largest[tiles] / 510 * 127).sum())
            # Sums in float32 and weights within 2^-18; scores of about 1000 (slopes) within 2^-14.
            bound = bound + 2**-12 * seen.max()
            assert (np.abs(got[row, head] - exact[row, head]) <= bound).all(), (row, head)


@pytest.mark.parametrize(("format", "most"), [("bf16", 2**-7), ("int8", 2**-6)])
def test_attention_is_that_of_float64_over_what_was_given(format: str, most: float) -> None:
    """Rounding queries, keys, values and weights costs 2^-9 of each at most (int8: of the largest, four times as much
    of a typical one); these errors are independent, and their mean square is compared."""
    shape = Shape(heads=8, kv_heads=2, dim=128)
    sequence = Sequence(shape, format, tokens=700)
    got = sequence.whole()[-8:]
    queries = sequence.queries[-8:].astype(np.float64) * shape.scale
    exact, _ = attention_float64(shape, queries, sequence.keys, sequence.values, 692)
    assert np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)) < most


# ---- the canonical order, operation by operation ---------------------------------------------------------


def fused(sums: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sums + a * b, rounded once to float32; a and b are bfloat16, whose product is exact."""
    product, wide = a.astype(np.float64) * b.astype(np.float64), sums.astype(np.float64)
    total = wide + product
    # What that lost (Knuth's two-sum) decides roundings to float32 that would now be ties: round to odd.
    back = total - wide
    lost = (wide - (total - back)) + (product - back)
    bits = total.view(np.int64)
    even = (lost != 0) & (bits & 1 == 0)
    toward = np.where((lost > 0) == (total > 0), 1, -1)
    return (bits + np.where(even, toward, 0)).view(np.float64).astype(np.float32)


def power_of_two(x: np.ndarray) -> np.ndarray:
    """2^x for x <= 0, as attention.inl computes it."""
    x = np.maximum(x, np.float32(-127))
    whole = np.rint(x)
    r = x - whole
    square = r * r
    low = np.float32(1) + r * np.float32(0.6931241751)
    high = (np.float32(0.2402409911) + r * np.float32(0.05590642616)) + square * np.float32(0.009582852945)
    bits = (low + square * high).view(np.int32) + (whole.astype(np.int32) << 23)
    powers = bits.view(np.float32)
    return np.where(powers < np.float32(2.0**-126), np.float32(0), powers)


def tree_sum(lanes: np.ndarray) -> np.float32:
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def canonical(sequence: Sequence, position: int, head: int) -> np.ndarray:
    """One row under one head [dim], in the order that defines its bits; without softcap."""
    shape, format = sequence.shape, sequence.format
    end = position + 1
    keys, values = (plane[:end, head // shape.group] for plane in (sequence.keys, sequence.values))
    query = sequence.queries[position, head]
    factor = np.float32(shape.scale) * LOG2_E
    if format == "bf16":
        query, keys, values = bf16(query * factor), bf16(keys), bf16(values)
        scores = np.zeros(end, np.float32)
        for pair in range(0, shape.dim, 2):
            scores = fused(scores, query[pair + 1], keys[:, pair + 1])
            scores = fused(scores, query[pair], keys[:, pair])
    else:
        (query_codes, query_step), (key_codes, key_steps) = codes_of(query), codes_of(keys)
        dots = (key_codes @ query_codes).astype(np.float32)  # whole numbers below 2^24
        scores = dots * (key_steps[:, 0] * (factor * query_step))
    if shape.slopes is not None:
        scores = scores + np.arange(end, dtype=np.float32) * (shape.slopes[head] * LOG2_E)
    first = shape.first_key(position)
    sink = None if shape.sinks is None else shape.sinks[head] * LOG2_E
    peak = scores[first:].max() if sink is None else max(scores[first:].max(), sink)
    weights = power_of_two(scores - peak)
    weights[:first] = 0

    total, out = np.float32(0), np.zeros(shape.dim, np.float32)
    for begin in range(0, end, PARTITION):
        size = min(PARTITION, end - begin)
        tiles = -(-size // TILE)
        padded = np.zeros(tiles * TILE, np.float32)
        padded[:size] = weights[begin : begin + size]
        own = np.zeros((tiles * TILE, shape.dim), np.float32)
        own[:size] = values[begin : begin + size]
        lanes = np.zeros(TILE, np.float32)
        for tile in padded.reshape(tiles, TILE):
            lanes = lanes + tile
        total = total + tree_sum(lanes)
        sums = np.zeros(shape.dim, np.float32)
        if format == "bf16":
            rounded = bf16(padded)
            for pair in range(0, len(padded), 2):
                sums = fused(sums, rounded[pair + 1], own[pair + 1])
                sums = fused(sums, rounded[pair], own[pair])
        else:
            codes, steps = np.zeros((tiles * TILE, shape.dim)), np.zeros(tiles * TILE, np.float32)
            value_codes, value_steps = codes_of(values[begin : begin + size])
            codes[:size], steps[:size] = value_codes, value_steps[:, 0]
            folded = (padded * steps).reshape(tiles, TILE)
            for tile in range(tiles):
                largest = folded[tile].max()
                if largest <= np.float32(1e-30):
                    continue
                weight_codes = np.rint(folded[tile] * (np.float32(255) / largest))
                dots = (weight_codes @ codes[tile * TILE : (tile + 1) * TILE]).astype(np.float32)
                sums = sums + dots * (largest * np.float32(1 / 255))
        out = out + sums
    if sink is not None:
        total = total + power_of_two(np.array([sink - peak], np.float32))[0]
    return out / total


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [shape for shape in FEATURES if not shape.softcap], ids=str)
def test_bits_are_those_of_the_canonical_order(shape: Shape, format: str) -> None:
    sequence = Sequence(shape, format, tokens=531)
    got = sequence.whole()
    for position in (0, 17, 511, 530):
        for head in range(0, shape.heads, shape.group):
            assert_same_bits(got[position, head], canonical(sequence, position, head), (position, head))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_every_instruction_set_gives_the_same_bits(shape: Shape, format: str) -> None:
    tokens, start = 540, 523
    expected = None
    for isa in ISAS:
        sequence = Sequence(shape, format, tokens, isa=isa)
        sequence.append(tokens)
        rows = sequence.attend(start, tokens).out
        split = sequence.attend(tokens - 1, tokens, way="split").out
        if expected is None:
            expected = rows, split, sequence.kv.bytes.copy()
        assert_same_bits(rows, expected[0], isa)
        assert_same_bits(split, expected[1], isa)
        assert_same_bits(sequence.kv.bytes, expected[2], isa)


# ---- however the work is cut -------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads = draw(st.integers(1, 3))
    return Shape(
        heads=kv_heads * draw(st.integers(1, 8)),
        kv_heads=kv_heads,
        dim=draw(st.sampled_from((16, 32, 64, 80, 128, 256))),
        window_tokens=draw(st.sampled_from((0, 0, 1, 37, 512))),
        chunk_tokens=draw(st.sampled_from((0, 0, 24, 300))),
        softcap=draw(st.sampled_from((0.0, 2.0))),
        has_sinks=draw(st.booleans()),
        has_slopes=draw(st.booleans()),
    )


def some_cuts(tokens: int, seed: int) -> Iterator[tuple[int, int]]:
    """Chunks that cover the tokens in order."""
    inner = np.random.default_rng(seed).integers(1, max(2, tokens), 4).tolist()
    bounds = sorted({0, tokens, *(cut for cut in inner if cut < tokens)})
    yield from pairwise(bounds)


@given(
    shape=shapes(),
    format=st.sampled_from(FORMATS),
    tokens=st.one_of(st.integers(1, 60), st.integers(490, 700)),
    seed=st.integers(0, 2**16),
)
def test_a_row_has_the_same_bits_however_its_prefill_is_cut(
    shape: Shape, format: str, tokens: int, seed: int
) -> None:
    expected = Sequence(shape, format, tokens, seed=seed).whole()
    # In chunks, each before the next is written: what lies behind is garbage. Elsewhere, in blocks of another size.
    chunked = Sequence(shape, format, tokens, seed=seed, block_tokens=48)
    for begin, end in some_cuts(tokens, seed):
        chunked.append(end)
        assert_same_bits(chunked.attend(begin, end).out, expected[begin:end], "chunks")
    # As decoding does it: the last token alone, whole or cut along its keys.
    last = tokens - 1
    for way in ("whole", "split"):
        assert_same_bits(chunked.attend(last, tokens, way=way).out, expected[last:], way)
    # In units of other sizes, whatever lies behind the last token.
    for rows in {1, 3, max(1, MOST_PRODUCT_ROWS // shape.group)}:
        if rows == 1 or rows * shape.group <= MOST_PRODUCT_ROWS:
            assert_same_bits(chunked.attend(0, tokens, unit_rows=rows).out, expected, f"{rows} rows")


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_when_it_decodes(format: str) -> None:
    shape = Shape(heads=6, kv_heads=2, dim=32)
    expected = Sequence(shape, format, 530).whole()
    decoding = Sequence(shape, format, 530, block_tokens=32)
    for position in range(530):
        decoding.append(position + 1)
        if position < 40 or position > 500:
            for way in ("whole", "split"):
                got = decoding.attend(position, position + 1, way=way).out
                assert_same_bits(got[0], expected[position], (position, way))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_threads(format: str, threads: int) -> None:
    shape = Shape(heads=8, kv_heads=2, dim=64, window_tokens=600)
    lengths = (5, 700, 64, 513)
    alone = [Sequence(shape, format, tokens, seed=tokens) for tokens in lengths]
    expected = [sequence.whole() for sequence in alone]
    # The same sequences in one memory: two that prefill, two that decode.
    starts = (0, 699, 30, 512)
    blocks = [-(-tokens // 16) for tokens in lengths]
    kv = _native.KvPages(format, 1, shape.kv_heads, shape.dim, 16, sum(blocks), threads)
    order = np.random.default_rng(1).permutation(sum(blocks)).astype(np.int32)
    tables = np.split(order, np.cumsum(blocks)[:-1])
    parts, row = [], 0
    for sequence, table, start in zip(alone, tables, starts, strict=True):
        kv.append(BEST, 0, table, 0, sequence.keys, sequence.values)
        parts.append([row, start, sequence.tokens - start])
        row += sequence.tokens - start
    queries = np.concatenate([each.queries[start:] for each, start in zip(alone, starts, strict=True)])
    got = kv.attend(BEST, 0, queries, np.array(parts), tables, **shape.options()).out
    wanted = np.concatenate([rows[start:] for rows, start in zip(expected, starts, strict=True)])
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_before_the_window_are_not_read(format: str) -> None:
    shape = Shape(window_tokens=100)
    sequence = Sequence(shape, format, 400, block_tokens=32)
    expected = sequence.whole()[-1:]
    sequence.kv.bytes[sequence.table[: 300 // 32]] = GARBAGE
    for way in ("whole", "split"):
        assert_same_bits(sequence.attend(399, 400, way=way).out, expected, way)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", FEATURES, ids=str)
def test_two_dimensional_tiling_computes_the_same_but_for_rounding(shape: Shape, format: str) -> None:
    """Weights relative to another maximum round differently, by 2^-8 of themselves in all; what is compared is a
    benchmark's competitor, which must do the same work."""
    sequence = Sequence(shape, format, 1100)
    sequence.append(1100)
    ours, other = (sequence.attend(1040, 1100, way=way) for way in ("whole", "two-dimensional"))
    assert np.abs(ours.out - other.out).max() < 2**-8 * np.abs(sequence.values).max()


# ---- what is stored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_tokens_lie_where_the_layout_says(isa: str, format: str, dim: int) -> None:
    sequence = Sequence(Shape(heads=2, kv_heads=2, dim=dim), format, 45, isa=isa, block_tokens=32)
    sequence.append(45)
    tile_bytes = TILE * dim * 2 if format == "bf16" else TILE * dim + TILE * 4
    tiles = sequence.kv.bytes.reshape(-1, 2, 2, 2, 2, tile_bytes)  # block, layer, plane, head, tile
    for plane, vectors in enumerate((sequence.keys, sequence.values)):
        # Tiles in the order of the sequence: [tiles, heads, bytes].
        own = tiles[sequence.table, Sequence.LAYER, plane].transpose(0, 2, 1, 3).reshape(-1, 2, tile_bytes)
        if format == "bf16":
            words = own.copy().view(np.uint16)
            together = 2
        else:
            words = own[..., : TILE * dim].copy().view(np.int8)
            together = 4
        if plane == 0:
            words = words.reshape(-1, 2, dim // together, TILE, together).transpose(0, 3, 1, 2, 4)
        else:
            words = words.reshape(-1, 2, TILE // together, dim, together).transpose(0, 2, 4, 1, 3)
        got = words.reshape(-1, 2, dim)[:45]
        if format == "bf16":
            assert_same_bits(got, (bf16(vectors).view(np.uint32) >> 16).astype(np.uint16))
        else:
            codes, steps = codes_of(vectors)
            assert_same_bits(got, codes.astype(np.int8))
            scales = own[..., TILE * dim :].copy().view(np.float32).transpose(0, 2, 1).reshape(-1, 2)
            assert_same_bits(scales[:45], steps[..., 0])
    assert (tiles[:, 0] == GARBAGE).all()  # the other layer


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_extremes_are_stored_and_attended(isa: str, format: str) -> None:
    sequence = Sequence(Shape(heads=2, kv_heads=1, dim=16), format, 20, isa=isa)
    sequence.keys[3] = sequence.values[3] = 0
    sequence.values[4] = 1e30
    sequence.keys[5], sequence.values[5] = 1e-36, 1e-36  # too small for a scale to divide by
    sequence.queries[19] = 0
    rows = sequence.whole()
    assert np.isfinite(rows).all()
    assert np.abs(rows[19, 0] / (sequence.values.mean(0)[0]) - 1).max() < 2**-6  # all keys weigh the same


# ---- what is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plane", ["keys", "values"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_spoils_those_that_see_it_and_no_others(
    isa: str, format: str, plane: str, number: float
) -> None:
    sequence = Sequence(Shape(heads=4, kv_heads=2, dim=32, window_tokens=20), format, 60, isa=isa)
    expected = sequence.whole()
    getattr(sequence, plane)[25, 1, 7] = number
    sequence.written = 0
    got = sequence.whole()
    assert_same_bits(got[:, :2], expected[:, :2])  # the other kv head
    assert_same_bits(got[:25, 2:], expected[:25, 2:])
    assert np.isnan(got[25:45, 2:]).all()
    assert_same_bits(got[45:, 2:], expected[45:, 2:])  # beyond the window


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(isa: str, format: str, number: float) -> None:
    sequence = Sequence(Shape(has_sinks=True), format, 40, isa=isa)
    expected = sequence.whole()
    sequence.queries[20, 3, 5] = number
    got = sequence.attend(0, 40).out
    assert np.isnan(got[20, 3]).all()
    got[20, 3] = expected[20, 3]
    assert_same_bits(got, expected)


# ---- how much work and memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_what_no_row_sees_is_not_computed(format: str) -> None:
    """Counted in product rows times tiles of 16 keys."""
    tokens, heads = 1024, 2
    causal = Sequence(Shape(heads=heads, kv_heads=2, dim=16), format, tokens)
    causal.append(tokens)
    run = causal.attend(0, tokens)
    needed = heads * sum(-(-(position + 1) // TILE) for position in range(tokens))
    # Up to eight rows share tiles, so that one of them may see a tile less.
    assert needed <= run.scored <= needed + heads * tokens / 2
    assert run.weighed == run.scored
    assert run.scored < 0.52 * heads * tokens * tokens / TILE

    sequence = Sequence(Shape(heads=heads, kv_heads=2, dim=16, window_tokens=64), format, tokens)
    sequence.append(tokens)
    windowed = sequence.attend(0, tokens)
    assert windowed.scored <= heads * tokens * (64 / TILE + 2)
    assert windowed.weighed == windowed.scored


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_the_scores_of_a_unit_take_what_the_formula_says(isa: str, format: str, rows: int) -> None:
    """All keys of its rows and heads, an odd number of tiles each, and two addresses a tile. No more is written."""
    heads, dim = 2, 16
    touched = {}
    for tiles in (5, 31):  # odd, so that a row of scores ends with the last tile
        sequence = Sequence(Shape(heads=heads, kv_heads=1, dim=dim), format, tiles * TILE, isa=isa)
        sequence.append(tiles * TILE)
        run = sequence.attend(tiles * TILE - rows, tiles * TILE, unit_rows=rows, watches_scratch=True)
        most = _native.attention_scratch_bytes(isa, format, heads, 1, dim, tiles * TILE)
        assert run.units == 1 and run.touched_bytes <= most
        touched[tiles] = run.touched_bytes
    addresses = {tiles: -(-(2 * tiles + 8) * 8 // 64) * 64 for tiles in touched}
    assert touched[31] - touched[5] == rows * heads * (31 - 5) * TILE * 4 + addresses[31] - addresses[5]


@given(
    isa=st.sampled_from(ISAS),
    format=st.sampled_from(FORMATS),
    group=st.integers(1, 71),
    keys=st.integers(1, 200_000),
    window=st.sampled_from((0, 4096)),
    l2_bytes=st.sampled_from((2**18, 2**20, 2**21)),
)
def test_units_are_as_large_as_half_of_the_cache_allows(
    isa: str, format: str, group: int, keys: int, window: int, l2_bytes: int
) -> None:
    rows = _native.attention_rows(isa, format, group, 1, 64, keys, l2_bytes, window_tokens=window)
    assert rows >= 1
    seen = min(keys, window + MOST_PRODUCT_ROWS) if window else keys
    row_bytes = -(-seen // TILE) * TILE * 4
    products = rows * group
    if rows > 1:
        assert products <= MOST_PRODUCT_ROWS
    if rows > 1 and products > 8:  # a block of product rows is worth more than that
        assert products * row_bytes <= l2_bytes / 2
    # And no smaller than they need be.
    assert (products + group + 8) * row_bytes > l2_bytes / 2 or products + group + 8 > MOST_PRODUCT_ROWS


# ---- refusals ------------------------------------------------------------------------------------------------


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=match)


def test_wrong_memory_is_refused() -> None:
    with refused("'bf16' or 'int8', not in 'fp8'"):
        _native.KvPages("fp8", 1, 1, 16, 16, 1)
    with refused("multiple of 16 dimensions"):
        _native.KvPages("bf16", 1, 1, 24, 16, 1)
    with refused("multiple of 16 tokens"):
        _native.KvPages("bf16", 1, 1, 16, 24, 1)
    with refused("has some blocks"):
        _native.KvPages("bf16", 1, 1, 16, 16, 0)
    with refused("1 to 1024 threads"):
        _native.KvPages("bf16", 1, 1, 16, 16, 1, 0)
    with refused("no instruction set 'mmx'"):
        _native.attention_rows("mmx", "bf16", 1, 1, 16, 1, 2**20)
    with refused("multiple of the kv heads"):
        _native.attention_rows(BEST, "bf16", 3, 2, 16, 1, 2**20)
    with refused("at least one key"):
        _native.attention_scratch_bytes(BEST, "bf16", 2, 2, 16, 0)


def test_wrong_tokens_are_refused() -> None:
    kv = _native.KvPages("bf16", 1, 2, 16, 16, 2)
    keys, table = normal(4, 2, 16, seed=0), np.array([1, 0], np.int32)
    with refused("no layer 1"):
        kv.append(BEST, 1, table, 0, keys, keys)
    with refused("of the KV memory's heads"):
        kv.append(BEST, 0, table, 0, keys[:, :1].copy(), keys)
    with refused("of the KV memory's heads"):
        kv.append(BEST, 0, table, 0, keys, keys[:3])
    with refused("2 KV blocks where the tokens need 3"):
        kv.append(BEST, 0, table, 30, keys, keys)
    with refused("no KV block 2"):
        kv.append(BEST, 0, np.array([2], np.int32), 0, keys, keys)
    with refused("positions are from 0"):
        kv.append(BEST, 0, table, -1, keys, keys)


def test_wrong_queries_are_refused() -> None:
    shape = Shape(heads=4, kv_heads=2, dim=16)
    sequence = Sequence(shape, "bf16", 20)
    sequence.append(20)
    one = np.array([[0, 0, 20]])

    def attend(parts: np.ndarray = one, queries: np.ndarray = sequence.queries, **options: Any) -> None:
        tables = options.pop("tables", [sequence.table])
        sequence.kv.attend(BEST, 0, queries, parts, tables, **(shape.options() | options))

    with refused("cover the queries' rows"):
        attend(np.array([[0, 0, 19]]))
    with refused("cover the queries' rows"):
        attend(np.array([[0, 0, 21]]))
    with refused("needs a table"):
        attend(tables=[])
    with refused("the tokens need 3"):
        attend(np.array([[0, 15, 20]]))
    with refused("with the KV memory's dim"):
        attend(queries=normal(20, 4, 32, seed=0))
    with refused("multiple of the kv heads"):
        attend(queries=normal(20, 3, 16, seed=0))
    with refused(r"sinks and slopes are float32 \[heads\]"):
        attend(sinks=np.zeros(3, np.float32))
    with refused("the scale is finite"):
        attend(scale=np.nan)
    with refused("softcap is positive"):
        attend(softcap=-1.0)
    with refused("a window or chunk"):
        attend(window_tokens=-1)
    with refused("not 'diagonal'"):
        attend(way="diagonal")
    with refused("only a part of one token"):
        attend(way="split")
    with refused("at most 64 query rows times heads"):
        attend(unit_rows=33)
    with refused("size of a core's cache"):
        attend(l2_bytes=0)
    attend(unit_rows=32)
