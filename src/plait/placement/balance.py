"""Which span a peer takes, and when it moves: PETALS' rules.

Every block has a throughput: the sum of what those who serve it can pass through one block. A peer that joins takes
the span whose worst block is worst; a peer that serves asks itself now and then what the swarm's worst block would be
if it and everyone moved to where each is needed most, and moves only if that is a good deal better.

Source: PETALS' released server, August 2024 (docs/systems/nsga2-chains.md); Borzunov et al. 2023, section 3.2.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from plait.cluster import PeerRecord, SwarmView
from plait.errors import BadSetup
from plait.ids import PeerId

BALANCE_QUALITY = 0.75  # PETALS: the worst block now, over what it could be, below which a peer moves
RELAYED_NETWORK_FRACTION = 0.2  # PETALS: of the network rate is left through a relay
UNKNOWN_TOKENS_PER_S = 1.0  # where nobody's rate is known, all count the same
_EPSILON = 1e-3  # PETALS: of a throughput, in favour of staying
_MAX_ROUNDS = 100  # of imagined moves; they end by themselves within a few
_PLANNED_PEERS = 32  # a plan of more takes too long for an event loop, and their rule suffices
_LAYOUTS = 12  # tried for a plan: the quickest first, the longest spans first, and at random

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def choose_span(view: SwarmView, length: int, *, peer: PeerId | None = None) -> range:
    """The span of `length` blocks (or all, if there are fewer) that a joining peer serves best.

    Of all windows, that whose block throughputs, sorted from the worst, come first in lexicographic order; the
    first of equal ones. Peers that are still loading count; `peer` itself does not.

    Raises:
        BadSetup: no block fits.
    """
    if length < 1:
        raise BadSetup("no block fits this machine; free memory, or lower the cache's context")
    throughput = _throughputs([one for one in _served(view) if one.peer != peer], view.model_blocks)
    length = min(length, view.model_blocks)
    start = _worst_window(throughput, length)
    return range(start, start + length)


def better_span(
    view: SwarmView,
    peer: PeerId,
    length: int,
    *,
    rng: np.random.Generator,
    balance_quality: float = BALANCE_QUALITY,
) -> range | None:
    """The span that a serving peer should move to, or None to stay.

    It stays if a block would be served by nobody without it. It moves to where it is needed most (as in
    `choose_span`), if the worst block of the swarm, once everybody has done the same for as long as anyone wants
    to, is more than 1 / `balance_quality` times as good as now. `rng` shuffles the order of these imagined moves.

    PETALS stays otherwise, also where such moves one by one lead nowhere. Here, in a swarm of up to 32 peers, it
    also moves to its place in the layout that the swarm would get if it were laid out anew, if that is as much
    better. A few swarms stay worse than that: those in which everyone who would have to move is the only one to
    serve some block (of 969 random histories of up to 8 peers, 4).
    """
    served = _served(view)
    own = next((one for one in served if one.peer == peer), None)
    if own is None:
        return None
    length = min(length, view.model_blocks)
    throughput = _throughputs(served, view.model_blocks)
    now = float(throughput.min())
    without_own = throughput.copy()
    without_own[own.span.start : own.span.stop] -= own.tokens_per_s * (1 + _EPSILON)
    if now > _EPSILON and without_own.min() <= 0:
        return None
    needed = max(now / (balance_quality - _EPSILON), _EPSILON)
    start = _worst_window(without_own, length)
    best = range(start, start + length)
    if best != own.span:
        moved = [_Served(peer, best, own.tokens_per_s) if one is own else one for one in served]
        if _settle(_throughputs(moved, view.model_blocks), moved, rng) > needed:
            return best
    if len(served) > _PLANNED_PEERS:
        return None
    planned, worst = _plan(view.model_blocks, served)
    return planned[peer] if worst > needed and planned[peer] != own.span else None


@dataclass(frozen=True, slots=True)
class _Served:
    peer: PeerId
    span: range
    tokens_per_s: float


def peer_tokens_per_s(record: PeerRecord) -> float:
    """What a peer passes through one block (PETALS: throughput); 0 is unknown.

    Its prefill rate over the mean number of blocks that a chain uses of it, (n + 1) / 2 if chains enter anywhere,
    or its network's rate, a fifth of it through a relay.
    """
    mean_blocks = (len(record.span) + 1) / 2
    rates = [record.rates.prefill_tokens_per_s / mean_blocks]
    if record.rates.network_tokens_per_s > 0:
        relay = RELAYED_NETWORK_FRACTION if record.relayed else 1.0
        rates.append(record.rates.network_tokens_per_s * relay)
    return min(rates)


def block_throughputs(view: SwarmView) -> Floats:
    """Tokens per second through each block of the model, peers that are still loading included: [blocks]."""
    return _throughputs(_served(view), view.model_blocks)


def _served(view: SwarmView) -> list[_Served]:
    """Spans that are or soon will be served; who has not measured itself counts as the median of the others."""
    records = [
        record
        for record in view.records.values()
        if record.state in ("joining", "online") and len(record.span) > 0
    ]
    rates = [peer_tokens_per_s(record) for record in records]
    known = [rate for rate in rates if rate > 0]
    unknown = float(np.median(known)) if known else UNKNOWN_TOKENS_PER_S
    return [
        _Served(record.peer, record.span, rate or unknown)
        for record, rate in zip(records, rates, strict=True)
    ]


def _throughputs(served: Iterable[_Served], blocks: int) -> Floats:
    throughput = np.zeros(blocks)
    for one in served:
        throughput[one.span.start : one.span.stop] += one.tokens_per_s
    return throughput


def _worst_window(throughput: Floats, length: int) -> int:
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(throughput, length), axis=1)
    # lexsort's last key is the first to compare; it is stable, so the lowest start wins a tie.
    return int(np.lexsort(windows.T[::-1])[0])


def _settle(throughput: Floats, served: list[_Served], rng: np.random.Generator) -> float:
    """Move everybody in turn to where they are needed most, until nobody wants to; changes both.

    Returns the throughput of the worst block then.
    """
    for _ in range(_MAX_ROUNDS):
        moved = False
        for place in _shuffled(len(served), rng):
            one = served[place]
            throughput[one.span.start : one.span.stop] -= one.tokens_per_s * (1 + _EPSILON)
            start = _worst_window(throughput, len(one.span))
            throughput[one.span.start : one.span.stop] += one.tokens_per_s * _EPSILON
            throughput[start : start + len(one.span)] += one.tokens_per_s
            if start != one.span.start:
                served[place] = _Served(one.peer, range(start, start + len(one.span)), one.tokens_per_s)
                moved = True
        if not moved:
            break
    return float(throughput.min())


def _shuffled(count: int, rng: np.random.Generator) -> list[int]:
    return [int(number) for number in rng.permutation(count)]


def _plan(blocks: int, served: list[_Served]) -> tuple[dict[PeerId, range], float]:
    """Where everybody would be if the swarm were laid out anew; the best of a few layouts.

    It depends on who is there with how many blocks and what rates, not on where they are: so all come to the same
    plan, and still do when some have moved.
    """
    rng = np.random.default_rng(len(served))
    best_worst, best = -1.0, served
    by_rate = sorted(served, key=lambda one: (-one.tokens_per_s, -len(one.span), one.peer))
    by_length = sorted(served, key=lambda one: (-len(one.span), -one.tokens_per_s, one.peer))
    for attempt in range(_LAYOUTS):
        shuffled = [by_rate[number] for number in _shuffled(len(served), rng)]
        order = (by_rate, by_length)[attempt] if attempt < 2 else shuffled
        throughput, laid = np.zeros(blocks), list[_Served]()
        for one in order:
            start = _worst_window(throughput, len(one.span))
            throughput[start : start + len(one.span)] += one.tokens_per_s
            laid.append(_Served(one.peer, range(start, start + len(one.span)), one.tokens_per_s))
        worst = _settle(throughput, laid, rng)
        if worst > best_worst * (1 + _EPSILON):
            best_worst, best = worst, laid
    return {one.peer: one.span for one in best}, best_worst
