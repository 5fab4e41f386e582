"""A frame: what travels on a link, read from bytes that arrive in any pieces.

    prefix     3 bytes "plt", 1 byte version of this layout, uint32 number of buffers, uint32 header bytes
    lengths    uint32 for each buffer
    header     bytes: one message (messages.py)
    buffers    raw bytes, one after the other

All integers are little-endian. Nothing is allocated for a frame before its prefix and its lengths have been found
within the limits. The reader does no I/O: it says where the next bytes are to be written (`get_buffer`) and is told how
many came (`received`); then it hands out the frames that are complete (`next_frame`, until there is none). Small frames
are cut out of one scratch buffer, many to a read; the rest of a long buffer is received where it will stay, so a tensor
is copied at most once and only its first part.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from plait.errors import BadFrame

FRAME_VERSION = 1
MAGIC = b"plt"
_PREFIX = struct.Struct("<3sBII")
PREFIX_BYTES = _PREFIX.size
LENGTH_BYTES = 4

Buffer = bytes | bytearray | memoryview

# One read of a socket: large enough for several decode steps, small enough for every connection to have one.
SCRATCH_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLimits:
    """The largest frame that is accepted; `max_bytes` counts prefix, lengths, header and buffers."""

    max_header_bytes: int
    max_buffers: int
    max_bytes: int


class Frame(NamedTuple):
    """A received frame; each buffer is memory of its own, 16-byte aligned, that the receiver may keep and write."""

    header: bytes
    buffers: tuple[memoryview, ...]
    size_bytes: int
    """Of all of it, as it was on the wire."""


def frame_bytes(header_bytes: int, buffer_bytes: Sequence[int]) -> int:
    """How long such a frame is on the wire."""
    return PREFIX_BYTES + LENGTH_BYTES * len(buffer_bytes) + header_bytes + sum(buffer_bytes)


def encode_frame(header: bytes, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """The bytes of a frame, as a list to be written in order; the buffers are referred to, not copied.

    Raises:
        BadFrame: a buffer is not C-contiguous, or longer than a length can say.
    """
    parts: list[Buffer] = []
    lengths: list[int] = []
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise BadFrame("a buffer of a frame must be C-contiguous; copy it first")
        lengths.append(view.nbytes)
        if view.nbytes:
            parts.append(view.cast("B"))
    try:
        head = _PREFIX.pack(MAGIC, FRAME_VERSION, len(lengths), len(header))
        head += struct.pack(f"<{len(lengths)}I", *lengths) + header
    except struct.error:
        raise BadFrame(f"a frame of {frame_bytes(len(header), lengths)} bytes is too long to send") from None
    return [head, *parts]


class FrameReader:
    """Cuts a stream of bytes into frames; `limits` may be changed between two frames."""

    def __init__(self, limits: FrameLimits) -> None:
        self.limits = limits
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._start = 0  # what is unread lies in scratch[start:end]
        self._end = 0
        self._head_bytes = (
            0  # prefix, lengths and header of the frame that comes; 0 before its prefix is there
        )
        self._buffers = 0
        self._header = b""
        self._size_bytes = 0
        self._body: tuple[memoryview, ...] | None = None
        self._filling = 0  # the buffer of the body that comes next, and how much of it is there
        self._filled = 0
        self._direct = False  # the last `get_buffer` was memory of the body

    def get_buffer(self) -> memoryview:
        """Where the next bytes of the stream are to be written; never empty."""
        if self._body is not None:
            self._direct = True
            return self._body[self._filling][self._filled :]
        self._direct = False
        needed = self._head_bytes or PREFIX_BYTES
        if self._start == self._end:
            self._start = self._end = 0
        if self._start + needed > len(self._scratch) or self._end == len(self._scratch):
            self._make_room(needed)
        return self._scratch[self._end :]

    def received(self, count: int) -> None:
        """Take `count` bytes that were written to `get_buffer()`; then take all frames that are complete now."""
        if self._direct:
            self._filled += count
        else:
            self._end += count

    def next_frame(self) -> Frame | None:
        """The next frame, if all of it is there.

        Raises:
            BadFrame: what came is not a frame, or one beyond the limits; the stream cannot be read further.
        """
        if self._body is None and not self._read_head():
            return None
        assert self._body is not None
        if not self._fill():
            return None
        frame = Frame(self._header, self._body, self._size_bytes)
        self._head_bytes, self._body = 0, None
        return frame

    def _read_head(self) -> bool:
        """Read prefix, lengths and header once they are all there, and make room for the buffers."""
        there = self._end - self._start
        if not self._head_bytes:
            if there < PREFIX_BYTES:
                return False
            self._read_prefix()
        if there < self._head_bytes:
            return False
        lengths_at = self._start + PREFIX_BYTES
        header_at = lengths_at + LENGTH_BYTES * self._buffers
        end = self._start + self._head_bytes
        lengths = struct.unpack_from(f"<{self._buffers}I", self._scratch, lengths_at)
        self._size_bytes = self._head_bytes + sum(lengths)
        if self._size_bytes > self.limits.max_bytes:
            raise BadFrame(_too_long(self._size_bytes, self.limits))
        self._header = bytes(self._scratch[header_at:end])
        self._start = end
        self._body = tuple([np.empty(length, np.uint8).data for length in lengths])
        self._filling = self._filled = 0
        return True

    def _read_prefix(self) -> None:
        magic, version, buffers, header_bytes = _PREFIX.unpack_from(self._scratch, self._start)
        limits = self.limits
        if magic != MAGIC:
            raise BadFrame("what came is not a frame")
        if version != FRAME_VERSION:
            raise BadFrame(f"a frame of version {version}; this side reads version {FRAME_VERSION}")
        if header_bytes > limits.max_header_bytes:
            raise BadFrame(
                f"a header of {header_bytes} bytes; at most {limits.max_header_bytes} are accepted"
            )
        if buffers > limits.max_buffers:
            raise BadFrame(f"a frame of {buffers} buffers; at most {limits.max_buffers} are accepted")
        head_bytes = PREFIX_BYTES + LENGTH_BYTES * buffers + header_bytes
        if head_bytes > limits.max_bytes:
            raise BadFrame(_too_long(head_bytes, limits))
        self._buffers, self._head_bytes = buffers, head_bytes

    def _fill(self) -> bool:
        """Copy what has arrived into the body's buffers; True when they are full."""
        assert self._body is not None
        while self._filling < len(self._body):
            buffer = self._body[self._filling]
            count = min(len(buffer) - self._filled, self._end - self._start)
            if count:
                buffer[self._filled : self._filled + count] = self._scratch[self._start : self._start + count]
                self._filled += count
                self._start += count
            if self._filled < len(buffer):
                return False
            self._filling, self._filled = self._filling + 1, 0
        return True

    def _make_room(self, needed: int) -> None:
        """Move what is unread to the front of a scratch that holds `needed` bytes."""
        size_bytes = max(SCRATCH_BYTES, needed)
        unread = bytes(self._scratch[self._start : self._end])
        assert len(unread) < needed, "all complete frames have been taken"
        if size_bytes != len(self._scratch):
            self._scratch = memoryview(bytearray(size_bytes))
        self._scratch[: len(unread)] = unread
        self._start, self._end = 0, len(unread)


def _too_long(size_bytes: int, limits: FrameLimits) -> str:
    return f"a frame of {size_bytes} bytes; at most {limits.max_bytes} are accepted"
