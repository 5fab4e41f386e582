"""All links of one member: the layer that everything above sends and receives through.

A peer has at most one link, made by whichever end first has something to send: straight to one of its addresses, or
spliced through a member that it keeps a link to. If both ends dial at once, the dial of the smaller identity stands.
What goes wrong with a peer (it leaves, falls silent, breaks the protocol) ends its link, is logged once and told to
`on_lost`; nobody else notices. There is no retry of messages here: what was in flight to a lost peer may or may not
have arrived, and the sessions above know what to repeat.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from plait.errors import BadFrame, BadSetup, PeerLost, ServingError
from plait.ids import PeerId
from plait.transport.connection import TICKS_PER_HEARTBEAT, Connection, Outgoing
from plait.transport.estimate import LinkEstimate
from plait.transport.handshake import NO_LINK, Greeted, Heard, greet, hear, welcome
from plait.transport.identity import Identity
from plait.transport.limits import NetworkLimits
from plait.transport.link import Carrier, Link, LinkClosed, Listener
from plait.transport.splice import Splices, SpliceTransport
from plait.transport.ticket import SwarmSecret, TicketSecret
from plait.transport.tls import TlsContexts
from plait.transport.traffic import NOTHING, LinkTraffic
from plait.wire import (
    NONCE_BYTES,
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
_MAX_TOLD = 1024
"""Refusals that are remembered, so that each is logged once."""


@dataclass(slots=True)
class _Peer:
    """What is known of the way to a peer, linked or not."""

    id: PeerId
    addresses: tuple[str, ...] = ()
    through: tuple[PeerId, ...] = ()
    kept: bool = False
    connection: Connection | None = None
    last_link: bytes = NO_LINK
    estimate: LinkEstimate = field(default_factory=LinkEstimate)
    dial: "asyncio.Task[None] | None" = None
    queue: deque[Outgoing] = field(default_factory=deque[Outgoing])
    waiters: "list[asyncio.Future[Connection]]" = field(default_factory=list["asyncio.Future[Connection]"])
    failures: int = 0
    retry_s: float = 0.0
    failure: str = ""
    banned_until_s: float = 0.0
    before: LinkTraffic = NOTHING  # over the links that have ended


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
        self.secret: SwarmSecret | TicketSecret = secret
        self.limits = limits
        self.on_message: OnMessage = _drop_message
        self.on_lost: OnLost = _drop_loss
        self.on_linked: OnLinked = _drop_link
        self._identity = identity
        self._carriers = dict(carriers)
        self._unix_now = unix_now
        self._routes: dict[type, OnMessage] = {}
        self._incarnation = secrets.token_bytes(NONCE_BYTES)
        self._peers: dict[PeerId, _Peer] = {}
        self._listeners: list[Listener] = []
        self._strangers: set[Link] = set()
        self._told: dict[tuple[str, str], None] = {}
        self._splices = Splices(limits, self._connection_to, self._accept_splice)
        self._contexts: TlsContexts | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking: asyncio.TimerHandle | None = None
        self._open = False

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
        for link in list(self._strangers):
            link.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self._peers.values():
            if peer.connection is not None:
                self._splices.lost(peer.connection)
                peer.connection.fail(PeerLost("this member is stopping"))
                peer.connection = None
            self._give_up(peer, "this member is stopping")

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
        listener = await self._carrier(address).listen(address, self._accept)
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
            views = tuple(memoryview(tensor) for tensor in tensors)
            self._loop.call_soon(self._deliver, peer, message, views)
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
            views = tuple(memoryview(tensor) for tensor in tensors)
            self._loop.call_soon(self._deliver, peer, message, views)
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
        before, connection = known.before, known.connection
        if connection is None:
            return before
        return replace(
            before,
            sent_bytes=before.sent_bytes + connection.link.sent_bytes,
            received_bytes=before.received_bytes + connection.link.received_bytes,
            missed_heartbeats=before.missed_heartbeats + connection.missed_heartbeats,
        )

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

    # -- links that this member makes ------------------------------------------------------------------------

    def _reach(self, peer: PeerId) -> _Peer:
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

    async def _dial(self, known: _Peer) -> None:
        """Make a link by the first way that works; whoever waits is told how it went."""
        try:
            link, greeted, middle = await self._first_way(known)
            known.dial = None
            self._establish(known, link, greeted, dialled=True, middle=middle)
        except ServingError as error:
            self._dial_failed(known, error.message)
        except Exception as error:
            log.exception("peer=%s could not be dialled", known.id[:8])
            self._dial_failed(known, f"{type(error).__name__}: {error}")

    async def _first_way(self, known: _Peer) -> tuple[Link, Greeted, PeerId | None]:
        """Try all addresses, then all members that splice; each starts when the one before fails or takes long."""
        ways: list[tuple[PeerId | None, Callable[[], Awaitable[Link]]]] = [
            (None, lambda address=address: self._dial_address(known.id, address))
            for address in known.addresses
        ]
        ways += [
            (middle, lambda middle=middle: self._dial_through(known.id, middle))
            for middle in known.through
            if middle not in (self.peer, known.id)
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
                    timeout=self.limits.stagger_s if ways else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    middle = running.pop(task)
                    try:
                        link = task.result()
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

    async def _dial_address(self, peer: PeerId, address: str) -> Link:
        try:
            carrier = self._carrier(address)
        except BadSetup as error:
            raise PeerLost(error.message) from None
        return await carrier.dial(address, peer=peer, timeout_s=self.limits.dial_timeout_s)

    async def _dial_through(self, peer: PeerId, middle: PeerId) -> Link:
        """A link to `peer` over a stream that `middle` carries; the middle one is dialled directly if need be."""
        way = self._known(middle)
        if way.connection is None and not way.addresses:
            raise PeerLost(f"through {middle[:8]}: no link to it")
        link = Link(f"splice://{middle}/{peer}")
        try:
            async with asyncio.timeout(self.limits.dial_timeout_s):
                stream = self._splices.open(await self._connected(middle), peer)
                try:
                    await stream.accepted
                    stream.start(self._tls().dial(link, peer))
                    await link.opened()
                except BaseException:
                    stream.abort()
                    raise
        except TimeoutError:
            raise PeerLost(f"through {middle[:8]}: no answer") from None
        except PeerLost as error:
            raise PeerLost(f"through {middle[:8]}: {error.message}") from None
        return link

    async def _greet(self, known: _Peer, link: Link) -> Greeted:
        try:
            async with asyncio.timeout(self.limits.handshake_timeout_s):
                greeted, secret = await greet(
                    link,
                    known.id,
                    identity=self._identity,
                    secret=self.secret,
                    incarnation=self._incarnation,
                    last_link=known.last_link,
                )
        except TimeoutError:
            link.abort()
            raise PeerLost(f"{link.name}: no answer to the handshake") from None
        except ServingError as error:
            link.abort()
            raise PeerLost(f"{link.name}: {error.message}") from None
        except asyncio.CancelledError:
            link.abort()
            raise
        if isinstance(self.secret, TicketSecret):
            self.secret = secret
        return greeted

    def _dial_failed(self, known: _Peer, reason: str) -> None:
        known.dial = None
        known.failures += 1
        known.failure = reason
        backoff_s = min(
            self.limits.backoff_s * 2 ** min(known.failures - 1, 30), self.limits.longest_backoff_s
        )
        known.retry_s = self._loop.time() + backoff_s * self._spread(known)
        level = logging.INFO if known.kept and known.failures == 1 else logging.DEBUG
        log.log(level, "peer=%s cannot be reached: %s", known.id[:8], reason)
        self._give_up(known, f"peer {known.id[:8]} cannot be reached: {reason}")
        self._tidy(known)

    def _spread(self, known: _Peer) -> float:
        """Between 0.75 and 1.25, so that not all members dial a peer at once that comes back; no two runs differ."""
        drawn = hashlib.sha256(f"{self.peer}{known.id}{known.failures}".encode()).digest()
        return 0.75 + drawn[0] / 510

    # -- links that others make ------------------------------------------------------------------------------

    def _accept(self, link: Link) -> None:
        host = _place(link)
        crowd = sum(_place(other) == host for other in self._strangers)
        if (
            not self._open
            or len(self._strangers) >= self.limits.max_strangers
            or crowd >= self.limits.max_strangers_per_host
        ):
            self._refuse(link, "too many links that have not proved themselves")
            return
        self._strangers.add(link)
        self._spawn(self._admit(link, None))

    def _accept_splice(self, claimed: PeerId, middle: PeerId, stream: SpliceTransport) -> None:
        link = Link(f"splice://{middle}/{claimed}")
        self._strangers.add(link)
        self._spawn(self._admit(link, middle))
        stream.start(self._tls().accept(link))

    async def _admit(self, link: Link, middle: PeerId | None) -> None:
        """Hear a stranger out; what fails is logged once for each place and reason, and answered by silence."""
        try:
            async with asyncio.timeout(self.limits.handshake_timeout_s):
                await link.opened()
                heard = await hear(
                    link, identity=self._identity, secret=self.secret, unix_now_s=self._unix_now()
                )
                known = self._known(heard.hello.peer)
                await self._decide(known, heard)
                assert isinstance(self.secret, SwarmSecret), "a ticket's holder hears nobody out"
                greeted = welcome(
                    link,
                    heard,
                    identity=self._identity,
                    secret=self.secret,
                    incarnation=self._incarnation,
                )
            self._establish(known, link, greeted, dialled=False, middle=middle)
        except TimeoutError:
            self._refuse(link, "it did not prove itself in time")
        except LinkClosed as error:
            log.debug("a link from %s: %s", link.name, error.message)
            link.abort()
        except ServingError as error:
            self._refuse(link, error.message)
        except Exception:
            log.exception("a link from %s could not be heard out", link.name)
            link.abort()
        finally:
            self._strangers.discard(link)

    async def _decide(self, known: _Peer, heard: Heard) -> None:
        """Whether this link is to be the one to its peer.

        An own dial under way stands if this identity is the smaller one, unless it fails. A link that exists is
        replaced by one of a new process of the peer, or of one that knew the old link and dials even so: the link is
        dead, and this end has not noticed yet. Otherwise two dials have crossed, and the first stands.

        Raises:
            PeerLost: no.
        """
        if known.id == self.peer:
            raise PeerLost("it has this member's own identity")
        if known.banned_until_s > self._loop.time():
            raise PeerLost(f"peer {known.id[:8]} was cut off")
        if known.dial is not None and self.peer < known.id:
            await asyncio.wait([known.dial])
        connection = known.connection
        if connection is None:
            return
        if heard.hello.incarnation != connection.greeted.incarnation:
            self._lose(known, connection, "it has restarted")
        elif not connection.dialled or heard.hello.last_link == connection.greeted.link_id:
            self._lose(known, connection, "it has lost the link")
        else:
            raise LinkClosed("there is a link already")

    # -- live links ------------------------------------------------------------------------------------------

    def _establish(
        self, known: _Peer, link: Link, greeted: Greeted, *, dialled: bool, middle: PeerId | None
    ) -> None:
        """From now on this is the link to its peer.

        Raises:
            PeerLost: it has ended already.
        """
        if not self._open:
            link.abort()
            raise LinkClosed("this member is stopping")
        if known.dial is not None:
            known.dial.cancel()
            known.dial = None
        connection = Connection(
            link,
            greeted,
            dialled=dialled,
            middle=middle,
            queue=known.queue,
            limits=self.limits,
            estimate=known.estimate,
        )
        known.connection, known.last_link = connection, greeted.link_id
        known.failures, known.retry_s = 0, 0.0
        log.info("peer=%s linked by %s", known.id[:8], link.name)
        for waiter in known.waiters:
            if not waiter.done():
                waiter.set_result(connection)
        known.waiters.clear()
        self._spawn(self._serve(known, connection))
        self.on_linked(known.id)

    async def _serve(self, known: _Peer, connection: Connection) -> None:
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

    def _lose(self, known: _Peer, connection: Connection, reason: str) -> None:
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

    def _cut_off(self, known: _Peer, reason: str) -> None:
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

    @property
    def _tick_s(self) -> float:
        return self.limits.heartbeat_s / TICKS_PER_HEARTBEAT

    # -- small things ----------------------------------------------------------------------------------------

    def _carrier(self, address: str) -> Carrier:
        scheme = address.partition("://")[0]
        carrier = self._carriers.get(scheme)
        if carrier is None:
            known = ", ".join(sorted(self._carriers))
            raise BadSetup(f"{address!r} is of no scheme known here; known: {known}")
        return carrier

    def _tls(self) -> TlsContexts:
        if self._contexts is None:
            self._contexts = TlsContexts(self._identity, self.secret.door)
        return self._contexts

    def _known(self, peer: PeerId) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            known = self._peers[peer] = _Peer(peer)
        return known

    def _tidy(self, known: _Peer) -> None:
        """Forget a peer that nothing is known of and nobody waits for."""
        live = known.connection or known.dial or known.waiters or known.queue or known.kept
        wanted = known.addresses or known.through or known.banned_until_s > self._loop.time()
        if not live and not wanted:
            self._peers.pop(known.id, None)

    def _connection_to(self, peer: PeerId) -> Connection | None:
        known = self._peers.get(peer)
        return None if known is None else known.connection

    def _give_up(self, known: _Peer, reason: str) -> None:
        """There will be no link for now: tell all who wait for it."""
        while known.queue:
            known.queue.popleft().fail(PeerLost(reason))
        while known.waiters:
            waiter = known.waiters.pop(0)
            if not waiter.done():
                waiter.set_exception(PeerLost(reason))

    def _refuse(self, link: Link, reason: str) -> None:
        """Close a stranger's link without a word; logged once for each place and reason."""
        link.abort()
        place = _place(link)
        if (place, reason) not in self._told:
            if len(self._told) >= _MAX_TOLD:
                del self._told[next(iter(self._told))]
            self._told[place, reason] = None
            log.warning("refused a link from %s: %s", place, reason)

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _place(link: Link) -> str:
    """Where a link comes from, without its port: one that is refused comes back from another."""
    name, _, port = link.name.rpartition(":")
    return name if port.isdigit() else link.name
