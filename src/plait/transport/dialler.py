"""Links that a member makes: by the first address that answers, or through the first member that splices."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from plait.errors import BadSetup, PeerLost, ServingError
from plait.ids import PeerId
from plait.transport.connection import Connection
from plait.transport.credentials import Credentials
from plait.transport.handshake import Greeted
from plait.transport.known_peer import KnownPeer
from plait.transport.limits import NetworkLimits
from plait.transport.link import Carrier, Link
from plait.transport.splice import Splices


class Dialler:
    """`connect_middle` gives the link to a member that is to splice."""

    def __init__(
        self,
        credentials: Credentials,
        carriers: Mapping[str, Carrier],
        splices: Splices,
        limits: NetworkLimits,
        connect_middle: Callable[[PeerId], Awaitable[Connection]],
    ) -> None:
        self._credentials = credentials
        self._carriers = dict(carriers)
        self._splices = splices
        self._limits = limits
        self._connect_middle = connect_middle

    def carrier(self, address: str) -> Carrier:
        """What dials and listens at such addresses.

        Raises:
            BadSetup: nothing does.
        """
        scheme = address.partition("://")[0]
        carrier = self._carriers.get(scheme)
        if carrier is None:
            known = ", ".join(sorted(self._carriers))
            raise BadSetup(f"{address!r} is of no scheme known here; known: {known}")
        return carrier

    async def dial(self, known: KnownPeer) -> tuple[Link, Greeted, PeerId | None]:
        """A link to a peer that has proved itself, and who carries it, if anybody.

        All addresses are tried, then all members that splice; each starts when the one before has failed or takes long.

        Raises:
            PeerLost: none of them works, and why.
        """
        ways: list[tuple[PeerId | None, Callable[[], Awaitable[Link]]]] = [
            (None, lambda address=address: self._dial_address(known.id, address))
            for address in known.addresses
        ]
        ways += [
            (middle, lambda middle=middle: self._dial_through(known.id, middle))
            for middle in known.through
            if middle not in (self._credentials.peer, known.id)
        ]
        if not ways:
            raise PeerLost("no address of it is known")
        failures: list[str] = []
        running: dict[asyncio.Task[Link], PeerId | None] = {}
        try:
            while ways or running:
                if ways:
                    middle, way = ways.pop(0)
                    running[asyncio.ensure_future(way())] = middle
                done, _ = await asyncio.wait(
                    running,
                    timeout=self._limits.stagger_s if ways else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    middle = running.pop(task)
                    try:
                        link = task.result()
                        # One at a time: of two handshakes of one member, the other end drops the earlier.
                        return link, await self._greet(known, link), middle
                    except ServingError as error:
                        failures.append(error.message)
        finally:
            for task in running:
                task.cancel()
            for outcome in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(outcome, Link):
                    outcome.abort()
        raise PeerLost("; ".join(failures))

    async def _greet(self, known: KnownPeer, link: Link) -> Greeted:
        return await self._credentials.greet(
            link, known.id, last_link=known.last_link, timeout_s=self._limits.handshake_timeout_s
        )

    async def _dial_address(self, peer: PeerId, address: str) -> Link:
        try:
            carrier = self.carrier(address)
        except BadSetup as error:
            raise PeerLost(error.message) from None
        return await carrier.dial(address, peer=peer, timeout_s=self._limits.dial_timeout_s)

    async def _dial_through(self, peer: PeerId, middle: PeerId) -> Link:
        link = Link(f"splice://{middle}/{peer}")
        try:
            async with asyncio.timeout(self._limits.dial_timeout_s):
                stream = self._splices.open(await self._connect_middle(middle), peer)
                try:
                    await stream.accepted
                    stream.start(self._credentials.tls().dial(link, peer))
                    await link.opened()
                except BaseException:
                    stream.abort()
                    raise
        except TimeoutError:
            raise PeerLost(f"through {middle[:8]}: no answer") from None
        except PeerLost as error:
            raise PeerLost(f"through {middle[:8]}: {error.message}") from None
        return link
