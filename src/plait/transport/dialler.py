"""Links that a member makes: by the first address that answers, or through the first member that splices.

iroh is for those that cannot be dialled otherwise: it is tried after all other addresses, and where members could
splice too, whichever way has the shorter round trip, as measured while both links are made, is taken.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from plait.errors import BadSetup, PeerLost, ServingError
from plait.ids import PeerId
from plait.transport.connection import Connection
from plait.transport.credentials import Credentials
from plait.transport.handshake import Greeted
from plait.transport.known_peer import KnownPeer
from plait.transport.limits import NetworkLimits
from plait.transport.link import Carrier, Link
from plait.transport.splice import Splices

COMPARE_S = 0.5
"""How long the second of two competing ways may take after the first."""
IROH_COST = 1.25
"""A message over iroh costs several times the processor time of one over TLS (bench/links.py): it must be worth it."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How a link may be made; `middle` is the member that would carry it."""

    kind: Literal["direct", "iroh", "splice"]
    make: Callable[[], Awaitable[Link]]
    middle: PeerId | None = None


def _cost(opened: tuple[Link, _Way]) -> tuple[bool, float]:
    link, way = opened
    return way.kind != "direct", link.rtt_s * (IROH_COST if way.kind == "iroh" else 1.0)


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
        The first that opens is taken, except where iroh and a splice compete: both are waited for, and measured.

        Raises:
            PeerLost: none of them works, and why.
        """
        ways = self._ways(known)
        if not ways:
            raise PeerLost("no address of it is known")
        compares = any(way.kind == "iroh" for way in ways) and any(way.kind == "splice" for way in ways)
        loop = asyncio.get_running_loop()
        failures: list[str] = []
        running: dict[asyncio.Task[Link], _Way] = {}
        opened: list[tuple[Link, _Way]] = []
        decide_s = math.inf
        try:
            while ways or running or opened:
                if ways:
                    way = ways.pop(0)
                    running[asyncio.ensure_future(way.make())] = way
                if running:
                    wait_s = None
                    if opened:
                        wait_s = 0.0 if ways else max(0.0, decide_s - loop.time())
                    elif ways:
                        wait_s = self._limits.stagger_s
                    done, _ = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        way = running.pop(task)
                        try:
                            opened.append((task.result(), way))
                            decide_s = min(decide_s, loop.time() + COMPARE_S)
                        except ServingError as error:
                            failures.append(error.message)
                waits = compares and (ways or running) and loop.time() < decide_s
                if not opened or (waits and all(way.kind != "direct" for _, way in opened)):
                    continue
                opened.sort(key=_cost)
                link, way = opened.pop(0)
                try:
                    # One at a time: of two handshakes of one member, the other end drops the earlier.
                    return link, await self._greet(known, link), way.middle
                except ServingError as error:
                    failures.append(error.message)
        finally:
            for task in running:
                task.cancel()
            for link, _ in opened:
                link.abort()
            for outcome in await asyncio.gather(*running, return_exceptions=True):
                if isinstance(outcome, Link):
                    outcome.abort()
        raise PeerLost("; ".join(failures))

    def _ways(self, known: KnownPeer) -> "list[_Way]":
        """By its addresses, those of iroh's last, then through members that splice."""
        by_address = [
            _Way(
                "iroh" if address.startswith("iroh://") else "direct",
                lambda address=address: self._dial_address(known.id, address),
            )
            for address in known.addresses
        ]
        through = [
            _Way("splice", lambda middle=middle: self._dial_through(known.id, middle), middle)
            for middle in known.through
            if middle not in (self._credentials.peer, known.id)
        ]
        return sorted(by_address, key=lambda way: way.kind == "iroh") + through

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
                carrying = await self._connect_middle(middle)
                asked_s = asyncio.get_running_loop().time()
                stream = self._splices.open(carrying, peer)
                try:
                    await stream.accepted
                    link.rtt_s = asyncio.get_running_loop().time() - asked_s
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
