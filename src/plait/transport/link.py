"""A link: frames over any asyncio transport, and the interface of what makes links.

Everything that carries bytes is an asyncio transport: a socket's, TLS over another one (tls.py), the modelled wires of
tests (memory.py), a stream that another member carries (splice.py). So there is one implementation of a link.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, cast

from plait.errors import BadFrame, PeerLost, ServingError
from plait.ids import PeerId
from plait.wire import Buffer, Frame, FrameLimits, FrameReader, encode_frame

HANDSHAKE_LIMITS = FrameLimits(max_header_bytes=1024, max_buffers=0, max_bytes=2048)
"""What a stranger may send."""
MAX_UNREAD_BYTES = 1 << 20
"""A link stops reading its transport when so much waits for `recv`."""
CLOSE_TIMEOUT_S = 1.0
_JOINED_BYTES = 1 << 16
"""Frames up to this length are written in one call: one segment, one TLS record where it fits."""


class LinkClosed(PeerLost):
    """A link ended, by either side, without anybody having done wrong."""


class Listener(Protocol):
    address: str
    """Where it listens; a port that was asked for as 0 is the one that was given."""

    async def close(self) -> None: ...


class Carrier(Protocol):
    """Makes links of one kind; an address is `scheme://...`."""

    async def listen(self, address: str, accept: Callable[["Link"], None]) -> Listener:
        """Take connections from now on; `accept` gets each link at once, before `Link.opened`.

        Raises:
            BadSetup: the address is malformed, taken or not of this machine.
        """
        ...

    async def dial(self, address: str, *, peer: PeerId, timeout_s: float) -> "Link":
        """An opened link to whoever listens there; a carrier that authenticates accepts only `peer`.

        Raises:
            PeerLost: nobody answers there in time, or somebody else does.
        """
        ...


class Link(asyncio.BufferedProtocol):
    """Frames both ways, in order. A link is broken by its first bad frame.

    `name` says where it leads, for the log. `peer` is the identity that the carrier has proved, if it does so; it is
    set when the link opens. `limits` are a stranger's until somebody raises them. `rtt_s` is a round trip that was
    measured while the link was made, 0 if none was. `received_bytes` grows with everything that arrives, `sent_bytes`
    with everything that is written. `on_writable` is called when there is room again after there was none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.peer: PeerId | None = None
        self.rtt_s = 0.0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.on_writable: Callable[[], None] | None = None
        self._reader = FrameReader(HANDSHAKE_LIMITS)
        self._frames: deque[Frame] = deque()
        self._unread_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._failure: ServingError | None = None
        self._arrived = asyncio.Event()
        self._opened = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self._reading_paused = False

    @property
    def limits(self) -> FrameLimits:
        return self._reader.limits

    @limits.setter
    def limits(self, limits: FrameLimits) -> None:
        self._reader.limits = limits

    @property
    def closed(self) -> bool:
        return self._failure is not None

    @property
    def writable(self) -> bool:
        """What was written before has left for the most part."""
        return self._writable.is_set()

    @property
    def unsent_bytes(self) -> int:
        """Written, and still in this process."""
        return 0 if self._transport is None or self.closed else self._transport.get_write_buffer_size()

    async def opened(self) -> None:
        """Wait until the carrier has done its part (TLS: its handshake).

        Raises:
            PeerLost: it failed.
        """
        await self._opened.wait()
        if self._failure is not None:
            raise self._lost()

    def write(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Send a frame without waiting; the buffers must not change any more.

        Raises:
            PeerLost: the link is closed.
        """
        if self._failure is not None or self._transport is None:
            raise self._lost()
        parts = encode_frame(header, buffers)
        size_bytes = sum(map(len, parts))
        self.sent_bytes += size_bytes
        if len(parts) == 1:
            self._transport.write(parts[0])
        elif size_bytes <= _JOINED_BYTES:
            self._transport.write(b"".join(parts))
        else:
            for part in parts:
                self._transport.write(part)

    async def drain(self) -> None:
        """Wait until the other side has taken most of what was written.

        Raises:
            PeerLost: the link is closed.
        """
        await self._writable.wait()
        if self._failure is not None:
            raise self._lost()

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """Write a frame once there is room.

        Raises:
            PeerLost: the link is closed.
        """
        await self.drain()
        self.write(header, buffers)

    async def recv(self) -> Frame:
        """The next frame; for one reader. What came before the link broke is still delivered.

        Raises:
            PeerLost: the link is closed.
            BadFrame: something else than a frame came.
        """
        while not self._frames:
            if self._failure is not None:
                raise self._lost()
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self._unread_bytes -= frame.size_bytes
        if self._reading_paused and self._unread_bytes <= MAX_UNREAD_BYTES // 2 and not self.closed:
            assert self._transport is not None
            self._reading_paused = False
            self._transport.resume_reading()
        return frame

    async def close(self) -> None:
        """Send what was written, then close; after `CLOSE_TIMEOUT_S`, whatever is left is dropped."""
        if self._transport is not None and not self.closed:
            self._transport.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._closed.wait()
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None and not self._closed.is_set():
            self._transport.abort()
        self._fail(LinkClosed("this side has closed the link"))

    # -- what the transport calls --------------------------------------------------------------------------

    def attach(self, transport: asyncio.Transport) -> None:
        """The transport to be, which is not ready yet; a link that was closed meanwhile closes it."""
        self._transport = transport
        if self.closed:
            transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.attach(cast(asyncio.Transport, transport))  # uvloop's are not subclasses
        self._opened.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.closed:
            return
        self.received_bytes += nbytes
        assert self._transport is not None
        self._reader.received(nbytes)
        try:
            while (frame := self._reader.next_frame()) is not None:
                self._frames.append(frame)
                self._unread_bytes += frame.size_bytes
        except BadFrame as error:
            self._fail(error)
            self._transport.abort()
            return
        if self._frames:
            self._arrived.set()
            if self._unread_bytes > MAX_UNREAD_BYTES and not self._reading_paused:
                self._reading_paused = True
                self._transport.pause_reading()

    def eof_received(self) -> None:
        self._fail(LinkClosed("the other side has closed the link"))

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, PeerLost):
            self._fail(exc)
        else:
            self._fail(
                LinkClosed("the other side has closed the link" if exc is None else f"link broken: {exc}")
            )
        self._closed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        if self.on_writable is not None:
            self.on_writable()

    def _fail(self, error: ServingError) -> None:
        if self._failure is None:
            self._failure = error
            for event in (self._arrived, self._opened, self._writable):
                event.set()

    def _lost(self) -> ServingError:
        # A new one each time: a raised error keeps its traceback.
        assert self._failure is not None
        return type(self._failure)(self._failure.message)
