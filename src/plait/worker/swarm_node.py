"""A place in a swarm, with or without blocks to serve: the network, who else is there, and who hears what comes.

Everything of a member stands on one of these: sessions, membership and weights share its links. It also makes the
snapshots that decisions are made from.
"""

import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from plait.ids import PeerId
from plait.transport import Carrier, Identity, Network, NetworkLimits, SwarmSecret, TicketPeer, TicketSecret
from plait.wire import Message
from plait.worker.lookout import Lookout
from plait.worker.membership import DEFAULT_LIMITS, Membership, MembershipLimits
from plait.worker.weight_exchange import WEIGHT_MESSAGES, WeightExchange

log = logging.getLogger(__name__)

NETWORK_LIMITS = NetworkLimits()


class Hearer(Protocol):
    """Hears what peers say and which are lost; what does not concern it, it ignores."""

    def on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None: ...

    def on_lost(self, peer: PeerId, reason: str) -> None: ...


class SwarmNode:
    """One member's links, records and weights; enter it to be in the swarm, leave it to be gone.

    `listen` are addresses to take links at, with their scheme; `advertise` are those that others are told; for a
    scheme without any, what is bound is told, where it is of use to others. `introducers` are the members of a ticket.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        secret: SwarmSecret | TicketSecret,
        carriers: dict[str, Carrier],
        listen: Sequence[str],
        advertise: Sequence[str] = (),
        introducers: Sequence[TicketPeer] = (),
        rng: np.random.Generator,
        limits: NetworkLimits = NETWORK_LIMITS,
        membership_limits: MembershipLimits = DEFAULT_LIMITS,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self.peer = identity.peer
        self.introducers = tuple(introducers)
        self.unix_now = unix_now
        self.rng = rng
        self.addresses: tuple[str, ...] = ()
        """What others are told to dial; empty before it is entered, and where only its own dials reach others."""
        self.network = Network(identity, secret=secret, carriers=carriers, limits=limits, unix_now=unix_now)
        self.membership = Membership(
            self.network,
            identity,
            rng=rng,
            introducers=introducers,
            limits=membership_limits,
            unix_now=unix_now,
        )
        self.exchange = WeightExchange(self.network)
        self._listen = tuple(listen)
        self._advertise = tuple(advertise)
        self._hearers: list[Hearer] = []
        self._watchers: list[Callable[[], None]] = []
        self._stack = AsyncExitStack()
        self.network.on_message = self._on_message
        self.network.on_lost = self._on_lost
        self.network.route(WEIGHT_MESSAGES, self.exchange.on_message)
        self.membership.on_change = self._on_change

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.network)
            bound = [await self.network.listen(address) for address in self._listen]
            advertised = {_scheme(address) for address in self._advertise}
            self.addresses = self._advertise + tuple(
                useful
                for address in bound
                if _scheme(address) not in advertised
                for useful in self._useful(address)
            )
            await stack.enter_async_context(self.exchange)
            await stack.enter_async_context(self.membership)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def add_hearer(self, hearer: Hearer) -> None:
        """Let something hear all messages that have no route of their own, and all losses, from now on."""
        self._hearers.append(hearer)

    def remove_hearer(self, hearer: Hearer) -> None:
        self._hearers.remove(hearer)

    def watch(self, on_change: Callable[[], None]) -> None:
        """Have something called whenever what is known of the swarm's members changes."""
        self._watchers.append(on_change)

    def look(self, model: str, model_blocks: int) -> Lookout:
        """A lookout over the members that serve a model; whoever has it tells it of changes (`watch`)."""
        return Lookout(
            self.network,
            self.membership.records,
            model=model,
            model_blocks=model_blocks,
            unix_now=self.unix_now,
        )

    def _on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        for hearer in self._hearers:
            hearer.on_message(peer, message, tensors)

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        self.exchange.on_lost(peer, reason)
        for hearer in list(self._hearers):
            hearer.on_lost(peer, reason)
        self._changed()

    def _on_change(self, peer: PeerId) -> None:
        self._changed()

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher()

    def _useful(self, address: str) -> tuple[str, ...]:
        """What others should dial for a bound address: this host's own one for a wildcard, and no loopback address
        where the members that introduced this one are on other machines."""
        place, mark, relay = address.partition("?")
        scheme, _, rest = place.partition("://")
        host, _, port = rest.rpartition(":")
        try:
            bound = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return (address,)  # a name, a path, a place in memory
        if bound.is_unspecified:
            return tuple(f"{scheme}://{own}:{port}{mark}{relay}" for own in own_addresses(bound.version))
        if bound.is_loopback and not all(map(_is_loopback, self._introducer_addresses())):
            return ()
        return (address,)

    def _introducer_addresses(self) -> list[str]:
        return [address for introducer in self.introducers for address in introducer.addresses]


def own_addresses(version: int) -> tuple[str, ...]:
    """The address of this host that packets to other networks leave from, and the loopback one; nothing is sent."""
    family, far, loopback = (
        (socket.AF_INET, "192.0.2.1", "127.0.0.1")
        if version == 4
        else (socket.AF_INET6, "2001:db8::1", "[::1]")
    )
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            own = str(probe.getsockname()[0])
    except OSError:
        return (loopback,)
    return (f"[{own}]" if version == 6 else own,)


def _scheme(address: str) -> str:
    return address.partition("://")[0]


def _is_loopback(address: str) -> bool:
    host = address.partition("?")[0].partition("://")[2].rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or not address.startswith(("tls://", "tcp://", "iroh://"))
