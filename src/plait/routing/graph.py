"""The swarm as numbers: servers, the boundaries where one can hand over to the next, and the links between them.

A chain under PETALS' exit rule may enter a server anywhere in its span and leaves it at the span's end (or at the
end of the range). The block index only grows, so the graph has no cycle, and one sweep over the boundaries in order
visits every edge once: `Stage` holds what meets at one boundary. That replaces a heap and is exact.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.cluster import PeerRecord, SwarmView, format_blocks
from plait.errors import NoRoute
from plait.ids import PeerId
from plait.routing.chain import Chain, Hop

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Ints = np.ndarray[tuple[int, ...], np.dtype[np.intp]]

UNKNOWN_DELAY_S = 0.15  # PETALS: one way, where nobody has pinged
MAX_DELAY_S = 5.0  # PETALS: also where the ping failed


@dataclass(frozen=True, slots=True)
class Stage:
    """One boundary between blocks, where `arriving` servers end and `holding` servers can take over.

    `delay_s`: one way, [arriving, holding]. `used_blocks`: what each of `holding` runs from here to its end.
    """

    boundary: int
    arriving: slice
    holding: Ints
    delay_s: Floats
    used_blocks: Floats


@dataclass(frozen=True, slots=True)
class ChainGraph:
    """What a choice of chain for `blocks` is made from; servers are numbered by the end of their span, then by peer.

    `start`, `end`: spans, clipped to `blocks`; `span_blocks`: lengths of whole spans. `entry_delay_s`,
    `exit_delay_s`: one way from and to whoever drives the chain (the client; in a repair, the hops before and
    after). `unreachable`: the client's last ping failed. `entering`: servers that hold the first block, with
    `entering_used_blocks` to their ends. `leaving`: servers that end where the range ends. `either_way`: how delays
    were looked up.
    """

    blocks: range
    records: tuple[PeerRecord, ...]
    start: Ints
    end: Ints
    span_blocks: Ints
    entry_delay_s: Floats
    exit_delay_s: Floats
    unreachable: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    entering: Ints
    entering_used_blocks: Floats
    leaving: slice
    stages: tuple[Stage, ...]
    closing_delay_s: Floats

    @property
    def servers(self) -> int:
        """How many there are."""
        return len(self.records)

    def chain(self, path: tuple[int, ...]) -> Chain:
        """The chain that visits these servers in order, each to its span's end."""
        hops: list[Hop] = []
        boundary = self.blocks.start
        for server in path:
            assert self.start[server] <= boundary < self.end[server], "a path must be a chain"
            hops.append(Hop(peer=self.records[server].peer, span=range(boundary, int(self.end[server]))))
            boundary = int(self.end[server])
        assert boundary == self.blocks.stop, "a path must reach the last block"
        return tuple(hops)

    def holders(self, block: int) -> Ints:
        """Servers that hold a block, by number."""
        return np.flatnonzero((self.start <= block) & (block < self.end))


def chain_graph(
    view: SwarmView,
    blocks: range,
    *,
    without: frozenset[PeerId] = frozenset(),
    after: PeerId | None = None,
    before: PeerId | None = None,
    either_way: bool = False,
) -> ChainGraph:
    """Number the servers that can serve `blocks` and meet them at their boundaries.

    `without`: peers left out. `after`, `before`: the hops between which a gap is repaired (None: the client).
    `either_way`: a round trip that the sender does not know is taken from the receiver's record (PETALS does not).

    Raises:
        NoRoute: some block has no holder; the error names them.
    """
    servers = _usable_servers(view, blocks, without)
    servers.sort(key=lambda server: (server[2], server[0].peer, server[1]))
    records = tuple(server[0] for server in servers)
    start = np.array([server[1] for server in servers], dtype=np.intp)
    end = np.array([server[2] for server in servers], dtype=np.intp)
    delay_s = delays_s(records, either_way=either_way)
    entry_s, exit_s = _outside_delays_s(view, records, after, before, either_way)
    entering = np.flatnonzero(start <= blocks.start)
    stages: list[Stage] = []
    bounds = [*np.flatnonzero(np.diff(end, prepend=-1)).tolist(), len(servers)]
    leaving = slice(len(servers), len(servers))
    for low, high in itertools.pairwise(bounds):
        boundary = int(end[low])
        if boundary == blocks.stop:
            leaving = slice(low, high)
            break
        # Everyone behind `high` ends later, so it holds the boundary if it has started.
        holding = np.flatnonzero(start[high:] <= boundary) + high
        stages.append(
            Stage(
                boundary=boundary,
                arriving=slice(low, high),
                holding=holding,
                delay_s=delay_s[low:high, holding],
                used_blocks=(end[holding] - boundary).astype(np.float64),
            )
        )
    return ChainGraph(
        blocks=blocks,
        records=records,
        start=start,
        end=end,
        span_blocks=np.array([len(record.span) for record in records], dtype=np.intp),
        entry_delay_s=entry_s,
        exit_delay_s=exit_s,
        unreachable=np.array([math.isinf(view.rtts_s.get(record.peer, 0.0)) for record in records]),
        entering=entering,
        entering_used_blocks=(end[entering] - blocks.start).astype(np.float64),
        leaving=leaving,
        stages=tuple(stages),
        closing_delay_s=delay_s[leaving][:, entering],
    )


def one_way_delay_s(rtts_s: Floats) -> Floats:
    """PETALS' delay of a hop from its round trip: half of it, at most 5 s; 0.15 s where unknown (NaN)."""
    return np.where(np.isnan(rtts_s), UNKNOWN_DELAY_S, np.minimum(rtts_s / 2, MAX_DELAY_S))


def _usable_servers(
    view: SwarmView, blocks: range, without: frozenset[PeerId]
) -> list[tuple[PeerRecord, int, int]]:
    """(record, first, end) within `blocks`.

    A ban is ignored where it would leave nobody (PETALS); such a peer serves from the first such block of its span
    to the last, as one span, because a session crosses a peer once.
    """
    assert len(blocks) > 0 and blocks.step == 1, "a range of blocks in order"
    online = [
        (record, max(record.first_block, blocks.start), min(record.end_block, blocks.stop))
        for record in view.records.values()
        if record.state == "online"
        and record.peer not in without
        and record.first_block < blocks.stop
        and blocks.start < record.end_block
    ]
    covered = np.zeros(len(blocks), dtype=bool)
    for record, first, end in online:
        if record.peer not in view.banned:
            covered[first - blocks.start : end - blocks.start] = True
    usable = [server for server in online if server[0].peer not in view.banned]
    gaps = ~covered
    for record, first, end in online:
        if record.peer in view.banned:
            inside = np.flatnonzero(gaps[first - blocks.start : end - blocks.start]) + first
            if len(inside) > 0:
                usable.append((record, int(inside[0]), int(inside[-1]) + 1))
                covered[inside - blocks.start] = True
    if not covered.all():
        missing = tuple(int(block) for block in np.flatnonzero(~covered) + blocks.start)
        raise NoRoute(
            f"no online peer serves blocks {format_blocks(missing)} ({len(view.records)} peers known"
            + (f", {len(without)} left out" if without else "")
            + "); start a worker for them, or retry once one has joined",
            missing_blocks=missing,
        )
    return usable


def delays_s(records: Sequence[PeerRecord], *, either_way: bool) -> Floats:
    """One way between any two of these peers, [senders, receivers]; `either_way` as in `chain_graph`."""
    numbers = {record.peer: number for number, record in enumerate(records)}
    counts = [len(record.rtts_s) for record in records]
    # A large swarm has tens of thousands of round trips: no loop of Python's own over them.
    pinged = itertools.chain.from_iterable(record.rtts_s for record in records)
    receivers = np.fromiter(map(numbers.get, pinged, itertools.repeat(-1)), dtype=np.intp, count=sum(counts))
    values = itertools.chain.from_iterable(record.rtts_s.values() for record in records)
    known = np.fromiter(values, dtype=np.float64, count=sum(counts))
    senders = np.repeat(np.arange(len(records)), counts)
    here = receivers >= 0
    rtts_s = np.full((len(records), len(records)), np.nan)
    rtts_s[senders[here], receivers[here]] = known[here]
    if either_way:
        rtts_s = np.where(np.isnan(rtts_s), rtts_s.T, rtts_s)
    return one_way_delay_s(rtts_s)


def _outside_delays_s(
    view: SwarmView,
    records: tuple[PeerRecord, ...],
    after: PeerId | None,
    before: PeerId | None,
    either_way: bool,
) -> tuple[Floats, Floats]:
    """From `after` to each server and from each server to `before`; None is the client, whose round trips the view
    has."""

    def known_s(teller: PeerId | None, other: PeerId | None) -> float:
        if other is None:
            return math.nan
        if teller is None:
            return view.rtts_s.get(other, math.nan)
        return view.records[teller].rtts_s.get(other, math.nan) if teller in view.records else math.nan

    def rtt_s(sender: PeerId | None, receiver: PeerId | None) -> float:
        told_s = known_s(sender, receiver)
        return known_s(receiver, sender) if math.isnan(told_s) and either_way else told_s

    entry_s = [rtt_s(after, record.peer) for record in records]
    # The client's round trip to a server counts in both directions: no server's record holds one to a client.
    exit_s = [rtt_s(record.peer, before) if before else known_s(None, record.peer) for record in records]
    return one_way_delay_s(np.array(entry_s)), one_way_delay_s(np.array(exit_s))
