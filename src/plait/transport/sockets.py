"""Carriers over sockets: TCP, TLS over TCP, unix sockets.

`tcp` and `unix` leave it to the handshake (handshake.py) to prove who is there, and protect nothing that follows: they
are for one machine, or for a network that only these machines can reach. `tls` is for all others.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from plait.errors import BadSetup, PeerLost
from plait.ids import PeerId
from plait.transport.identity import Identity
from plait.transport.link import Link
from plait.transport.ticket import SwarmSecret, TicketSecret
from plait.transport.tls import TlsContexts


class SocketListener:
    """A server socket of asyncio's; `address` is where it is bound."""

    def __init__(self, server: asyncio.Server, address: str, file: Path | None = None) -> None:
        self.address = address
        self._server = server
        self._file = file

    async def close(self) -> None:
        self._server.close()
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)


class TcpCarrier:
    """`tcp://host:port`."""

    scheme = "tcp"

    async def listen(self, address: str, accept: Callable[[Link], None]) -> SocketListener:
        host, port = _host_and_port(address, self.scheme)
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: self._accepting(accept), host, port)
        except OSError as error:
            raise BadSetup(f"cannot listen at {address}: {error.strerror or error}") from None
        bound_host, bound_port = server.sockets[0].getsockname()[:2]
        return SocketListener(server, _address(self.scheme, bound_host, bound_port))

    async def dial(self, address: str, *, peer: PeerId, timeout_s: float) -> Link:
        try:
            host, port = _host_and_port(address, self.scheme)
        except BadSetup as error:
            raise PeerLost(error.message) from None
        link = Link(address)
        loop = asyncio.get_running_loop()
        await _dialled(
            link, address, timeout_s, loop.create_connection(lambda: self._dialling(link, peer), host, port)
        )
        return link

    def _accepting(self, accept: Callable[[Link], None]) -> asyncio.BaseProtocol:
        return _Accepted(self.scheme, accept, lambda link: link)

    def _dialling(self, link: Link, peer: PeerId) -> asyncio.BaseProtocol:
        return link


class TlsCarrier(TcpCarrier):
    """`tls://host:port`: TLS 1.3 between pinned identities."""

    scheme = "tls"

    def __init__(self, identity: Identity, secret: SwarmSecret | TicketSecret) -> None:
        self._contexts = TlsContexts(identity, secret.door)

    def _accepting(self, accept: Callable[[Link], None]) -> asyncio.BaseProtocol:
        return _Accepted(self.scheme, accept, self._contexts.accept)

    def _dialling(self, link: Link, peer: PeerId) -> asyncio.BaseProtocol:
        return self._contexts.dial(link, peer)


class UnixCarrier:
    """`unix:///path/of/socket`, which only its owner can connect to."""

    async def listen(self, address: str, accept: Callable[[Link], None]) -> SocketListener:
        file = _socket_file(address)
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_unix_server(
                lambda: _Accepted("unix", accept, lambda link: link), str(file), start_serving=False
            )
            os.chmod(file, 0o600)
            await server.start_serving()
        except OSError as error:
            raise BadSetup(f"cannot listen at {address}: {error.strerror or error}") from None
        return SocketListener(server, f"unix://{file}", file)

    async def dial(self, address: str, *, peer: PeerId, timeout_s: float) -> Link:
        try:
            file = _socket_file(address)
        except BadSetup as error:
            raise PeerLost(error.message) from None
        link = Link(address)
        loop = asyncio.get_running_loop()
        await _dialled(link, address, timeout_s, loop.create_unix_connection(lambda: link, str(file)))
        return link


class _Accepted(asyncio.BufferedProtocol):
    """Stands on an accepted socket until it is known whose it is; then the link's own protocol takes its place."""

    def __init__(
        self,
        scheme: str,
        accept: Callable[[Link], None],
        protocol_of: Callable[[Link], asyncio.BufferedProtocol],
    ) -> None:
        self._scheme = scheme
        self._accept = accept
        self._protocol_of = protocol_of

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        name: object = transport.get_extra_info("peername")
        if isinstance(name, tuple):
            host, port = cast("tuple[str, int]", name[:2])
            link = Link(_address(self._scheme, host, port))
        else:  # a unix socket's other end has no name
            link = Link(f"{self._scheme}://")
        protocol = self._protocol_of(link)
        transport.set_protocol(protocol)
        self._accept(link)
        protocol.connection_made(transport)


async def _dialled(link: Link, address: str, timeout_s: float, connecting: Awaitable[object]) -> None:
    """Wait for a connection and for what its carrier does on it; close it if that fails."""
    try:
        async with asyncio.timeout(timeout_s):
            await connecting
            await link.opened()
    except TimeoutError:
        link.abort()
        raise PeerLost(f"{address} does not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise PeerLost(f"{address} cannot be reached: {error.strerror or error}") from None
    except PeerLost as error:
        link.abort()
        raise PeerLost(f"{address}: {error.message}") from None
    except asyncio.CancelledError:
        link.abort()
        raise


def _host_and_port(address: str, scheme: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise BadSetup(f"{address!r} is not an address: write {scheme}://host:port")
    return host, port


def _address(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _socket_file(address: str) -> Path:
    path = address.removeprefix("unix://")
    if not path.startswith("/"):
        raise BadSetup(f"{address!r} is not an address: write unix:///path/of/socket")
    return Path(path)
