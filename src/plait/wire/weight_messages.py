"""Messages by which a member that lacks a checkpoint's files gets them from members that have them.

    ModelAsk     → ModelTold       which model, in which formats, from which files
    HashesAsk    → HashesTold      SHA-256 of pieces of a file, where the answerer has them
    BytesAsk     → BytesTold       bytes of a file, as the one tensor of the message
    any of them  → WeightsRefused

Files are cut into pieces of `PIECE_BYTES` (the last may be shorter); a piece is what is hashed, kept and resumed. It
travels in smaller parts, so that the steps of an answer on the same link never wait for long.
"""

from typing import Annotated

from msgspec import Meta

from plait.wire.bounded import Bounded, Count, Reason

PIECE_BYTES = 4 << 20
MAX_PART_BYTES = 256 << 10
"""Of a piece, in one message: 20 ms on a link of 100 Mbit/s."""
MAX_ASKED_HASHES = 64
MAX_MODEL_FILES = 2048

FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
"""A file of the model's folder itself: no separator, no leading dot."""
Sha256 = Annotated[bytes, Meta(max_length=32)]
"""32 bytes, or none where the answerer has not the piece."""
Word = Annotated[str, Meta(max_length=64)]


class ModelFile(Bounded, frozen=True):
    name: FileName
    size_bytes: Count


class ModelAsk(Bounded, frozen=True, tag="model_ask"):
    request: Count


class ModelTold(Bounded, frozen=True, tag="model_told", kw_only=True):
    """The model of the swarm as the answerer serves it.

    `name` is what its user called it: `tiny`, a repository id, or the last part of a folder's path. `fingerprint` is
    that of the checkpoint. A member that computes in other formats gives other tokens.
    """

    request: Count
    name: Annotated[str, Meta(max_length=256)]
    fingerprint: Annotated[str, Meta(max_length=256)]
    blocks: Annotated[int, Meta(ge=1, le=4096)]
    dtype: Word
    quantization: Word
    kv_cache_dtype: Word
    files: Annotated[tuple[ModelFile, ...], Meta(max_length=MAX_MODEL_FILES)]


class HashesAsk(Bounded, frozen=True, tag="hashes_ask"):
    request: Count
    file: FileName
    first_piece: Count
    pieces: Annotated[int, Meta(ge=1, le=MAX_ASKED_HASHES)]


class HashesTold(Bounded, frozen=True, tag="hashes_told"):
    request: Count
    sha256: Annotated[tuple[Sha256, ...], Meta(max_length=MAX_ASKED_HASHES)]


class BytesAsk(Bounded, frozen=True, tag="bytes_ask"):
    """`size_bytes` from `offset_bytes` of a file on, inside one piece."""

    request: Count
    file: FileName
    offset_bytes: Count
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_PART_BYTES)]


class BytesTold(Bounded, frozen=True, tag="bytes_told"):
    request: Count


class WeightsRefused(Bounded, frozen=True, tag="weights_refused"):
    request: Count
    reason: Reason


WeightAnswer = ModelTold | HashesTold | BytesTold | WeightsRefused
WeightMessage = ModelAsk | HashesAsk | BytesAsk | WeightAnswer
