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
Booleans = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

UNKNOWN_DELAY_S = 0.15  # PETALS: one way, where nobody has pinged
MAX_DELAY_S = 5.0  # PETALS: also where the ping failed
EARLY_EXIT_MACHINES = 32

_Usable = tuple[PeerRecord, int, int]
"""A machine and what it can serve of the range: from block, to block."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One boundary between blocks, where `arriving` servers end and `holding` servers can take over.

    `delay_s`: one way, [arriving, holding]. `used_blocks`: what each of `holding` runs from here to its end.
    `barred`: who must not take over from whom, [arriving, holding] (None: everybody may).
    """

    boundary: int
    arriving: slice
    holding: Ints
    delay_s: Floats
    used_blocks: Floats
    barred: Booleans | None


@dataclass(frozen=True, slots=True)
class ChainGraph:
    """What a choice of chain for `blocks` is made from; servers are numbered by the end of their span, then by peer.

    `machine`: which servers are the same one (all are different without early exits). `start`, `end`: spans,
    clipped to `blocks`; `span_blocks`: lengths of whole spans. `entry_delay_s`, `exit_delay_s`: one way from and to
    whoever drives the chain (the client; in a repair, the hops before and after). `early`: it is left before its
    span (or the range) ends. `unreachable`: the client's last ping failed. `entering`: servers that hold the first
    block, with `entering_used_blocks` to their ends. `leaving`: servers that end where the range ends.
    `either_way`: how delays were looked up.
    """

    blocks: range
    records: tuple[PeerRecord, ...]
    machine: Ints
    start: Ints
    end: Ints
    span_blocks: Ints
    entry_delay_s: Floats
    exit_delay_s: Floats
    early: Booleans
    unreachable: Booleans
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
    early_exits: bool = False,
) -> ChainGraph:
    """Number the servers that can serve `blocks` and meet them at their boundaries.

    `without`: peers left out. `after`, `before`: the hops between which a gap is repaired (None: the client).
    `either_way`: a round trip that the sender does not know is taken from the receiver's record (PETALS does not).
    `early_exits`: a hop may also end where another machine's span begins, if that machine's ends later, or with it
    and is faster (PETALS does not). Each such end is a server of its own here, of which no path has two. Left out
    in swarms of more than 32 machines, for which it takes too long. Only the sweeps know it: random walks and
    operators do not.

    Raises:
        NoRoute: some block has no holder; the error names them.
    """
    machines = _usable_machines(view, blocks, without)
    early = early_exits and len(machines) <= EARLY_EXIT_MACHINES
    exits = [(end, number) for number, (_, _, end) in enumerate(machines)]
    if early:
        exits += [(end, number) for number in range(len(machines)) for end in _early_exits(machines, number)]
    exits.sort(key=lambda exit: (exit[0], machines[exit[1]][0].peer))
    machine = np.array([number for _, number in exits], dtype=np.intp)
    start = np.array([machines[number][1] for number in machine], dtype=np.intp)
    end = np.array([end for end, _ in exits], dtype=np.intp)
    records = [record for record, _, _ in machines]
    delay_s = delays_s(records, either_way=either_way)
    entry_s, exit_s = _outside_delays_s(view, records, after, before, either_way)
    order = _takeover_order(machines) if early else None
    entering = np.flatnonzero(start <= blocks.start)
    stages: list[Stage] = []
    bounds = [*np.flatnonzero(np.diff(end, prepend=-1)).tolist(), len(end)]
    leaving = slice(bounds[-2], bounds[-1])
    for low, high in itertools.pairwise(bounds[:-1]):
        boundary = int(end[low])
        # Everyone behind `high` ends later, so it holds the boundary if it has started.
        holding = np.flatnonzero(start[high:] <= boundary) + high
        here, there = machine[low:high, None], machine[holding]
        stages.append(
            Stage(
                boundary=boundary,
                arriving=slice(low, high),
                holding=holding,
                delay_s=delay_s[here, there],
                used_blocks=(end[holding] - boundary).astype(np.float64),
                barred=None if order is None else order[there] <= order[here],
            )
        )
    return ChainGraph(
        blocks=blocks,
        records=tuple(records[number] for _, number in exits),
        machine=machine,
        start=start,
        end=end,
        span_blocks=np.array([len(record.span) for record in records], dtype=np.intp)[machine],
        entry_delay_s=entry_s[machine],
        exit_delay_s=exit_s[machine],
        early=np.array([end < machines[number][2] for end, number in exits]),
        unreachable=np.array([math.isinf(view.rtts_s.get(record.peer, 0.0)) for record in records])[machine],
        entering=entering,
        entering_used_blocks=(end[entering] - blocks.start).astype(np.float64),
        leaving=leaving,
        stages=tuple(stages),
        closing_delay_s=delay_s[machine[leaving, None], machine[entering]],
    )


def _early_exits(machines: Sequence[_Usable], number: int) -> list[int]:
    """Where others that may take over from this machine begin inside its span."""
    order = _takeover_order(machines)
    _, start, end = machines[number]
    begins = {other[1] for place, other in enumerate(machines) if order[place] > order[number]}
    return sorted(begin for begin in begins if start < begin < end)


def _takeover_order(machines: Sequence[_Usable]) -> Ints:
    """A machine that is left early may be followed by those behind it in this order: those that end later, and of
    those that end with it, the faster ones. Each hop then is further on, so no machine comes twice."""
    ranked = sorted(
        range(len(machines)),
        key=lambda number: (
            machines[number][2],
            machines[number][0].rates.decode_tokens_per_s,
            machines[number][0].peer,
        ),
    )
    order = np.empty(len(machines), dtype=np.intp)
    order[ranked] = np.arange(len(machines))
    return order


def one_way_delay_s(rtts_s: Floats) -> Floats:
    """PETALS' delay of a hop from its round trip: half of it, at most 5 s; 0.15 s where unknown (NaN)."""
    return np.where(np.isnan(rtts_s), UNKNOWN_DELAY_S, np.minimum(rtts_s / 2, MAX_DELAY_S))


def _usable_machines(view: SwarmView, blocks: range, without: frozenset[PeerId]) -> list[_Usable]:
    """Who can serve, in the order of ids.

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
    records: Sequence[PeerRecord],
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
