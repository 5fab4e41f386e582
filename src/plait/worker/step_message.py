"""What the other ranks are told of a step: which KV blocks move, and token ids, positions and block tables.

Token ids travel and not embeddings: every rank has the table (He et al. 2024, "Inference Performance Optimization for
Large Language Models on CPUs", section 2.3). All numbers are little-endian int32 behind a header that counts them, so
that only one length fits, and a reader checks every number before it is used.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from plait.engine import KvExtents, SequenceChunk
from plait.errors import EngineFailure

MoveKind = Literal["swap_out", "swap_in", "copy"]
MOVE_KINDS: tuple[MoveKind, ...] = ("swap_out", "swap_in", "copy")

_MAGIC, _VERSION = b"plst", 1
# Magic, version, unused; then how many runs of moves, pairs in them, chunks, entries of block tables, and token ids.
_HEADER = struct.Struct("<4sHH5I")
_CHUNK_NUMBERS = 6
_NUMBER = np.dtype("<i4")

Numbers = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Move:
    """KV blocks that move before the step, in order: (source, target) each."""

    kind: MoveKind
    pairs: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Step:
    """A message, read."""

    moves: Sequence[Move]
    chunks: Sequence[SequenceChunk]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """What a message is checked against."""

    vocab_tokens: int
    step_tokens: int
    block_tokens: int
    kv_blocks: int
    host_kv_blocks: int


def encode_step(step: Step) -> bytes:
    """The bytes of a step."""
    moves, chunks = step.moves, step.chunks
    pairs = sum(len(move.pairs) for move in moves)
    table_entries = sum(len(chunk.kv_blocks) for chunk in chunks)
    token_ids = sum(len(chunk.token_ids) for chunk in chunks)
    header = _HEADER.pack(_MAGIC, _VERSION, 0, len(moves), pairs, len(chunks), table_entries, token_ids)
    numbers = np.fromiter(
        chain(
            chain.from_iterable((MOVE_KINDS.index(move.kind), len(move.pairs)) for move in moves),
            chain.from_iterable(pair for move in moves for pair in move.pairs),
            chain.from_iterable(_numbers_of(chunk) for chunk in chunks),
            chain.from_iterable(chunk.kv_blocks for chunk in chunks),
            chain.from_iterable(chunk.token_ids for chunk in chunks),
        ),
        _NUMBER,
        2 * len(moves) + 2 * pairs + _CHUNK_NUMBERS * len(chunks) + table_entries + token_ids,
    )
    return header + numbers.tobytes()


def decode_step(message: bytes, bounds: StepBounds) -> Step:
    """Read what `encode_step` wrote.

    Raises:
        EngineFailure: it is malformed, or names what this rank does not have.
    """
    if len(message) < _HEADER.size:
        raise _malformed(f"it has {len(message)} bytes")
    magic, version, _, runs, pairs, chunks, table_entries, token_ids = _HEADER.unpack_from(message)
    if (magic, version) != (_MAGIC, _VERSION):
        raise _malformed(f"it begins with {magic!r}, version {version}")
    wanted_bytes = _HEADER.size + 4 * (
        2 * runs + 2 * pairs + _CHUNK_NUMBERS * chunks + table_entries + token_ids
    )
    if len(message) != wanted_bytes:
        raise _malformed(f"it has {len(message)} bytes, and its header speaks of {wanted_bytes}")
    numbers = np.frombuffer(message, _NUMBER, offset=_HEADER.size)
    cuts = np.cumsum([2 * runs, 2 * pairs, _CHUNK_NUMBERS * chunks, table_entries])
    run_numbers, pair_numbers, chunk_numbers, tables, ids = np.split(numbers, cuts)
    return Step(
        moves=_moves(run_numbers.reshape(-1, 2), pair_numbers.reshape(-1, 2), bounds),
        chunks=_chunks(chunk_numbers.reshape(-1, _CHUNK_NUMBERS), tables, ids, bounds),
    )


def apply_moves(moves: Sequence[Move], store: KvExtents, host_store: KvExtents | None) -> None:
    """Do what the engine of rank 0 did to its own KV blocks."""
    for move in moves:
        if move.kind == "copy":
            store.copy_blocks(move.pairs)
            continue
        assert host_store is not None  # a rank without one has 0 blocks there, and the message was checked
        (store.swap_out if move.kind == "swap_out" else store.swap_in)(move.pairs, host_store)


def _numbers_of(chunk: SequenceChunk) -> tuple[int, ...]:
    return (
        chunk.start,
        len(chunk.token_ids),
        len(chunk.kv_blocks),
        chunk.rope_tokens,
        chunk.logit_rows,
        chunk.top_logits,
    )


def _moves(runs: Numbers, pairs: Numbers, bounds: StepBounds) -> list[Move]:
    if len(runs) and (
        runs.min() < 0 or runs[:, 0].max() >= len(MOVE_KINDS) or runs[:, 1].sum() != len(pairs)
    ):
        raise _malformed("its moves do not add up")
    moves: list[Move] = []
    first = 0
    kind_number: int
    for kind_number, count in runs.tolist():
        kind = MOVE_KINDS[kind_number]
        own = pairs[first : first + count]
        first += count
        on_host = {"copy": (False, False), "swap_out": (False, True), "swap_in": (True, False)}[kind]
        for column, there in enumerate(on_host):
            _check_within(own[:, column], bounds.host_kv_blocks if there else bounds.kv_blocks, "KV block")
        moves.append(Move(kind, [(source, target) for source, target in own.tolist()]))
    if first != len(pairs):
        raise _malformed("its moves do not add up")
    return moves


def _chunks(rows: Numbers, tables: Numbers, ids: Numbers, bounds: StepBounds) -> list[SequenceChunk]:
    _check_within(ids, bounds.vocab_tokens, "token id")
    _check_within(tables, bounds.kv_blocks, "KV block")
    if len(ids) > bounds.step_tokens:
        raise _malformed(f"{len(ids)} tokens are more than the {bounds.step_tokens} of a step")
    starts, counts, entries, _, logit_rows, _ = wide = rows.T.astype(np.int64)
    held_tokens = entries * bounds.block_tokens
    if (
        (wide < 0).any()
        or (counts < 1).any()
        or counts.sum() != len(ids)
        or entries.sum() != len(tables)
        or (starts + counts > held_tokens).any()
        or (logit_rows > counts).any()
    ):
        raise _malformed("its chunks do not fit their tokens and block tables")
    chunks: list[SequenceChunk] = []
    first_id = first_entry = 0
    for start, count, table_length, rope_tokens, row_count, top_logits in rows.tolist():
        chunks.append(
            SequenceChunk(
                start=start,
                token_ids=ids[first_id : first_id + count].tolist(),
                kv_blocks=tables[first_entry : first_entry + table_length].tolist(),
                rope_tokens=rope_tokens,
                logit_rows=row_count,
                top_logits=top_logits,
            )
        )
        first_id += count
        first_entry += table_length
    return chunks


def _check_within(numbers: Numbers, end: int, what: str) -> None:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < end):
        raise _malformed(f"a {what} lies beyond the {end} that there are")


def _malformed(reason: str) -> EngineFailure:
    return EngineFailure(f"rank 0 sent a step that cannot be run: {reason}")
