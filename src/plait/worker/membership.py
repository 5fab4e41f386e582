"""Who is in the swarm: signed records that spread by gossip and expire.

Every member signs a record of itself and issues it anew every few seconds; nobody can change it, and it holds until it
expires or a newer one comes. Three things spread records, none of which needs a list of all members:

- what is new is passed on at once, by everybody once, to a few linked members drawn at random (rumour mongering);
- every few seconds, and on every new link, two members compare digests and send what the other lacks (anti-entropy:
  Demers et al. 1987, "Epidemic algorithms for replicated database maintenance", sections 1.3 and 1.4);
- a member stays linked to a few others drawn at random and to those it was introduced to, so that the links form one
  graph. It also tries, now and then, members whose records have expired: after a partition heals somebody dials first.

What a record says is its peer's claim; that its peer says so is proven. Wall clocks decide what has expired, so a clock
that is off by more than `clock_skew_s` is refused and named in the log.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from plait.cluster import PeerRecord
from plait.errors import BadFrame, PeerLost
from plait.ids import PeerId
from plait.transport import Identity, Network, TicketPeer, verified
from plait.wire import (
    MAX_DIGEST,
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    Digest,
    Gossip,
    Message,
    RecordVersion,
    SignedRecord,
)

log = logging.getLogger(__name__)

MAX_ANNOUNCED_RTTS = 64
"""Of the links that a member has; a record is passed on by everybody, so it stays small."""
MAX_THROUGH = 3
SEND_TIMEOUT_S = 10.0
FAREWELL_TIMEOUT_S = 1.0
_FILLED_IN_BYTES = 6 << 10
"""What round trips, carriers and times add to a record, at most."""
_MAX_GOSSIP_BYTES = 512 << 10
_SIGNED = b"plait record\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipLimits:
    """How often, to how many, for how long.

    A record is issued every `announce_s` and holds for `life_s`; one that would hold longer than `longest_life_s` is
    refused. What is new is passed on to `fanout` members, together with what else comes within `gather_s`; digests are
    compared every `digest_s`. `neighbours` links are kept. Members that are gone are remembered for the next attempt
    every `retry_gone_s`, at most `max_gone` of them.
    """

    announce_s: float = 15.0
    life_s: float = 60.0
    longest_life_s: float = 600.0
    clock_skew_s: float = 10.0
    gather_s: float = 0.05
    fanout: int = 4
    digest_s: float = 5.0
    neighbours: int = 4
    tend_s: float = 1.0
    retry_gone_s: float = 5.0
    max_members: int = MAX_DIGEST
    max_gone: int = 256


DEFAULT_LIMITS = MembershipLimits()


@dataclass(frozen=True, slots=True)
class _Known:
    record: PeerRecord
    signed: SignedRecord


class Membership:
    """The records of a swarm, as they reach one member; enter it to take part, leave it to say that this one is gone.

    `on_change` is called with each peer whose record came, changed or expired. `introducers` are the members of a
    ticket: links to them are kept. Sets the network's routes for its messages and its `on_linked`.
    """

    def __init__(
        self,
        network: Network,
        identity: Identity,
        *,
        rng: np.random.Generator,
        introducers: Sequence[TicketPeer] = (),
        limits: MembershipLimits = DEFAULT_LIMITS,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self.on_change: Callable[[PeerId], None] = _ignore
        self._network = network
        self._identity = identity
        self._rng = rng
        self._introducers = tuple(introducers)
        self._limits = limits
        self._unix_now = unix_now
        self._own: PeerRecord | None = None
        self._sequence = 0
        self._known: dict[PeerId, _Known] = {}
        # The newest sequence of a peer whose record has expired, until no older one can hold any more.
        self._ended: dict[PeerId, tuple[int, float]] = {}
        self._gone: dict[PeerId, PeerRecord] = {}
        self._kept: set[PeerId] = set()
        self._fresh: dict[PeerId, PeerId] = {}  # a record to be passed on, and who sent it
        self._gathering: asyncio.TimerHandle | None = None
        self._sending: set[PeerId] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: set[PeerId] = set()
        network.route((Gossip,), self._on_gossip)
        network.route((Digest,), self._on_digest)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._network.on_linked = self._on_linked
        for introducer in self._introducers:
            self._network.learn(introducer.peer, introducer.addresses, introducer.through)
            self._network.keep(introducer.peer)
        self._spawn(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._own is not None:
            self._issue(replace(self._own, state="offline"))
            farewell = Gossip((self._known[self._identity.peer].signed,))
            linked = sorted(self._network.connected())
            await asyncio.gather(*(self._send(peer, farewell, FAREWELL_TIMEOUT_S) for peer in linked))
        if self._gathering is not None:
            self._gathering.cancel()

    def announce(self, record: PeerRecord) -> None:
        """Say this of this member from now on.

        `sequence`, `issued_unix_s`, `expires_unix_s`, `rtts_s` and `through` are filled in, now and at every
        repetition: the round trips of the links and, for a member without an address, linked members that have one.

        Raises:
            ValueError: the record is another peer's, or larger than others accept.
        """
        if record.peer != self._identity.peer:
            raise ValueError(f"a record of {record.peer[:8]}, announced by {self._identity.peer[:8]}")
        size_bytes = len(msgspec.msgpack.encode(record))
        if size_bytes > MAX_RECORD_BYTES - _FILLED_IN_BYTES:
            raise ValueError(
                f"a record of {size_bytes} bytes; others accept {MAX_RECORD_BYTES - _FILLED_IN_BYTES}"
            )
        self._own = record
        self._issue(record)

    def records(self) -> tuple[PeerRecord, ...]:
        """All records that hold, ordered by peer; the own one is among them."""
        now_s = self._unix_now()
        return tuple(
            known.record for _, known in sorted(self._known.items()) if known.record.expires_unix_s > now_s
        )

    # -- issuing ---------------------------------------------------------------------------------------------

    def _issue(self, record: PeerRecord) -> None:
        now_s = self._unix_now()
        # Above every earlier one, even of a process before this one, as long as the clock is not set back.
        self._sequence = max(self._sequence + 1, int(now_s * 1000))
        record = replace(
            record,
            sequence=self._sequence,
            issued_unix_s=now_s,
            expires_unix_s=now_s + self._limits.life_s,
            rtts_s=self._rtts_s(),
            through=() if record.is_listening else self._through(),
        )
        body = msgspec.msgpack.encode(record)
        signed = SignedRecord(body, self._identity.sign(_SIGNED + body))
        self._known[record.peer] = _Known(record, signed)
        self._pass_on(record.peer, record.peer)
        self.on_change(record.peer)

    def _rtts_s(self) -> dict[PeerId, float]:
        measured = {
            peer: estimate.rtt_s
            for peer in self._network.connected()
            if (estimate := self._network.estimate(peer)) is not None and estimate.rtt_s
        }
        nearest = sorted(measured, key=lambda peer: (measured[peer], peer))[:MAX_ANNOUNCED_RTTS]
        return {peer: measured[peer] for peer in sorted(nearest)}

    def _through(self) -> tuple[PeerId, ...]:
        """Linked members that others can dial; the links that are kept come first."""
        reachable = [
            peer
            for peer in sorted(self._network.connected_directly())
            if (peer in self._known and self._known[peer].record.is_listening)
            or any(introducer.peer == peer and introducer.addresses for introducer in self._introducers)
        ]
        return tuple(sorted(reachable, key=lambda peer: (peer not in self._kept, peer))[:MAX_THROUGH])

    def _update_through(self) -> None:
        """A member that does not listen lives by its links: say so when they change."""
        own = self._own
        if (
            own is not None
            and not own.is_listening
            and self._known[own.peer].record.through != self._through()
        ):
            self._issue(own)

    # -- receiving -------------------------------------------------------------------------------------------

    def _on_gossip(self, sender: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        assert isinstance(message, Gossip)
        for signed in message.records:
            self._take(sender, signed)

    def _take(self, sender: PeerId, signed: SignedRecord) -> None:
        """Keep a record if it is news.

        Raises:
            BadFrame: no member would pass this on: it is no record, or its peer did not sign it.
        """
        try:
            record = msgspec.msgpack.decode(signed.body, type=PeerRecord)
        except msgspec.DecodeError as error:
            raise BadFrame(f"it passes on a record that is none: {error}") from None
        if not self._is_news(sender, record):
            return
        if not verified(record.peer, signed.signature, _SIGNED + signed.body):
            raise BadFrame(f"it passes on a record of {record.peer[:8]} that this peer did not sign")
        if record.peer == self._identity.peer:
            # An earlier process of this member, whose clock was ahead: be newer.
            self._sequence = record.sequence
            if self._own is not None:
                self._issue(self._own)
            return
        if record.peer not in self._known and len(self._known) >= self._limits.max_members:
            return
        self._known[record.peer] = _Known(record, signed)
        self._ended.pop(record.peer, None)
        self._gone.pop(record.peer, None)
        self._network.learn(record.peer, record.addresses, record.through)
        self._pass_on(record.peer, sender)
        self.on_change(record.peer)

    def _is_news(self, sender: PeerId, record: PeerRecord) -> bool:
        now_s = self._unix_now()
        skewed = record.issued_unix_s > now_s + self._limits.clock_skew_s
        expired = record.expires_unix_s <= now_s
        if (skewed or expired) and sender == record.peer and sender not in self._told:
            self._told.add(sender)
            log.warning(
                "peer=%s (%r): its clock and this one's differ by %.0f s, so its records are of no use; set them right",
                sender[:8],
                record.name,
                abs(now_s - record.issued_unix_s),
            )
        if record.expires_unix_s - record.issued_unix_s > self._limits.longest_life_s:
            return False
        known_sequence = self._ended.get(record.peer, (-1, 0.0))[0]
        if record.peer == self._identity.peer:
            known_sequence = self._sequence
        elif record.peer in self._known:
            known_sequence = self._known[record.peer].record.sequence
        return not skewed and not expired and record.sequence > known_sequence

    def _on_digest(self, sender: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        assert isinstance(message, Digest)
        theirs = {version.peer: version.sequence for version in message.versions}
        ours = self._versions()
        newer = [
            self._known[peer].signed for peer, sequence in ours.items() if sequence > theirs.get(peer, -1)
        ]
        for batch in _batches(newer):
            self._spawn(self._send(sender, Gossip(batch)))
        if message.answer and any(sequence > ours.get(peer, -1) for peer, sequence in theirs.items()):
            self._spawn(self._send(sender, self._digest(answer=False)))

    def _versions(self) -> dict[PeerId, int]:
        now_s = self._unix_now()
        return {
            peer: known.record.sequence
            for peer, known in sorted(self._known.items())
            if known.record.expires_unix_s > now_s
        }

    def _digest(self, *, answer: bool) -> Digest:
        versions = tuple(RecordVersion(peer, sequence) for peer, sequence in self._versions().items())
        return Digest(versions[:MAX_DIGEST], answer)

    # -- spreading -------------------------------------------------------------------------------------------

    def _on_linked(self, peer: PeerId) -> None:
        self._update_through()
        self._spawn(self._send(peer, self._digest(answer=True)))

    def _pass_on(self, peer: PeerId, sender: PeerId) -> None:
        self._fresh[peer] = sender
        if self._gathering is None:
            self._gathering = self._loop.call_later(self._limits.gather_s, self._spread)

    def _spread(self) -> None:
        """Send what is new to a few members, but not back to whom it came from."""
        self._gathering = None
        fresh, self._fresh = self._fresh, {}
        for peer in self._drawn(sorted(self._network.connected()), self._limits.fanout):
            records = [
                self._known[subject].signed
                for subject, sender in fresh.items()
                if subject in self._known and peer not in (subject, sender)
            ]
            # To one that is still taking the last ones, the next digest brings what it lacks.
            if records and peer not in self._sending:
                self._sending.add(peer)
                self._spawn(self._send_all(peer, records))

    async def _send_all(self, peer: PeerId, records: Sequence[SignedRecord]) -> None:
        try:
            for batch in _batches(records):
                await self._send(peer, Gossip(batch))
        finally:
            self._sending.discard(peer)

    async def _send(self, peer: PeerId, message: Gossip | Digest, timeout_s: float = SEND_TIMEOUT_S) -> None:
        try:
            await self._network.send(peer, message, timeout_s=timeout_s)
        except (PeerLost, BadFrame) as error:
            log.debug("peer=%s did not get %s: %s", peer[:8], type(message).__name__, error.message)

    def _drawn(self, peers: Sequence[PeerId], count: int) -> list[PeerId]:
        order = self._rng.permutation(len(peers))[:count]
        return [peers[int(index)] for index in order]

    # -- tending ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        limits = self._limits
        announced_s = compared_s = retried_s = self._loop.time()
        while True:
            await asyncio.sleep(limits.tend_s)
            now_s = self._loop.time()
            self._expire()
            if now_s - announced_s >= limits.announce_s:
                announced_s = now_s
                if self._own is not None:
                    self._issue(self._own)
            if now_s - compared_s >= limits.digest_s:
                compared_s = now_s
                for peer in self._drawn(sorted(self._network.connected()), 1):
                    self._spawn(self._send(peer, self._digest(answer=True)))
            self._keep_neighbours()
            self._update_through()
            if now_s - retried_s >= limits.retry_gone_s:
                retried_s = now_s
                for peer in self._drawn(sorted(self._gone), 1):
                    self._spawn(self._retry(peer))

    def _expire(self) -> None:
        now_s = self._unix_now()
        for peer, known in list(self._known.items()):
            if known.record.expires_unix_s <= now_s and peer != self._identity.peer:
                del self._known[peer]
                until_s = known.record.issued_unix_s + self._limits.longest_life_s
                self._ended[peer] = (known.record.sequence, until_s)
                if known.record.state != "offline" and known.record.is_listening:
                    if len(self._gone) >= self._limits.max_gone:
                        self._drop_gone(next(iter(self._gone)))
                    self._gone[peer] = known.record
                else:
                    self._drop_gone(peer)
                self.on_change(peer)
        self._ended = {peer: ended for peer, ended in self._ended.items() if ended[1] > now_s}

    def _drop_gone(self, peer: PeerId) -> None:
        self._gone.pop(peer, None)
        if all(introducer.peer != peer for introducer in self._introducers):
            self._kept.discard(peer)
            self._network.forget(peer)

    def _keep_neighbours(self) -> None:
        """Stay linked to enough members that can be dialled."""
        present = {
            peer
            for peer, known in self._known.items()
            if known.record.is_listening and known.record.state != "offline" and peer != self._identity.peer
        }
        for peer in self._kept - present:
            self._network.keep(peer, False)
        self._kept &= present
        linked = self._network.connected()
        missing = self._limits.neighbours - len(present & linked)
        if len(self._kept - linked) >= self._limits.neighbours:
            return  # as many are being dialled
        candidates = sorted(present - linked - self._kept)
        for peer in self._drawn(candidates, max(0, missing)):
            self._kept.add(peer)
            self._network.keep(peer)

    async def _retry(self, peer: PeerId) -> None:
        try:
            await self._network.connect(peer)
        except PeerLost as error:
            log.debug("peer=%s is still gone: %s", peer[:8], error.message)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ignore(peer: PeerId) -> None:
    pass


def _batches(records: Sequence[SignedRecord]) -> list[tuple[SignedRecord, ...]]:
    """As few messages as the bounds allow."""
    batches: list[tuple[SignedRecord, ...]] = []
    batch: list[SignedRecord] = []
    size_bytes = 0
    for record in records:
        if len(batch) == MAX_RECORDS or size_bytes + len(record.body) > _MAX_GOSSIP_BYTES:
            batches.append(tuple(batch))
            batch, size_bytes = [], 0
        batch.append(record)
        size_bytes += len(record.body)
    if batch:
        batches.append(tuple(batch))
    return batches
