"""The swarm as one member sees it, kept ready for decisions: records, round trips from here, whom to avoid."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from plait.cluster import Bans, PeerRecord, SwarmView, TrackRecords
from plait.ids import PeerId
from plait.transport import Network

_REFRESH_S = 1.0
_RTT_CHANGE = 0.2
"""A round trip that differs by less leaves the view as it is, so that routes worked out for it still hold."""


class Lookout:
    """Makes the `SwarmView` of one model; `records` gives all records that hold now.

    A peer that was lost is left out, though its record goes on for a while, until there is a link to it again. One
    that turned out slower than it says has the rates that it seems to have. Times of bans are those of the running
    event loop.
    """

    def __init__(
        self,
        network: Network,
        records: Callable[[], Sequence[PeerRecord]],
        *,
        model: str,
        model_blocks: int,
        unix_now: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self.model_blocks = model_blocks
        self._network = network
        self._records = records
        self._unix_now = unix_now
        self._bans = Bans()
        self._track_records = TrackRecords()
        self._lost: dict[PeerId, int] = {}  # the sequence of its record then, or when it was last tried
        self._back: set[PeerId] = set()
        self._view: SwarmView | None = None
        self._stale = True
        self._seen_s = 0.0

    def changed(self) -> None:
        """Records have come, gone or changed."""
        self._stale = True

    def ban(self, peer: PeerId) -> None:
        """Avoid a peer that failed: for longer each time. While it is banned further failures are the same one."""
        now_s = asyncio.get_running_loop().time()
        if peer not in self._bans.banned(now_s):
            self._bans = self._bans.after_failure(peer, now_s)
            self._stale = True

    def trust(self, peer: PeerId) -> None:
        """A peer has done what it should."""
        bans = self._bans.after_success(peer)
        if bans is not self._bans:
            self._bans = bans
            self._stale = True

    def judge(self, peers: Sequence[PeerId], expected_s: float, measured_s: float) -> None:
        """A chain of these peers took so long for what should, by this view, have taken `expected_s`."""
        now_s = asyncio.get_running_loop().time()
        self._track_records = self._track_records.after_chain(peers, expected_s, measured_s, now_s)
        self._stale = True

    def lose(self, peer: PeerId) -> None:
        """There is no link to a peer any more, and none could be made."""
        if peer not in self._lost:
            self._lost[peer] = self._sequences().get(peer, -1)
            self._stale = True

    def take_back(self) -> frozenset[PeerId]:
        """Lost peers that there is a link to again, since the last call: they are in the view, and no longer banned."""
        self._find_lost()
        back, self._back = frozenset(self._back), set()
        return back

    def _find_lost(self) -> None:
        for peer in frozenset(self._lost) & self._network.connected() if self._lost else ():
            del self._lost[peer]
            self._back.add(peer)
            self._bans = self._bans.lifted(peer, asyncio.get_running_loop().time())
            self._stale = True

    def worth_trying(self) -> tuple[PeerId, ...]:
        """Lost peers that have said something since they were lost, or were last named here: they may be back."""
        if not self._lost:
            return ()
        sequences = self._sequences()
        newer = tuple(
            peer for peer, sequence in sorted(self._lost.items()) if sequences.get(peer, -1) > sequence
        )
        for peer in newer:
            self._lost[peer] = sequences[peer]
        return newer

    def view(self) -> SwarmView:
        """The swarm now; the same object, with the same version, while nothing has changed that matters."""
        now_s = asyncio.get_running_loop().time()
        self._find_lost()
        if self._view is not None and not self._stale and now_s - self._seen_s < _REFRESH_S:
            return self._view
        self._stale, self._seen_s = False, now_s
        records = [
            self._track_records.corrected(record, now_s)
            for record in self._records()
            if record.peer not in self._lost
        ]
        self._track_records = self._track_records.only(frozenset(record.peer for record in records))
        rtts_s = {
            record.peer: estimate.rtt_s
            for record in records
            if (estimate := self._network.estimate(record.peer)) is not None and estimate.rtt_s
        }
        old = self._view
        new = SwarmView.of(
            records,
            model=self.model,
            model_blocks=self.model_blocks,
            unix_now_s=self._unix_now(),
            rtts_s=rtts_s,
            banned=self._bans.banned(now_s),
            version=1 if old is None else old.version + 1,
        )
        if old is None or not _same(old, new):
            self._view = new
        assert self._view is not None
        return self._view

    def _sequences(self) -> dict[PeerId, int]:
        return {record.peer: record.sequence for record in self._records()}


def _same(old: SwarmView, new: SwarmView) -> bool:
    return old.records == new.records and old.banned == new.banned and _near(old.rtts_s, new.rtts_s)


def _near(old: Mapping[PeerId, float], new: Mapping[PeerId, float]) -> bool:
    return old.keys() == new.keys() and all(
        abs(rtt_s - old[peer]) <= _RTT_CHANGE * old[peer] for peer, rtt_s in new.items()
    )
