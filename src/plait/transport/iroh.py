"""Carrier: QUIC by the iroh library, for machines behind address translation that a relay of one's own introduces.

`iroh://host:port` is where a machine's UDP socket is; `iroh://host:port?relay=URL` adds the relay where it can be met,
through which both ends find a direct way and, as long as there is none, speak. A machine's identity is its key in iroh
too, so whoever is dialled has proved to be that peer. The protocol's name, which both ends must know, follows from the
swarm's door; it is sent in clear, so it keeps mistakes out and proves nothing: the handshake does (handshake.py).

One stream of a QUIC connection is one link. The dialler's first byte makes it known to the other end; that one's answer
measures the round trip (dialler.py).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

from plait.errors import BadSetup, PeerLost
from plait.ids import PeerId
from plait.transport.identity import Identity
from plait.transport.iroh_binding import load_iroh
from plait.transport.link import CLOSE_TIMEOUT_S, Link
from plait.transport.ticket import SwarmSecret, TicketSecret, derive

SCHEME = "iroh"
_GREETING = b"\x01"
_ACCEPT_TIMEOUT_S = 10.0
_READ_BYTES = 1 << 20
_PIECE_BYTES = 1 << 18  # handed to the library at a time
_HIGH_BYTES = 1 << 18  # asyncio's marks for back-pressure
_LOW_BYTES = 1 << 16


class IrohCarrier:
    """`relay`: URL of the relay that this machine can be met at, None for none.

    Raises:
        BadSetup: the library is not installed, or is of another version.
    """

    def __init__(
        self, identity: Identity, secret: SwarmSecret | TicketSecret, *, relay: str | None = None
    ) -> None:
        self._iroh = load_iroh()
        self._identity = identity
        self._relay = relay
        self._protocol = b"plait/" + derive(secret.door, "iroh protocol").hex().encode()
        self._listening: _Socket | None = None
        self._dialling: _Socket | None = None

    async def listen(self, address: str, accept: Callable[[Link], None]) -> "IrohListener":
        host, port, _ = _parts(address)
        socket = await self._bind(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", self._relay)
        self._listening = socket
        bound = next(iter(socket.endpoint.bound_sockets()))
        told = f"{SCHEME}://{bound}" + (f"?relay={self._relay}" if self._relay else "")
        return IrohListener(socket, told, accept)

    async def dial(self, address: str, *, peer: PeerId, timeout_s: float) -> Link:
        link = Link(address)
        try:
            async with asyncio.timeout(timeout_s):
                await self._dial(link, address, peer)
        except TimeoutError:
            link.abort()
            raise PeerLost(f"{address} does not answer within {timeout_s:g} s") from None
        except BadSetup as error:
            raise PeerLost(error.message) from None
        except self._iroh.IrohError as error:
            link.abort()
            raise PeerLost(f"{address} cannot be reached: {_said(error)}") from None
        except asyncio.CancelledError:
            link.abort()
            raise
        return link

    async def _dial(self, link: Link, address: str, peer: PeerId) -> None:
        host, port, relay = _parts(address)
        place = self._iroh.EndpointAddr(
            self._iroh.EndpointId.from_bytes(bytes.fromhex(peer)),
            relay,
            [f"{found}:{port}" for found in await _resolved(host, port)],
        )
        socket = self._listening
        if socket is None or socket.closed:
            if self._dialling is None or self._dialling.closed:
                self._dialling = await self._bind("0.0.0.0:0", relay)
            socket = self._dialling
        with socket.used():
            connection = await socket.endpoint.connect(place, self._protocol)
            try:
                stream = await connection.open_bi()
                sending, receiving = stream.send(), stream.recv()
                greeted_s = asyncio.get_running_loop().time()
                await sending.write_all(_GREETING)
                await receiving.read_exact(len(_GREETING))
                link.rtt_s = asyncio.get_running_loop().time() - greeted_s
            except BaseException:
                connection.close(0, b"")
                raise
            IrohTransport(socket, connection, sending, receiving, peer).start(link)

    async def _bind(self, address: str, relay: str | None) -> "_Socket":
        iroh = self._iroh
        mode = iroh.RelayMode.custom_from_urls([relay]) if relay else iroh.RelayMode.disabled()
        try:
            endpoint = await iroh.Endpoint.bind(
                iroh.EndpointOptions(
                    preset=iroh.preset_minimal(),
                    bind_addr=address,
                    secret_key=self._identity.key.private_bytes_raw(),
                    alpns=[self._protocol],
                    relay_mode=mode,
                )
            )
        except iroh.IrohError as error:
            raise BadSetup(f"cannot listen at {SCHEME}://{address}: {_said(error)}") from None
        return _Socket(endpoint, iroh.IrohError)


class _Socket:
    """One UDP socket of the library's; it closes once nobody uses it any more."""

    def __init__(self, endpoint: Any, error: type[Exception]) -> None:
        self.endpoint = endpoint
        self.error = error
        self.closed = False
        self._users = 0
        self._closing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def used(self) -> "_Use":
        """A use of it, until its exit."""
        self._users += 1
        return _Use(self._leave)

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _leave(self) -> None:
        self._users -= 1
        if self._users == 0 and not self.closed:
            self.closed = True
            self._closing = self.spawn(self._close())

    async def wait_closed(self) -> None:
        """Wait until it has said goodbye to all, if nobody uses it."""
        if self._closing is not None:
            await asyncio.wait([self._closing], timeout=CLOSE_TIMEOUT_S)

    async def _close(self) -> None:
        with suppress(self.error):
            await self.endpoint.close()


class _Use:
    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._over = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *raised: object) -> None:
        self.end()

    def end(self) -> None:
        if not self._over:
            self._over = True
            self._leave()


class IrohListener:
    """Takes connections; links that it has made outlive it."""

    def __init__(self, socket: _Socket, address: str, accept: Callable[[Link], None]) -> None:
        self.address = address
        self._socket = socket
        self._accept = accept
        self._use = socket.used()
        self._tasks = {socket.spawn(self._accept_all())}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._use.end()
        await self._socket.wait_closed()

    async def _accept_all(self) -> None:
        with suppress(self._socket.error):
            while (incoming := await self._socket.endpoint.accept_next()) is not None:
                taking = self._socket.spawn(self._take(incoming))
                self._tasks.add(taking)
                taking.add_done_callback(self._tasks.discard)

    async def _take(self, incoming: Any) -> None:
        """Have one connection become a link; whoever is slow about it is dropped."""
        link: Link | None = None
        connection: Any = None
        try:
            with self._socket.used():
                async with asyncio.timeout(_ACCEPT_TIMEOUT_S):
                    place = await incoming.remote_addr()
                    link = Link(f"{SCHEME}://{getattr(place, 'addr', '') or getattr(place, 'url', 'relay')}")
                    self._accept(link)
                    if link.closed:  # too many have come already
                        await incoming.refuse()
                        return
                    connection = await (await incoming.accept()).connect()
                    stream = await connection.accept_bi()
                    sending, receiving = stream.send(), stream.recv()
                    if await receiving.read_exact(len(_GREETING)) != _GREETING:
                        raise PeerLost("it does not greet")
                    await sending.write_all(_GREETING)
                peer = PeerId(connection.remote_id().to_bytes().hex())
                IrohTransport(self._socket, connection, sending, receiving, peer).start(link)
        except (TimeoutError, PeerLost, self._socket.error) as error:
            if connection is not None:
                connection.close(0, b"")
            if link is not None:
                reason = _said(error) if isinstance(error, self._socket.error) else str(error) or "too slow"
                link.connection_lost(PeerLost(reason))


class IrohTransport(asyncio.Transport):
    """A stream as the transport of a link."""

    def __init__(self, socket: _Socket, connection: Any, sending: Any, receiving: Any, peer: PeerId) -> None:
        super().__init__()
        self._socket = socket
        self._connection = connection
        self._sending = sending
        self._receiving = receiving
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._use = socket.used()
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._work = asyncio.Event()
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._writing_paused = False
        self._closing = self._ended = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, link: Link) -> None:
        """Open the link."""
        self._link = link
        link.peer = self._peer
        link.connection_made(self)
        if not self._ended:  # as it does at once if the link was closed meanwhile
            self._tasks += [self._socket.spawn(self._write_all()), self._socket.spawn(self._read_all())]

    # -- what the link calls ---------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            self._unsent.append(bytes(view[start : start + _PIECE_BYTES]))
        self._unsent_bytes += len(view)
        self._work.set()
        if self._unsent_bytes > _HIGH_BYTES and not self._writing_paused:
            self._writing_paused = True
            self._link.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def close(self) -> None:
        self._closing = True
        self._work.set()

    def abort(self) -> None:
        self._end(None)

    # -- what goes on ----------------------------------------------------------------------------------------

    async def _write_all(self) -> None:
        try:
            while True:
                while self._unsent:
                    await self._write_some()
                if self._closing:
                    break
                self._work.clear()
                await self._work.wait()
            await self._sending.finish()
            await self._sending.stopped()  # the other end has all of it
            self._end(None)
        except self._socket.error as error:
            self._broken(error)

    async def _write_some(self) -> None:
        """Small pieces together, since each call of the library costs the same."""
        pieces = [self._unsent.popleft()]
        size_bytes = len(pieces[0])
        while self._unsent and size_bytes + len(self._unsent[0]) <= _PIECE_BYTES:
            pieces.append(self._unsent.popleft())
            size_bytes += len(pieces[-1])
        await self._sending.write_all(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self._unsent_bytes -= size_bytes
        if self._writing_paused and self._unsent_bytes <= _LOW_BYTES:
            self._writing_paused = False
            self._link.resume_writing()

    async def _read_all(self) -> None:
        try:
            while True:
                data = memoryview(await self._receiving.read(_READ_BYTES))
                if not data:
                    break
                while data and not self._ended:
                    await self._may_read.wait()
                    buffer = self._link.get_buffer(len(data))
                    count = min(len(buffer), len(data))
                    buffer[:count] = data[:count]
                    data = data[count:]
                    self._link.buffer_updated(count)
        except self._socket.error as error:
            self._broken(error)
            return
        if not self._closing:
            self._link.eof_received()
        self.close()

    def _broken(self, error: Exception) -> None:
        said = _said(error)
        # The other end has closed it, as either end does.
        self._end(None if self._closing or "ApplicationClosed" in said else ConnectionError(said))

    def _end(self, error: ConnectionError | None) -> None:
        """The stream is over; the link is told once."""
        if self._ended:
            return
        self._ended = self._closing = True
        self._connection.close(0, b"")
        for task in self._tasks:
            task.cancel()
        self._unsent.clear()
        self._unsent_bytes = 0
        self._use.end()
        self._loop.call_soon(self._link.connection_lost, error)


def _parts(address: str) -> tuple[str, int, str | None]:
    """Host, port and relay of an address."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        relay = parse_qs(parts.query).get("relay", [None])[0]
    except ValueError:
        host, port, relay = None, None, None
    if host is None or port is None:
        raise BadSetup(f"{address!r} is not an address: write {SCHEME}://host:port")
    return host, port, relay


async def _resolved(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port)
    except OSError as error:
        raise PeerLost(f"{host!r} cannot be found: {error.strerror}") from None
    names = {str(entry[4][0]) for entry in found}
    return sorted(f"[{name}]" if ":" in name else name for name in names)


def _said(error: BaseException) -> str:
    """An error of the library's in one line."""
    message = getattr(error, "message", None)
    return str(message() if callable(message) else error).strip().replace("\n", ": ")
