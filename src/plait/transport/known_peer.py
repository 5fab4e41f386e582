"""What a member knows of the way to another one, linked or not."""

import asyncio
import hashlib
from collections import deque
from dataclasses import dataclass, field

from plait.errors import PeerLost
from plait.ids import PeerId
from plait.transport.connection import Connection, Outgoing
from plait.transport.estimate import LinkEstimate
from plait.transport.handshake import NO_LINK
from plait.transport.limits import NetworkLimits
from plait.transport.traffic import NOTHING, LinkTraffic


@dataclass(slots=True)
class KnownPeer:
    """`queue` holds what waits to be sent to it, `waiters` who waits for a link; `dial` makes one.

    `failure` is why there is no link. After a dial that failed the next one waits until `retry_s`; a peer that was cut
    off is refused until `banned_until_s` (both of the event loop's clock). `before` is the traffic of links that have
    ended.
    """

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
    before: LinkTraffic = NOTHING

    def wanted(self, now_s: float) -> bool:
        """Something of this must be remembered."""
        live = self.connection or self.dial or self.waiters or self.queue or self.kept
        return bool(live or self.addresses or self.through) or self.banned_until_s > now_s

    def linked(self, connection: Connection) -> None:
        """There is a link; whoever waits for it has it."""
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        self.connection, self.last_link = connection, connection.greeted.link_id
        self.failures, self.retry_s = 0, 0.0
        while self.waiters:
            waiter = self.waiters.pop(0)
            if not waiter.done():
                waiter.set_result(connection)

    def dial_failed(self, reason: str, limits: NetworkLimits, *, own: PeerId, now_s: float) -> None:
        """There will be no link for now: wait longer for each failure, and tell all who wait for one."""
        self.dial = None
        self.failures += 1
        self.failure = reason
        backoff_s = min(limits.backoff_s * 2 ** min(self.failures - 1, 30), limits.longest_backoff_s)
        # Not all members dial at once a peer that comes back, and no two runs of a simulation differ.
        drawn = hashlib.sha256(f"{own}{self.id}{self.failures}".encode()).digest()[0]
        self.retry_s = now_s + backoff_s * (0.75 + drawn / 510)
        self.give_up(f"peer {self.id[:8]} cannot be reached: {reason}")

    def give_up(self, reason: str) -> None:
        """Tell all who wait for a link that there is none."""
        while self.queue:
            self.queue.popleft().fail(PeerLost(reason))
        while self.waiters:
            waiter = self.waiters.pop(0)
            if not waiter.done():
                waiter.set_exception(PeerLost(reason))
