"""What ranks are told of a step: it comes out as it went in, and nothing malformed gets through."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.engine import SequenceChunk
from plait.errors import EngineFailure
from plait.worker.step_message import MOVE_KINDS, Move, Step, StepBounds, decode_step, encode_step

BOUNDS = StepBounds(vocab_tokens=1000, step_tokens=64, block_tokens=16, kv_blocks=50, host_kv_blocks=7)
STEP = Step(
    [Move("swap_out", [(49, 6), (3, 0)]), Move("swap_in", [(6, 1)]), Move("copy", [(4, 5)])],
    [
        SequenceChunk(start=30, token_ids=[7], kv_blocks=[9, 10], rope_tokens=99, logit_rows=1, top_logits=1),
        SequenceChunk(start=0, token_ids=[1, 2, 999], kv_blocks=[11], rope_tokens=64, logit_rows=3),
    ],
)
HEADER_BYTES = 28


@st.composite
def chunks(draw: st.DrawFn) -> SequenceChunk:
    start = draw(st.integers(0, 700))
    token_ids = draw(st.lists(st.integers(0, 999), min_size=1, max_size=16))
    blocks = -(-(start + len(token_ids)) // 16)
    return SequenceChunk(
        start=start,
        token_ids=token_ids,
        kv_blocks=draw(st.lists(st.integers(0, 49), min_size=blocks, max_size=blocks + 2)),
        rope_tokens=draw(st.integers(0, 2**31 - 1)),
        logit_rows=draw(st.integers(0, len(token_ids))),
        top_logits=draw(st.integers(0, 50)),
    )


@st.composite
def moves(draw: st.DrawFn) -> Move:
    kind = draw(st.sampled_from(MOVE_KINDS))
    here, there = st.integers(0, 49), st.integers(0, 6)
    source, target = {"copy": (here, here), "swap_out": (here, there), "swap_in": (there, here)}[kind]
    return Move(kind, draw(st.lists(st.tuples(source, target), max_size=5)))


@given(st.lists(moves(), max_size=4), st.lists(chunks(), max_size=4))
def test_a_step_comes_out_as_it_went_in(some_moves: list[Move], some_chunks: list[SequenceChunk]) -> None:
    step = Step(some_moves, some_chunks)
    assert decode_step(encode_step(step), BOUNDS) == step


def test_a_decoding_token_takes_few_bytes() -> None:
    one = SequenceChunk(
        start=100, token_ids=[5], kv_blocks=list(range(7)), rope_tokens=200, logit_rows=1, top_logits=1
    )
    assert len(encode_step(Step([], [one]))) == HEADER_BYTES + 4 * (6 + 7 + 1)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(EngineFailure, match="rank 0 sent a step that cannot be run"):
        decode_step(noise, BOUNDS)


@given(st.data())
def test_a_step_with_changed_numbers_is_refused_or_stays_within_bounds(data: st.DataObject) -> None:
    message = bytearray(encode_step(STEP))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(message) // 4 - 1)) * 4
        value = data.draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 60))
        message[at : at + 4] = struct.pack("<i", value)
    try:
        step = decode_step(bytes(message), BOUNDS)
    except EngineFailure:
        return
    assert sum(len(chunk.token_ids) for chunk in step.chunks) <= 64
    for chunk in step.chunks:
        assert all(0 <= token_id < 1000 for token_id in chunk.token_ids)
        assert all(0 <= block < 50 for block in chunk.kv_blocks)
        assert chunk.start >= 0 and chunk.start + len(chunk.token_ids) <= 16 * len(chunk.kv_blocks)
        assert 0 <= chunk.logit_rows <= len(chunk.token_ids)
    for move in step.moves:
        for source, target in move.pairs:
            assert 0 <= source < (7 if move.kind == "swap_in" else 50)
            assert 0 <= target < (7 if move.kind == "swap_out" else 50)


@pytest.mark.parametrize("cut_bytes", [1, 4, 40])
def test_a_shortened_step_is_refused(cut_bytes: int) -> None:
    with pytest.raises(EngineFailure, match="its header speaks of"):
        decode_step(encode_step(STEP)[:-cut_bytes], BOUNDS)


def test_another_version_is_refused() -> None:
    message = bytearray(encode_step(STEP))
    message[4] = 9
    with pytest.raises(EngineFailure, match="version 9"):
        decode_step(bytes(message), BOUNDS)
