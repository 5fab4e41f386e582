"""Peers that failed are avoided for a while: longer each time, forgotten after a success."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.ids import PeerId

FIRST_BAN_S = 15.0  # PETALS' released client: 15 s, doubled by each failure in a row
MAX_BAN_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ban:
    """`failures` in a row, the last of which bans the peer until `until_s` (on the clock of the caller)."""

    failures: int
    until_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bans:
    """Who failed how often; every change is a new value."""

    by_peer: Mapping[PeerId, Ban] = field(default_factory=dict[PeerId, Ban])

    def after_failure(self, peer: PeerId, now_s: float) -> "Bans":
        """Ban a peer for 15 s times 2^(failures in a row - 1), an hour at most."""
        failures = self.by_peer[peer].failures + 1 if peer in self.by_peer else 1
        ban_s = min(FIRST_BAN_S * 2.0 ** min(failures - 1, 30), MAX_BAN_S)
        return Bans(by_peer={**self.by_peer, peer: Ban(failures=failures, until_s=now_s + ban_s)})

    def after_success(self, peer: PeerId) -> "Bans":
        """Forget what a peer did."""
        if peer not in self.by_peer:
            return self
        return Bans(by_peer={other: ban for other, ban in self.by_peer.items() if other != peer})

    def lifted(self, peer: PeerId, now_s: float) -> "Bans":
        """Let a peer be tried again now; another failure still counts as one more in a row."""
        ban = self.by_peer.get(peer)
        if ban is None or ban.until_s <= now_s:
            return self
        return Bans(by_peer={**self.by_peer, peer: Ban(failures=ban.failures, until_s=now_s)})

    def banned(self, now_s: float) -> frozenset[PeerId]:
        """Those to be avoided now."""
        return frozenset(peer for peer, ban in self.by_peer.items() if now_s < ban.until_s)
