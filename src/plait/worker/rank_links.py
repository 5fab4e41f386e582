"""How the ranks of a tensor-parallel group reach each other: frames to and from rank 0, sums, and gathers.

`LocalLink` is for ranks on one host: frames through a pair of sockets, sums and gathers through shared memory. Both are
given to a new process as open descriptors, so neither has a name that could be left behind. gloo_link.py is for others.

Every wait has a deadline, but for a follower's wait for the next step, which ends with rank 0.
"""

import enum
import math
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from plait.errors import EngineLost

if TYPE_CHECKING:
    from plait.kernels._native import Collective, SharedMemoryCollective

_MAGIC = b"plfr"
_HEADER = struct.Struct("<4sII")
MAX_FRAME_BYTES = 64 * 2**20
"""A step of a million tokens over a million KV blocks fits; what is larger is no frame."""


Address = tuple[str, int]
"""Host and port."""


class FrameKind(enum.IntEnum):
    """What a frame holds."""

    PLAN = 1
    """Rank 0's first: a `RankPlan`."""
    READY = 2
    """A rank is loaded."""
    FAILED = 3
    """Why a rank ends, as a sentence."""
    STEP = 4
    """A step to take part in: step_message.py."""
    RESULT = 5
    """A rank's part of a gather, where there is no shared memory."""
    STOP = 6
    """There will be no more steps."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: FrameKind
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSizes:
    """How much one exchange may carry."""

    max_floats: int
    max_gather_bytes: int


class RankLink(Protocol):
    """One rank's connections."""

    rank: int
    ranks: int

    def open_sums(self, sizes: GroupSizes, timeout_s: float) -> "Collective":
        """Make ready what sums and gathers need; every rank of the group does."""
        ...

    def send(self, to: int, frame: Frame, *, timeout_s: float) -> None:
        """Raises EngineLost: the rank is gone, or does not take it in time."""
        ...

    def receive(self, sender: int, *, timeout_s: float) -> Frame:
        """Raises EngineLost: the rank is gone, says nothing in time, or sends what is no frame."""
        ...

    def gather(self, payload: bytes) -> list[bytes]:
        """At rank 0, what every rank brought, by rank; elsewhere nothing. Raises EngineLost."""
        ...

    def close(self) -> None:
        """Let go of everything; ranks that wait for this one are told."""
        ...


class LocalLink:
    """Ranks on this host. Rank 0 has a socket to each other rank, the others have one to rank 0."""

    def __init__(self, rank: int, ranks: int, sockets: Mapping[int, socket.socket], memory_fd: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._sockets = dict(sockets)
        self._memory_fd = memory_fd
        self._group: SharedMemoryCollective | None = None

    def open_sums(self, sizes: GroupSizes, timeout_s: float) -> "Collective":
        from plait.kernels import _native  # absent where there was no compiler

        group = _native.SharedMemoryCollective
        if self.rank == 0:
            group.prepare(self._memory_fd, self.ranks, sizes.max_floats, sizes.max_gather_bytes)
        self._group = group(
            self._memory_fd, self.rank, self.ranks, sizes.max_floats, sizes.max_gather_bytes, timeout_s
        )
        return self._group

    def send(self, to: int, frame: Frame, *, timeout_s: float) -> None:
        channel = self._sockets[to]
        channel.settimeout(_socket_timeout(timeout_s))
        try:
            channel.sendall(_HEADER.pack(_MAGIC, frame.kind, len(frame.body)) + frame.body)
        except TimeoutError:
            raise EngineLost(f"rank {to} has taken no message for {timeout_s:g} s") from None
        except OSError:
            raise EngineLost(f"rank {to} has ended") from None

    def receive(self, sender: int, *, timeout_s: float) -> Frame:
        try:
            magic, kind, size = _HEADER.unpack(self._read(sender, _HEADER.size, timeout_s))
            frame_kind, size = checked_head(kind if magic == _MAGIC else 0, size, sender)
            return Frame(frame_kind, self._read(sender, size, timeout_s))
        except TimeoutError:
            raise EngineLost(f"rank {sender} has said nothing for {timeout_s:g} s") from None
        except OSError:
            raise EngineLost(f"rank {sender} has ended") from None

    def _read(self, sender: int, size: int, timeout_s: float) -> bytes:
        channel = self._sockets[sender]
        read = bytearray()
        while len(read) < size:
            channel.settimeout(_socket_timeout(timeout_s))
            part = channel.recv(size - len(read))
            if not part:
                raise ConnectionResetError
            read += part
        return bytes(read)

    def gather(self, payload: bytes) -> list[bytes]:
        assert self._group is not None
        try:
            return self._group.gather(payload, self.rank == 0)
        except RuntimeError as error:
            raise EngineLost(str(error)) from None

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
        for channel in self._sockets.values():
            channel.close()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
            self._memory_fd = -1


def checked_head(kind: int, size: int, sender: int) -> tuple[FrameKind, int]:
    """Kind and size of a frame from what arrived; raises EngineLost if it cannot be."""
    if not (FrameKind.PLAN <= kind <= FrameKind.STOP and 0 <= size <= MAX_FRAME_BYTES):
        raise EngineLost(f"rank {sender} sent what is no message of a tensor-parallel group")
    return FrameKind(kind), size


def _socket_timeout(timeout_s: float) -> float | None:
    return None if math.isinf(timeout_s) else timeout_s
