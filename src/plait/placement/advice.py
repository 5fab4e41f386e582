"""When fewer machines are faster, and why a machine gets so many blocks.

A decoding round through k machines costs what their blocks cost and what k hops cost: links around the ring (the
last hop hands its token to the first), framing, waking up. A further machine takes blocks from slower ones and adds
a hop, so for one user the best number of machines is often smaller than the number at hand. How blocks are cut does
not change the links and in which order machines stand does not change the computing, so the best chain over a set
of machines is the shortest ring through them, plus the blocks given to the fastest first, as many as each can hold:
exact, for every set of a dozen machines.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.cluster import PeerRecord, SwarmView, format_blocks
from plait.ids import PeerId
from plait.placement.balance import Floats, block_throughputs
from plait.placement.capacity import BlockCost, explain_fit, fitting_blocks
from plait.routing import DEFAULT_DECODE_TOKENS_PER_S, HOP_OVERHEAD_S, delays_s
from plait.units import format_bytes, format_s

MAX_MACHINES = 12  # 4,095 sets and their rings: a fifth of a second; another machine doubles it


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """One set of machines and the best that it can do.

    `blocks`: how many each serves for the quickest answer to one user, in the order of the ring. `step_s`: a
    decoding round then. `compute_s`: the part of it spent in blocks. `tokens_per_s`: what the set gives to many
    users at once, cut for that instead.
    """

    blocks: tuple[tuple[PeerId, int], ...]
    step_s: float
    compute_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """`sets`: every set that can hold the model, quickest first. `sentences`: what follows, for people."""

    sets: tuple[Machines, ...]
    sentences: tuple[str, ...]


def advise(view: SwarmView, cost: BlockCost, *, context_tokens: int) -> Advice:
    """Predict the best chain of every set of machines, and say which to use and why.

    Machines hold as many blocks as their announced memory takes, each with cache for `context_tokens`; one that
    announces no memory, as many as it serves.
    """
    records = [
        record for record in view.records.values() if record.state in ("joining", "online", "draining")
    ]
    capacity = {record.peer: _capacity(record, cost, context_tokens) for record in records}
    usable = [record for record in records if capacity[record.peer] > 0]
    if len(usable) > MAX_MACHINES:
        many = f"{len(usable)} machines are too many to try every set of them ({MAX_MACHINES} at most)"
        return Advice(sets=(), sentences=(many,))
    held = sum(capacity[record.peer] for record in usable)
    if held < view.model_blocks:
        short = view.model_blocks - held
        return Advice(
            sets=(),
            sentences=(
                f"{_counted(len(usable))} {held} of {view.model_blocks} blocks; {short} more need "
                f"{format_bytes(short * cost.block_bytes(context_tokens))}: another machine, a smaller context, or "
                "fewer bits a weight",
            ),
        )
    sets = _sets(view, usable, capacity)
    return Advice(sets=sets, sentences=_sentences(view, usable, capacity, sets, cost, context_tokens))


def explain_span(view: SwarmView, peer: PeerId, cost: BlockCost, *, context_tokens: int) -> str:
    """Why a machine serves what it serves, in a sentence: what it holds, and what the swarm would be without it."""
    record = view.records[peer]
    others = replace(view, records={other: one for other, one in view.records.items() if other != peer})
    without = block_throughputs(others)[record.first_block : record.end_block]
    fit = explain_fit(record.memory_bytes, cost, context_tokens=context_tokens)
    if len(record.span) == 0:
        return f"{record.name!r} serves no blocks: {fit}"
    nobody = [block for block, rate in zip(record.span, without, strict=True) if rate <= 0]
    if nobody:
        gap = f"blocks {format_blocks(nobody)} would be served by nobody"
    else:
        gap = f"its worst block would be down to {without.min():.0f} tokens/s, the worst of the swarm being "
        gap += f"{block_throughputs(view).min():.0f}"
    return (
        f"{record.name!r} serves {len(record.span)} blocks, {record.first_block}:{record.end_block}: "
        f"{fit}; without it, {gap}"
    )


def _capacity(record: PeerRecord, cost: BlockCost, context_tokens: int) -> int:
    if record.memory_bytes == 0:
        return len(record.span)
    return fitting_blocks(record.memory_bytes, cost, context_tokens=context_tokens)


def _sets(
    view: SwarmView, records: Sequence[PeerRecord], capacity: dict[PeerId, int]
) -> tuple[Machines, ...]:
    delay_s = delays_s(records, either_way=True)
    rings = _shortest_rings(delay_s)
    block_s = [1 / (record.rates.decode_tokens_per_s or DEFAULT_DECODE_TOKENS_PER_S) for record in records]
    hop_s = [HOP_OVERHEAD_S + _transfer_s(record) for record in records]
    sets: list[Machines] = []
    for members, (ring_s, order) in rings.items():
        holds = [capacity[records[member].peer] for member in members]
        if len(members) > view.model_blocks or sum(holds) < view.model_blocks:
            continue
        given = _fastest_first(view.model_blocks, holds, [block_s[member] for member in members])
        blocks = dict(zip(members, given, strict=True))
        compute_s = sum(blocks[member] * block_s[member] for member in members)
        sets.append(
            Machines(
                blocks=tuple((records[member].peer, blocks[member]) for member in order),
                step_s=compute_s + ring_s + sum(hop_s[member] for member in members),
                compute_s=compute_s,
                tokens_per_s=_most_tokens_per_s(
                    view.model_blocks, holds, [records[member] for member in members]
                ),
            )
        )
    return tuple(sorted(sets, key=lambda one: (one.step_s, len(one.blocks), one.blocks)))


def _transfer_s(record: PeerRecord) -> float:
    rate = record.rates.network_tokens_per_s
    return 1 / rate if rate > 0 else 0.0


def _fastest_first(blocks: int, holds: Sequence[int], block_s: Sequence[float]) -> list[int]:
    """One block each, then all that they hold to the fastest."""
    given = [1] * len(holds)
    left = blocks - len(holds)
    for member in sorted(range(len(holds)), key=lambda number: (block_s[number], number)):
        more = min(left, holds[member] - 1)
        given[member] += more
        left -= more
    return given


def _most_tokens_per_s(blocks: int, holds: Sequence[int], records: Sequence[PeerRecord]) -> float:
    """The highest rate at which every machine keeps up with its blocks, of all ways to cut them."""
    rates = [
        record.rates.saturated_decode_tokens_per_s
        or record.rates.decode_tokens_per_s
        or DEFAULT_DECODE_TOKENS_PER_S
        for record in records
    ]
    possible = sorted(
        {rate / share for rate, hold in zip(rates, holds, strict=True) for share in range(1, hold + 1)}
    )

    def keeps_up(tokens_per_s: float) -> bool:
        shares = [
            min(hold, int(rate / tokens_per_s * (1 + 1e-12))) for rate, hold in zip(rates, holds, strict=True)
        ]
        return min(shares) >= 1 and sum(shares) >= blocks

    place = bisect_left(possible, True, key=lambda tokens_per_s: not keeps_up(tokens_per_s)) - 1
    links = [record.rates.network_tokens_per_s or math.inf for record in records] if len(records) > 1 else []
    return min([possible[place], *links])


def _shortest_rings(delay_s: Floats) -> dict[tuple[int, ...], tuple[float, tuple[int, ...]]]:
    """For every set of machines, the shortest way around it and in which order (Held and Karp, 1962)."""
    count = len(delay_s)
    delay = delay_s.tolist()
    rings: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
    for first in range(count):
        # ways[members, last]: from `first` through all members, which come after it in number.
        ways: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(1 << first, first): (0.0, (first,))}
        for size in range(1, count - first + 1):
            for members in itertools.combinations(range(first + 1, count), size - 1):
                mask = sum(1 << member for member in (first, *members))
                lasts = members or (first,)
                for last in members:
                    before = mask & ~(1 << last)
                    ways[mask, last] = min(
                        (ways[before, other][0] + delay[other][last], (*ways[before, other][1], last))
                        for other in (members if len(members) > 1 else (first,))
                        if other != last
                    )
                closed = min(
                    (ways[mask, last][0] + (delay[last][first] if size > 1 else 0.0), ways[mask, last][1])
                    for last in lasts
                )
                rings[first, *members] = closed
    return rings


def _sentences(
    view: SwarmView,
    records: Sequence[PeerRecord],
    capacity: dict[PeerId, int],
    sets: Sequence[Machines],
    cost: BlockCost,
    context_tokens: int,
) -> tuple[str, ...]:
    names = {record.peer: record.name for record in records}

    def named(machines: Machines) -> str:
        return _listed(sorted(repr(names[peer]) for peer, _ in machines.blocks))

    by_members = {frozenset(peer for peer, _ in one.blocks): one for one in sets}
    best = sets[0]
    chosen = frozenset(peer for peer, _ in best.blocks)
    everyone = by_members.get(frozenset(names))
    said: list[str] = []
    if len(names) == 1:
        said.append(f"{named(best)} alone answers one user with {format_s(best.step_s)} a token")
    elif chosen == frozenset(names):
        line = f"all {len(names)} machines together are the fastest for one user"
        said.append(f"{line}: {format_s(best.step_s)} a token")
    else:
        line = f"{len(chosen)} of {len(names)} machines are the fastest for one user: {named(best)} take "
        line += f"{format_s(best.step_s)} a token"
        said.append(line + (f", all together {format_s(everyone.step_s)}" if everyone else ""))
    for record in records:
        peer = record.peer
        with_it = by_members.get(chosen | {peer})
        without = by_members.get(chosen - {peer})
        if peer not in chosen and with_it is not None:
            saved_s = best.compute_s - with_it.compute_s
            added_s = with_it.step_s - best.step_s + saved_s
            saves = f"save {format_s(saved_s)} of computing" if saved_s > 0 else "save no computing"
            said.append(
                f"{record.name!r} would {saves} a token and add {format_s(added_s)} of links and hops: "
                "leave it out for one user"
            )
        elif peer in chosen and len(chosen) > 1:
            blocks = dict(best.blocks)[peer]
            why = (
                f"as many as it holds ({format_bytes(cost.block_bytes(context_tokens))} a block with its cache)"
                if blocks == capacity[peer]
                else "what the faster ones do not hold"
            )
            lost = (
                f"without it {format_s(without.step_s)} a token"
                if without is not None
                else "without it the model does not fit"
            )
            said.append(f"{record.name!r} gets {blocks} of {view.model_blocks} blocks, {why}; {lost}")
    busiest = max(sets, key=lambda one: (one.tokens_per_s, -len(one.blocks)))
    if busiest.tokens_per_s > best.tokens_per_s:
        said.append(
            f"many users at once get the most from {named(busiest)}: up to {busiest.tokens_per_s:.0f} "
            f"tokens/s together, where {named(best)} give {best.tokens_per_s:.0f}"
        )
    return tuple(said)


def _counted(machines: int) -> str:
    return "1 machine holds" if machines == 1 else f"{machines} machines hold"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
