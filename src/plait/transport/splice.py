"""Streams that a member carries between two others, so that one that nobody can dial is reached.

    A ── SpliceOpen(B) ──▶ M ── SpliceOffer(A) ──▶ B      M has a link to each: B once dialled it
    A ◀───────────── SpliceAccept ──────────────── B
    A ◀──────── SpliceBytes, SpliceCredit ───────▶ B      M only exchanges the ids and passes bytes on
    A ◀─────────────── SpliceClose ──────────────▶ B

What A and B run over the stream is TLS with both identities pinned (tls.py), then frames, then the whole handshake: a
link like any other. So M can neither read nor change nor invent anything, nor be taken for A or B; it can see how much
is said, and stop carrying. TLS rather than a sealing of single frames because a stream that is secured from its first
byte needs no second way to agree on keys, and is the one way that is tested anyway.

Each direction has a window that the *other end* reopens, so that M holds at most that much for a slow reader, and no
stream fills the credit of M's own links. An id is chosen by the end that opens the stream on that link: even if it
dialled the link, odd if not.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from plait.errors import BadFrame, PeerLost
from plait.ids import PeerId
from plait.transport.connection import Connection
from plait.transport.limits import NetworkLimits
from plait.wire import (
    SpliceAccept,
    SpliceBytes,
    SpliceClose,
    SpliceCredit,
    SpliceMessage,
    SpliceOffer,
    SpliceOpen,
    encode_message,
    printable,
)

_CHUNK_BYTES = 1 << 16
_HIGH_BYTES = 1 << 16  # asyncio's marks for back-pressure
_LOW_BYTES = 1 << 14
_MAX_QUEUED_FRAMES = 4096
"""To one link; a stream that would add to them is ended. Bytes are bounded by the windows, frames of a byte are not."""


class SpliceTransport(asyncio.Transport):
    """This end of a stream, as the transport of whatever is set on it."""

    def __init__(
        self, connection: Connection, splice: int, window_bytes: int, forget: Callable[[], None]
    ) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._connection = connection
        self._splice = splice
        self._window_bytes = window_bytes
        self._forget = forget
        self._protocol: asyncio.BufferedProtocol | None = None
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._may_send_bytes = window_bytes
        self._may_arrive_bytes = window_bytes
        self._unread: deque[memoryview] = deque()
        self._read_bytes = 0
        self._reading_paused = self._writing_paused = False
        self._closing = self._ended = False

    def start(self, protocol: asyncio.BufferedProtocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        self._unsent.append(memoryview(bytes(data)))
        self._unsent_bytes += len(data)
        self._push()
        if self._unsent_bytes > _HIGH_BYTES and not self._writing_paused and self._protocol is not None:
            self._writing_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._loop.call_soon(self._feed)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._push()

    def abort(self) -> None:
        if not self._ended:
            self._connection.post(encode_message(SpliceClose(self._splice, "closed")))
            self.end(None)

    # -- what arrives ----------------------------------------------------------------------------------------

    def arrived(self, data: memoryview) -> None:
        self._may_arrive_bytes -= len(data)
        if self._may_arrive_bytes < 0:
            raise BadFrame("a spliced stream overran its window")
        self._unread.append(data)
        self._feed()

    def credited(self, size_bytes: int) -> None:
        self._may_send_bytes += size_bytes
        if self._may_send_bytes > self._window_bytes:
            raise BadFrame("a spliced stream was given more than its window")
        self._push()

    def end(self, error: Exception | None) -> None:
        """The stream is over, for whatever reason; the protocol is told once."""
        if self._ended:
            return
        self._ended = self._closing = True
        self._forget()
        self._unsent.clear()
        self._unsent_bytes = 0
        if not self.accepted.done():
            self.accepted.set_exception(error or PeerLost("closed"))
            self.accepted.exception()  # nobody may be waiting
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)

    def _feed(self) -> None:
        while self._unread and not self._reading_paused and not self._ended and self._protocol is not None:
            data = self._unread.popleft()
            buffer = memoryview(self._protocol.get_buffer(len(data)))
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            if count < len(data):
                self._unread.appendleft(data[count:])
            self._read_bytes += count
            self._protocol.buffer_updated(count)
        if self._read_bytes >= self._window_bytes // 4 and not self._ended:
            self._may_arrive_bytes += self._read_bytes
            self._connection.post(encode_message(SpliceCredit(self._splice, self._read_bytes)))
            self._read_bytes = 0

    def _push(self) -> None:
        while self._unsent and self._may_send_bytes and not self._ended:
            data = self._unsent.popleft()
            count = min(len(data), self._may_send_bytes, _CHUNK_BYTES)
            if count < len(data):
                self._unsent.appendleft(data[count:])
            self._unsent_bytes -= count
            self._may_send_bytes -= count
            self._connection.post(encode_message(SpliceBytes(self._splice)), [data[:count]])
        if self._writing_paused and self._unsent_bytes <= _LOW_BYTES and self._protocol is not None:
            self._writing_paused = False
            self._protocol.resume_writing()
        if self._closing and not self._unsent and not self._ended:
            self.abort()


@dataclass(slots=True)
class _Carried:
    """One direction's far side: where it goes on, and how much of what came from here was not read there yet."""

    connection: Connection
    splice: int
    in_flight_bytes: int = 0


_Key = tuple[Connection, int]


class Splices:
    """All spliced streams of one member, those it carries and those that end here.

    `connection_to` finds the live link to a peer; `accept` gets each stream that is opened to
    this one: by whom, as the member in the middle says, and that member.
    """

    def __init__(
        self,
        limits: NetworkLimits,
        connection_to: Callable[[PeerId], Connection | None],
        accept: Callable[[PeerId, PeerId, SpliceTransport], None],
    ) -> None:
        self._limits = limits
        self._connection_to = connection_to
        self._accept = accept
        self._ends: dict[_Key, SpliceTransport] = {}
        self._carried: dict[_Key, _Carried] = {}
        self._next: dict[Connection, int] = {}

    def open(self, middle: Connection, peer: PeerId) -> SpliceTransport:
        """Ask a member for a stream to `peer`; await its `accepted` before using it."""
        splice = self._new_id(middle)
        transport = self._add_end(middle, splice)
        middle.post(encode_message(SpliceOpen(splice, peer)))
        return transport

    def lost(self, connection: Connection) -> None:
        """A link is gone, and with it all streams over it."""
        for key in [key for key in self._ends if key[0] is connection]:
            self._ends[key].end(PeerLost("the member that carried this link is gone"))
        for key in [key for key in self._carried if key[0] is connection]:
            far = self._carried.pop(key)
            self._carried.pop((far.connection, far.splice), None)
            far.connection.post(encode_message(SpliceClose(far.splice, "its link is gone")))
        self._next.pop(connection, None)

    def handle(self, connection: Connection, message: SpliceMessage, buffers: tuple[memoryview, ...]) -> None:
        """What a peer says of a stream; of one that is over, nothing is done.

        Raises:
            BadFrame: it broke the protocol.
        """
        key = (connection, message.splice)
        match message:
            case SpliceOpen():
                self._check_new(connection, message.splice)
                self._carry(connection, message)
            case SpliceOffer():
                self._check_new(connection, message.splice)
                self._take(connection, message)
            case SpliceBytes():
                if len(buffers) != 1:
                    raise BadFrame(f"a piece of a spliced stream in {len(buffers)} buffers")
                if key in self._ends:
                    self._ends[key].arrived(buffers[0])
                elif key in self._carried:
                    far = self._carried[key]
                    far.in_flight_bytes += len(buffers[0])
                    if far.in_flight_bytes > self._limits.splice_window_bytes:
                        raise BadFrame("a spliced stream overran its window")
                    self._pass_on(key, SpliceBytes(far.splice), buffers)
            case SpliceCredit():
                if key in self._ends:
                    self._ends[key].credited(message.size_bytes)
                elif key in self._carried:
                    far = self._carried[key]
                    back = self._carried[far.connection, far.splice]
                    back.in_flight_bytes -= message.size_bytes
                    if back.in_flight_bytes < 0:
                        raise BadFrame("a spliced stream was given more than its window")
                    self._pass_on(key, SpliceCredit(far.splice, message.size_bytes), ())
            case SpliceAccept():
                if key in self._ends and not self._ends[key].accepted.done():
                    self._ends[key].accepted.set_result(None)
                elif key in self._carried:
                    self._pass_on(key, SpliceAccept(self._carried[key].splice), ())
            case SpliceClose():
                if key in self._ends:
                    self._ends[key].end(PeerLost(printable(message.reason)))
                elif key in self._carried:
                    far = self._carried.pop(key)
                    self._carried.pop((far.connection, far.splice), None)
                    far.connection.post(encode_message(SpliceClose(far.splice, message.reason)))

    def _carry(self, near: Connection, request: SpliceOpen) -> None:
        far = self._connection_to(request.peer)
        if far is None or far is near:
            refusal = "no link to that peer"
        elif self._full(near) or self._full(far):
            refusal = "too many spliced streams"
        else:
            splice = self._new_id(far)
            self._carried[near, request.splice] = _Carried(far, splice)
            self._carried[far, splice] = _Carried(near, request.splice)
            far.post(encode_message(SpliceOffer(splice, near.peer)))
            return
        near.post(encode_message(SpliceClose(request.splice, refusal)))

    def _take(self, middle: Connection, offer: SpliceOffer) -> None:
        if self._full(middle):
            middle.post(encode_message(SpliceClose(offer.splice, "too many spliced streams")))
            return
        transport = self._add_end(middle, offer.splice)
        middle.post(encode_message(SpliceAccept(offer.splice)))
        self._accept(offer.peer, middle.peer, transport)

    def _pass_on(self, key: _Key, message: SpliceMessage, buffers: tuple[memoryview, ...]) -> None:
        far = self._carried[key].connection
        if far.queued_frames < _MAX_QUEUED_FRAMES:
            far.post(encode_message(message), buffers)
            return
        near, splice = key
        self._carried.pop((far, self._carried.pop(key).splice), None)
        for connection, id in ((near, splice), (far, message.splice)):
            connection.post(encode_message(SpliceClose(id, "the member that carries this link is congested")))

    def _add_end(self, connection: Connection, splice: int) -> SpliceTransport:
        def forget() -> None:
            self._ends.pop((connection, splice), None)

        transport = SpliceTransport(connection, splice, self._limits.splice_window_bytes, forget)
        self._ends[connection, splice] = transport
        return transport

    def _new_id(self, connection: Connection) -> int:
        splice = self._next.get(connection, 0 if connection.dialled else 1)
        self._next[connection] = splice + 2
        return splice

    def _check_new(self, connection: Connection, splice: int) -> None:
        own_parity = 0 if connection.dialled else 1
        key = (connection, splice)
        if splice % 2 == own_parity or key in self._ends or key in self._carried:
            raise BadFrame(f"it opens a spliced stream with id {splice}, which is not its to choose or taken")

    def _full(self, connection: Connection) -> bool:
        keys = (*self._ends, *self._carried)
        return sum(key[0] is connection for key in keys) >= self._limits.max_splices
