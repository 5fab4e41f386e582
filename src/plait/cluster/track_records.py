"""Which peers turned out slower than they say, as somebody saw who waited for their chains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from plait.cluster.peer_record import PeerRates, PeerRecord
from plait.ids import PeerId

TOLERANCE = 3.0
"""Expected times are off by less for honest reasons: sessions that came since, a machine that does other things."""
FORGET_S = 600.0
"""A factor's logarithm halves in this time, so that a machine which has become faster is tried again."""
MAX_FACTOR = 1e4


@dataclass(frozen=True, slots=True)
class TrackRecord:
    """`factor`: how much slower than announced, as of `seen_s`; 1 is as announced."""

    factor: float
    seen_s: float

    def factor_at(self, now_s: float) -> float:
        return self.factor ** (0.5 ** ((now_s - self.seen_s) / FORGET_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackRecords:
    """What chains took, beside what was expected of them; every change is a new value."""

    by_peer: Mapping[PeerId, TrackRecord] = field(default_factory=dict[PeerId, TrackRecord])

    def after_chain(
        self, peers: Sequence[PeerId], expected_s: float, measured_s: float, now_s: float
    ) -> "TrackRecords":
        """Judge the peers of a chain that took `measured_s` for what should have taken `expected_s`.

        `expected_s` counts the factors known so far. Who has kept its word within `FORGET_S` is not blamed while
        there is somebody in the chain who has not.
        """
        ratio = measured_s / expected_s
        known = {peer: self.by_peer.get(peer) for peer in peers}
        if ratio > TOLERANCE:
            unproven = [peer for peer, record in known.items() if not _proven(record, now_s)]
            judged = {peer: self._factor(peer, now_s) * ratio for peer in unproven or peers}
        else:
            # An innocent one was blamed together with another if a chain is far faster than expected.
            better = ratio if ratio < 1 / TOLERANCE else 1.0
            judged = {peer: self._factor(peer, now_s) * better for peer in peers}
        changed = {
            peer: TrackRecord(min(max(factor, 1.0), MAX_FACTOR), now_s) for peer, factor in judged.items()
        }
        return TrackRecords(by_peer={**self.by_peer, **changed})

    def corrected(self, record: PeerRecord, now_s: float) -> PeerRecord:
        """A record with the rates that the peer seems to have, in steps of 2, so that it seldom changes."""
        factor = 2.0 ** round(math.log2(self._factor(record.peer, now_s)))
        if factor == 1.0:
            return record
        names = PeerRates.__slots__
        rates = PeerRates(**{name: getattr(record.rates, name) / factor for name in names})
        return replace(record, rates=rates)

    def only(self, peers: frozenset[PeerId]) -> "TrackRecords":
        """Forget all others."""
        return TrackRecords(by_peer={peer: known for peer, known in self.by_peer.items() if peer in peers})

    def _factor(self, peer: PeerId, now_s: float) -> float:
        known = self.by_peer.get(peer)
        return 1.0 if known is None else known.factor_at(now_s)


def _proven(record: TrackRecord | None, now_s: float) -> bool:
    return record is not None and record.factor == 1.0 and now_s - record.seen_s < FORGET_S
