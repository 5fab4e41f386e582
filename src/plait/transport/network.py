"""All links of one member: the layer that everything above sends and receives through.

A peer has at most one link, made by whichever end first has something to send: straight to one of its addresses, or
spliced through a member that it keeps a link to. If both ends dial at once, the dial of the smaller identity stands.
What goes wrong with a peer (it leaves, falls silent, breaks the protocol) ends its link, is logged once and told to
`on_lost`; nobody else notices. There is no retry of messages here: what was in flight to a lost peer may or may not
have arrived, and the sessions above know what to repeat.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from plait.errors import BadFrame, PeerLost, ServingError
from plait.ids import PeerId
from plait.transport.connection import TICKS_PER_HEARTBEAT, Connection, Outgoing
from plait.transport.credentials import Credentials
from plait.transport.dialler import Dialler
from plait.transport.doorkeeper import Doorkeeper
from plait.transport.estimate import LinkEstimate
from plait.transport.handshake import Greeted, Heard
from plait.transport.identity import Identity
from plait.transport.known_peer import KnownPeer
from plait.transport.limits import NetworkLimits
from plait.transport.link import Carrier, Link, LinkClosed, Listener
from plait.transport.splice import Splices
from plait.transport.ticket import SwarmSecret, TicketSecret
from plait.transport.traffic import NOTHING, LinkTraffic
from plait.wire import (
    Buffer,
    Message,
    Probe,
    SpliceAccept,
    SpliceBytes,
    SpliceClose,
    SpliceCredit,
    SpliceOffer,
    SpliceOpen,
    encode_message,
    frame_bytes,
)

log = logging.getLogger(__name__)

OnMessage = Callable[[PeerId, Message, tuple[memoryview, ...]], None]
OnLost = Callable[[PeerId, str], None]
OnLinked = Callable[[PeerId], None]
DEFAULT_LIMITS = NetworkLimits()
PROBE_BYTES = 1 << 20


def _drop_message(peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
    log.debug("peer=%s sent %s, which nobody listens to", peer[:8], type(message).__name__)


def _drop_loss(peer: PeerId, reason: str) -> None:
    pass


def _drop_link(peer: PeerId) -> None:
    pass


class Network:
    """Sends messages to peers and receives theirs; enter it to start, leave it to close all links.

    `on_message` gets every message that has no route of its own (`route`), on the event loop, in the order in which
    each peer sent; it must not block, and owns the tensors. `on_lost` is told when a linked peer is gone, and why; not
    when this side closes. `on_linked` is told of each new link (worker/membership.py sets it). A `BadFrame` that one of
    them raises for a message cuts its sender off. Set them before entering.

    `carriers` are named by the scheme of their addresses. `secret` is that of the swarm, or of a ticket: then the first
    member that is reached hands over the swarm's own, which is in `secret` afterwards, to be kept.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        secret: SwarmSecret | TicketSecret,
        carriers: Mapping[str, Carrier],
        limits: NetworkLimits = DEFAULT_LIMITS,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self.peer = identity.peer
        self.limits = limits
        self.on_message: OnMessage = _drop_message
        self.on_lost: OnLost = _drop_loss
        self.on_linked: OnLinked = _drop_link
        self._routes: dict[type, OnMessage] = {}
        self._peers: dict[PeerId, KnownPeer] = {}
        self._forgotten = NOTHING  # what passed between here and peers that are not known any more
        self._listeners: list[Listener] = []
        self._credentials = Credentials(identity, secret, unix_now)
        self._doorkeeper = Doorkeeper(self._credentials, limits, decide=self._decide, admit=self._admit)
        self._splices = Splices(limits, self._connection_to, self._doorkeeper.accept_splice)
        self._dialler = Dialler(self._credentials, carriers, self._splices, limits, self._connect_middle)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.TimerHandle | None = None
        self._open = False

    @property
    def secret(self) -> SwarmSecret | TicketSecret:
        """What this member can prove: the swarm's secret, or a ticket's as long as nobody has let it in."""
        return self._credentials.secret

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._ticking = self._loop.call_later(self._tick_s, self._tick)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._ticking is not None:
            self._ticking.cancel()
        for listener in self._listeners:
            await listener.close()
        linked = [peer for peer in self._peers.values() if peer.connection is not None]
        for peer in linked:
            assert peer.connection is not None
            peer.connection.goodbye("it is stopping")
        await asyncio.gather(
            *(peer.connection.link.close() for peer in linked if peer.connection is not None)
        )
        await self._doorkeeper.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self._peers.values():
            if peer.connection is not None:
                self._splices.lost(peer.connection)
                peer.connection.fail(PeerLost("this member is stopping"))
                peer.connection = None
            peer.give_up("this member is stopping")

    # -- what the layers above call --------------------------------------------------------------------------

    def route(self, kinds: Iterable[type], on_message: OnMessage) -> None:
        """Messages of these classes go here instead of to `on_message`."""
        for kind in kinds:
            self._routes[kind] = on_message

    async def listen(self, address: str) -> str:
        """Take links at an address; returns it with the port that it got.

        Raises:
            BadSetup: the address is malformed, taken, not of this machine, or of no known scheme.
        """
        listener = await self._dialler.carrier(address).listen(address, self._doorkeeper.accept)
        self._listeners.append(listener)
        return listener.address

    def learn(self, peer: PeerId, addresses: Sequence[str], through: Sequence[PeerId] = ()) -> None:
        """Where a peer can be dialled, and which peers splice to it; replaces what was known."""
        if peer == self.peer:
            return
        known = self._known(peer)
        if (known.addresses, known.through) != (tuple(addresses), tuple(through)):
            known.addresses, known.through = tuple(addresses), tuple(through)
            known.retry_s = 0.0

    def forget(self, peer: PeerId) -> None:
        """It is no longer known where to reach a peer; a link that exists stays."""
        known = self._peers.get(peer)
        if known is not None:
            known.addresses, known.through, known.kept = (), (), False
            self._tidy(known)

    def keep(self, peer: PeerId, kept: bool = True) -> None:
        """Stay linked to a peer: dial it again, with back-off, whenever the link is gone."""
        if peer != self.peer:
            self._known(peer).kept = kept

    async def send(
        self,
        peer: PeerId,
        message: Message,
        tensors: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Send once there is a link and credit; returns when the link has taken it, not when it has arrived.

        `timeout_s` is `NetworkLimits.send_timeout_s` if not given. The tensors must not change afterwards. Messages of
        one peer arrive in the order of these calls. A message to oneself is delivered in the next turn of the loop.

        Raises:
            PeerLost: the peer cannot be reached, was cut off, takes too long or is lost meanwhile.
            BadFrame: the message is longer than the peer takes.
        """
        if peer == self.peer:
            self._deliver_to_self(message, tensors)
            return
        header = encode_message(message)
        size_bytes = frame_bytes(len(header), [memoryview(tensor).nbytes for tensor in tensors])
        known = self._reach(peer)
        connection = known.connection
        if connection is not None and connection.send_now(header, tensors, size_bytes):
            return
        outgoing = Outgoing(header, tensors, size_bytes, self._loop.create_future())
        known.queue.append(outgoing)
        if connection is not None:
            connection.flush()
        timeout_s = self.limits.send_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                assert outgoing.sent is not None
                await outgoing.sent
        except TimeoutError:
            raise PeerLost(f"peer {peer[:8]} has not taken a message within {timeout_s:g} s") from None
        finally:
            if outgoing in known.queue:
                known.queue.remove(outgoing)
                if known.connection is not None:
                    known.connection.flush()

    def try_send(self, peer: PeerId, message: Message, tensors: Sequence[Buffer] = ()) -> bool:
        """As `send`, if it can be done at once: there is a link, with room, and nobody waits. Whether it was done.

        Raises:
            BadFrame: the message cannot be sent at all.
        """
        if peer == self.peer:
            self._deliver_to_self(message, tensors)
            return True
        known = self._peers.get(peer)
        if known is None or known.connection is None:
            return False
        header = encode_message(message)
        size_bytes = frame_bytes(len(header), [memoryview(tensor).nbytes for tensor in tensors])
        return known.connection.send_now(header, tensors, size_bytes)

    async def connect(self, peer: PeerId, *, timeout_s: float | None = None) -> None:
        """Have a link to a peer.

        Raises:
            PeerLost: it cannot be reached.
        """
        timeout_s = self.limits.send_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected(peer)
        except TimeoutError:
            raise PeerLost(f"peer {peer[:8]} cannot be reached within {timeout_s:g} s") from None

    async def probe(
        self, peer: PeerId, *, payload_bytes: int = PROBE_BYTES, timeout_s: float | None = None
    ) -> LinkEstimate:
        """Measure the bandwidth to a peer by sending it so many bytes, and return the estimate.

        Raises:
            PeerLost: the peer cannot be reached, or takes too long.
        """
        timeout_s = self.limits.send_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected(peer)
                return await connection.probe(payload_bytes)
        except TimeoutError:
            raise PeerLost(f"peer {peer[:8]} has not taken a probe within {timeout_s:g} s") from None

    def estimate(self, peer: PeerId) -> LinkEstimate | None:
        """Round trip and bandwidth as last seen; None if nothing has been measured yet."""
        known = self._peers.get(peer)
        if known is None:
            return None
        estimate = known.estimate if known.connection is None else known.connection.estimate
        return estimate if estimate.rtt_s or estimate.bandwidth_bytes_per_s else None

    def traffic(self, peer: PeerId) -> LinkTraffic:
        """What has passed between this member and a peer, as long as it is known."""
        known = self._peers.get(peer)
        if known is None:
            return NOTHING
        return known.before if known.connection is None else known.before + known.connection.traffic

    def total_traffic(self) -> LinkTraffic:
        """The same for all peers together, those that are forgotten included."""
        return sum(map(self.traffic, self._peers), self._forgotten)

    def connected(self) -> frozenset[PeerId]:
        """The peers that there is a link to."""
        return frozenset(peer.id for peer in self._peers.values() if peer.connection is not None)

    def connected_directly(self) -> frozenset[PeerId]:
        """Those of them whose link no other member carries: they can carry links to this one."""
        return frozenset(
            peer.id
            for peer in self._peers.values()
            if peer.connection is not None and peer.connection.middle is None
        )

    async def drop(self, peer: PeerId, reason: str) -> None:
        """Cut off a peer that misbehaves: its link ends, and it is refused for `NetworkLimits.ban_s`."""
        known = self._known(peer)
        self._cut_off(known, reason)

    # -- making links ----------------------------------------------------------------------------------------

    def _reach(self, peer: PeerId) -> KnownPeer:
        """A peer that there is a link to, or will be if the dial under way succeeds.

        Raises:
            PeerLost: it was cut off, or it is too soon after the last dial that failed.
        """
        known = self._known(peer)
        if known.connection is not None or known.dial is not None:
            return known
        now_s = self._loop.time()
        if not self._open:
            raise PeerLost("this member is stopping")
        if known.banned_until_s > now_s:
            raise PeerLost(f"peer {peer[:8]} was cut off: {known.failure}")
        if known.retry_s > now_s:
            wait_s = known.retry_s - now_s
            raise PeerLost(f"peer {peer[:8]}: {known.failure}; it is dialled again in {wait_s:.1f} s")
        known.dial = self._spawn(self._dial(known))
        return known

    async def _connected(self, peer: PeerId) -> Connection:
        known = self._reach(peer)
        if known.connection is not None:
            return known.connection
        waiter: asyncio.Future[Connection] = self._loop.create_future()
        known.waiters.append(waiter)
        try:
            return await waiter
        finally:
            if waiter in known.waiters:
                known.waiters.remove(waiter)

    async def _connect_middle(self, middle: PeerId) -> Connection:
        """The link to a member that is to splice; it is not itself reached through others only."""
        known = self._known(middle)
        if known.connection is None and not known.addresses:
            self._tidy(known)
            raise PeerLost("no link to it")
        return await self._connected(middle)

    async def _dial(self, known: KnownPeer) -> None:
        """Make a link by the first way that works; whoever waits is told how it went."""
        try:
            link, greeted, middle = await self._dialler.dial(known)
            known.dial = None
            self._establish(known, link, greeted, dialled=True, middle=middle)
        except ServingError as error:
            self._dial_failed(known, error.message)
        except Exception as error:
            log.exception("peer=%s could not be dialled", known.id[:8])
            self._dial_failed(known, f"{type(error).__name__}: {error}")

    def _dial_failed(self, known: KnownPeer, reason: str) -> None:
        known.dial_failed(reason, self.limits, own=self.peer, now_s=self._loop.time())
        level = logging.INFO if known.kept and known.failures == 1 else logging.DEBUG
        log.log(level, "peer=%s cannot be reached: %s", known.id[:8], reason)
        self._tidy(known)

    async def _decide(self, heard: Heard) -> None:
        """Whether a link that somebody else has made is to be the one to its peer.

        An own dial under way stands if this identity is the smaller one, unless it fails. A link that exists is
        replaced by one of a new process of the peer, or of one that knew the old link and dials even so: the link is
        dead, and this end has not noticed yet. Otherwise two dials have crossed, and the first stands.

        Raises:
            PeerLost: no.
        """
        peer = heard.hello.peer
        if peer == self.peer:
            raise PeerLost("it has this member's own identity")
        known = self._known(peer)
        if known.banned_until_s > self._loop.time():
            raise PeerLost(f"peer {peer[:8]} was cut off")
        if known.dial is not None and self.peer < peer:
            await asyncio.wait([known.dial])
            known = self._known(peer)
        connection = known.connection
        if connection is None:
            return
        if heard.hello.incarnation != connection.greeted.incarnation:
            self._lose(known, connection, "it has restarted")
        elif not connection.dialled or heard.hello.last_link == connection.greeted.link_id:
            self._lose(known, connection, "it has lost the link")
        else:
            raise LinkClosed("there is a link already")

    def _admit(self, link: Link, greeted: Greeted, middle: PeerId | None) -> None:
        self._establish(self._known(greeted.peer), link, greeted, dialled=False, middle=middle)

    def _establish(
        self, known: KnownPeer, link: Link, greeted: Greeted, *, dialled: bool, middle: PeerId | None
    ) -> None:
        """From now on this is the link to its peer.

        Raises:
            PeerLost: it has ended already, its peer was cut off, or this member is stopping.
        """
        if not self._open:
            link.abort()
            raise LinkClosed("this member is stopping")
        if known.banned_until_s > self._loop.time():
            link.abort()
            raise PeerLost(f"peer {known.id[:8]} was cut off")
        connection = Connection(
            link,
            greeted,
            dialled=dialled,
            middle=middle,
            queue=known.queue,
            limits=self.limits,
            estimate=known.estimate,
        )
        log.info("peer=%s linked by %s", known.id[:8], link.name)
        known.linked(connection)
        self._spawn(self._serve(known, connection))
        self.on_linked(known.id)

    # -- live links ------------------------------------------------------------------------------------------

    async def _serve(self, known: KnownPeer, connection: Connection) -> None:
        def deliver(message: Message, tensors: tuple[memoryview, ...]) -> None:
            match message:
                case Probe():
                    pass
                case (
                    SpliceOpen()
                    | SpliceOffer()
                    | SpliceAccept()
                    | SpliceBytes()
                    | SpliceCredit()
                    | SpliceClose()
                ):
                    self._splices.handle(connection, message, tensors)
                case _:
                    self._deliver(known.id, message, tensors)

        try:
            await connection.run(deliver)
        except PeerLost as error:
            self._lose(known, connection, error.message)
        except BadFrame as error:
            if known.connection is connection:
                self._cut_off(known, error.message)
        except Exception as error:
            log.exception("peer=%s: a message could not be handled", known.id[:8])
            if known.connection is connection:
                self._cut_off(known, f"{type(error).__name__} while its message was handled")

    def _deliver(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        self._routes.get(type(message), self.on_message)(peer, message, tensors)

    def _deliver_to_self(self, message: Message, tensors: Sequence[Buffer]) -> None:
        views = tuple(memoryview(tensor) for tensor in tensors)
        self._loop.call_soon(self._deliver, self.peer, message, views)

    def _lose(self, known: KnownPeer, connection: Connection, reason: str) -> None:
        """A link is over; told once."""
        if known.connection is not connection:
            return
        known.before = replace(self.traffic(known.id), losses=known.before.losses + 1)
        known.connection = None
        known.estimate = connection.estimate
        known.failure = reason
        connection.fail(PeerLost(f"peer {known.id[:8]} is lost: {reason}"))
        self._splices.lost(connection)
        log.info("peer=%s lost: %s", known.id[:8], reason)
        if self._open:
            self.on_lost(known.id, reason)
        self._tidy(known)

    def _cut_off(self, known: KnownPeer, reason: str) -> None:
        log.warning("peer=%s cut off for %g s: %s", known.id, self.limits.ban_s, reason)
        known.banned_until_s = self._loop.time() + self.limits.ban_s
        known.failure = reason
        if known.connection is not None:
            self._lose(known, known.connection, reason)

    def _tick(self) -> None:
        self._ticking = self._loop.call_later(self._tick_s, self._tick)
        now_s = self._loop.time()
        for known in list(self._peers.values()):
            connection = known.connection
            if connection is not None:
                try:
                    connection.tick()
                except PeerLost as error:
                    self._lose(known, connection, error.message)
            elif known.kept and known.dial is None and now_s >= max(known.retry_s, known.banned_until_s):
                known.dial = self._spawn(self._dial(known))
            else:
                self._tidy(known)

    @property
    def _tick_s(self) -> float:
        return self.limits.heartbeat_s / TICKS_PER_HEARTBEAT

    # -- small things ----------------------------------------------------------------------------------------

    def _known(self, peer: PeerId) -> KnownPeer:
        known = self._peers.get(peer)
        if known is None:
            known = self._peers[peer] = KnownPeer(peer)
        return known

    def _tidy(self, known: KnownPeer) -> None:
        """Forget a peer that nothing is known of and nobody waits for."""
        if not known.wanted(self._loop.time()) and self._peers.pop(known.id, None) is not None:
            self._forgotten += known.before

    def _connection_to(self, peer: PeerId) -> Connection | None:
        known = self._peers.get(peer)
        return None if known is None else known.connection

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
