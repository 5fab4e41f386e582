"""Which debtor should move how many blocks to which creditor, so that all together serve more.

The time of a layer on an instance is W(requests in its batch) + A(tokens attended there, own and lent) + a constant for
each remote holder; its throughput is requests / (layers x that time). A debtor with a small batch is short of memory:
moved blocks admit more of those that wait, and take attention off its hands; the creditor attends more. Infinite-LLM
(Lin et al. 2024, version 2): the greedy placement over debtors and creditors. The paper goes through debtors by the
size of their batches; where two want the same memory, we serve who makes more of it. Ours are also the exact form of W
and A, the minimum gain and the dwell time, which keep a plan from moving back what the one before moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from plait.ids import PeerId, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Seconds that one layer takes, fitted to measurements; see `seconds`."""

    layers: int
    flat_s: float
    per_request_s: float
    per_token_s: float
    per_holder_s: float

    def seconds(self, requests: float, tokens: int, holders: int) -> float:
        """Reading the weights takes `flat_s` for any small batch; then computing takes over."""
        return (
            max(self.flat_s, self.per_request_s * requests)
            + self.per_token_s * tokens
            + self.per_holder_s * holders
        )

    def throughput(self, requests: float, tokens: int, holders: int) -> float:
        """Tokens a second of the whole batch."""
        return requests / (self.layers * self.seconds(requests, tokens, holders)) if requests else 0.0


@dataclass(frozen=True, slots=True)
class StepSample:
    """A measured decode step: requests in the batch, tokens attended, holders asked in a layer, and its seconds."""

    requests: int
    tokens: int
    holders: int
    seconds: float


def fit_layer_times(samples: Sequence[StepSample], layers: int) -> LayerTimes:
    """The times that explain measured steps best: least squares of relative errors, no time below 0.

    Where computing takes over from reading the weights is tried at every batch size that was measured.
    """
    seconds = np.array([each.seconds for each in samples]) / layers
    fits: list[tuple[float, LayerTimes]] = []
    for knee in sorted({each.requests for each in samples}):
        terms = np.array(
            [[max(knee, each.requests), each.tokens, each.holders] for each in samples], dtype=float
        )
        for kept in ((0, 1, 2), (0, 1), (0, 2), (0,)):
            weights, *_ = np.linalg.lstsq(
                terms[:, kept] / seconds[:, None], np.ones(len(samples)), rcond=None
            )
            if (weights < 0).any():
                continue
            found = dict(zip(kept, weights.tolist(), strict=True))
            error = float(np.square(terms[:, kept] @ weights / seconds - 1).sum())
            times = LayerTimes(
                layers=layers,
                flat_s=found[0] * knee,
                per_request_s=found[0],
                per_token_s=found.get(1, 0.0),
                per_holder_s=found.get(2, 0.0),
            )
            fits.append((error, times))
    return min(fits, key=lambda each: each[0])[1]


@dataclass(frozen=True, slots=True)
class MovableRequest:
    """A running request, and how many full blocks of it are still at home."""

    id: RequestId
    tokens: int
    movable_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """An instance as the planner sees it.

    `attended_tokens`: those whose attention runs here, own and lent. `moved_s`: when its last move was planned.
    """

    id: PeerId
    times: LayerTimes
    running: float
    waiting: float
    kv_blocks: int
    free_blocks: int
    lendable_blocks: int
    attended_tokens: int
    mean_request_tokens: float
    holders: int = 0
    requests: tuple[MovableRequest, ...] = ()
    moved_s: float = float("-inf")

    @property
    def throughput(self) -> float:
        """Tokens a second, as the model has it."""
        return self.times.throughput(self.running, self.attended_tokens, self.holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingRules:
    """Who lends and borrows, and when it is worth it.

    An instance below `small_batch` requests that has others waiting is a debtor; one that uses less than
    `spare_fraction` of its memory a creditor. A move must gain `least_gain_fraction` of what both do now, and neither
    end may have moved anything in the last `dwell_s`.
    """

    small_batch: int
    spare_fraction: float = 0.8
    least_gain_fraction: float = 0.02
    dwell_s: float = 2.0


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """Blocks of a request that the debtor should move to the creditor, the oldest first."""

    request: RequestId
    debtor: PeerId
    creditor: PeerId
    kv_blocks: int
    gain_fraction: float


def plan_lending(
    instances: Sequence[InstanceLoad], rules: LendingRules, block_tokens: int, now_s: float
) -> tuple[PlannedMove, ...]:
    """Greedily the debtor, creditor and number of blocks that gain most, again and again; then shifts of what was given
    from one debtor or creditor to another, as long as they gain. The oldest blocks of the longest requests move first.

    Nobody is both in one plan.
    """
    loads = {load.id: load for load in instances}
    rested = sorted(load.id for load in instances if now_s - load.moved_s >= rules.dwell_s)
    creditors = [
        each
        for each in rested
        if 1 - loads[each].free_blocks / loads[each].kv_blocks < rules.spare_fraction
        and loads[each].lendable_blocks > 0
    ]
    debtors = [
        each
        for each in rested
        if loads[each].running < rules.small_batch and loads[each].waiting and _movable_blocks(loads[each])
    ]
    amounts = _Amounts(loads, block_tokens)
    for _ in range(_MOST_CHANGES):
        change = amounts.best_loan(debtors, creditors, rules.least_gain_fraction)
        if change is None:
            change = amounts.best_shift(debtors, creditors)
        if change is None:
            break
        amounts.apply(change)
    return amounts.moves()


_MOST_CHANGES = 200  # a bound on the time a plan takes; small swarms need about ten
_TRIED_AMOUNTS = 129  # of blocks between two instances; all of them where there are no more
_LEAST_SHIFT_GAIN = 1e-6  # of a shift, as a fraction of what all do: less is rounding
_Floats = NDArray[np.float64]
_NOTHING: _Floats = np.zeros(1)
_Pair = tuple[PeerId, PeerId]


class _Amounts:
    """Blocks by (debtor, creditor), while a plan is made; what they come to is the sum of all throughputs."""

    def __init__(self, loads: Mapping[PeerId, InstanceLoad], block_tokens: int) -> None:
        self._loads = loads
        self._block_tokens = block_tokens
        self._blocks: dict[_Pair, int] = {}

    def best_loan(
        self, debtors: Sequence[PeerId], creditors: Sequence[PeerId], least_gain_fraction: float
    ) -> dict[_Pair, int] | None:
        """The loan, or more of one, that gains most; None if none gains the least that it must."""
        best: tuple[float, dict[_Pair, int]] | None = None
        for debtor, creditor in product(debtors, creditors):
            most = min(self._left(debtor), self._spare(creditor))
            if not self._allowed(debtor, creditor) or most <= 0:
                continue
            more = _tried(most)
            now = self._debtor(debtor) + self._creditor(creditor)
            pair = debtor, creditor
            then = self._debtor(debtor, more, pair not in self._blocks) + self._creditor(creditor, more)
            place = int(then.argmax())
            gain = float(then[place] - now[0])
            if gain >= least_gain_fraction * now[0] and gain > 0 and (best is None or gain > best[0]):
                best = gain, {pair: self._blocks.get(pair, 0) + int(more[place])}
        return best and best[1]

    def best_shift(self, debtors: Sequence[PeerId], creditors: Sequence[PeerId]) -> dict[_Pair, int] | None:
        """The best change that gives part of a loan to another debtor, or puts it at another creditor."""
        least = _LEAST_SHIFT_GAIN * sum(float(self._debtor(each)[0]) for each in self._loads)
        best: tuple[float, dict[_Pair, int]] | None = None
        for (debtor, creditor), blocks in self._blocks.items():
            for other in ((each, creditor) for each in debtors if each != debtor):
                fewer = _tried(min(blocks, self._left(other[0])))
                then = (
                    self._debtor(debtor, -fewer, -1 * (fewer == blocks))
                    + self._debtor(other[0], fewer, other not in self._blocks)
                    - self._debtor(debtor)
                    - self._debtor(other[0])
                )
                best = self._better(best, then, fewer, (debtor, creditor), other, least)
            for other in ((debtor, each) for each in creditors if each != creditor):
                fewer = _tried(min(blocks, self._spare(other[1])))
                holders = 1 * (other not in self._blocks) - 1 * (fewer == blocks)
                then = (
                    self._debtor(debtor, 0 * fewer, holders)
                    + self._creditor(creditor, -fewer)
                    + self._creditor(other[1], fewer)
                    - self._debtor(debtor)
                    - self._creditor(creditor)
                    - self._creditor(other[1])
                )
                best = self._better(best, then, fewer, (debtor, creditor), other, least)
        return best and best[1]

    def apply(self, change: Mapping[_Pair, int]) -> None:
        """Take over new amounts."""
        self._blocks.update(change)
        self._blocks = {pair: blocks for pair, blocks in self._blocks.items() if blocks}

    def moves(self) -> tuple[PlannedMove, ...]:
        """What each request moves where, those that gain most first."""
        left = {
            debtor: sorted(self._loads[debtor].requests, key=lambda each: (each.tokens, each.id))
            for debtor, _ in self._blocks
        }
        moved = {debtor: 0 for debtor in left}
        found: list[PlannedMove] = []
        for pair, blocks in sorted(self._blocks.items(), key=lambda each: (-self._gain(*each), each[0])):
            debtor, creditor = pair
            gain = self._gain(pair, blocks)
            while blocks and left[debtor]:
                longest = left[debtor][-1]
                part = min(blocks, longest.movable_blocks - moved[debtor])
                if part > 0:
                    found.append(PlannedMove(longest.id, debtor, creditor, part, gain))
                    blocks -= part
                    moved[debtor] += part
                if moved[debtor] >= longest.movable_blocks:
                    left[debtor].pop()
                    moved[debtor] = 0
        return tuple(found)

    def _better(
        self,
        best: tuple[float, dict[_Pair, int]] | None,
        gains: _Floats,
        fewer: _Floats,
        pair: _Pair,
        other: _Pair,
        least: float,
    ) -> tuple[float, dict[_Pair, int]] | None:
        if not len(gains) or not self._allowed(*other, but=pair):
            return best
        place = int(gains.argmax())
        gain, blocks = float(gains[place]), int(fewer[place])
        if gain <= least or (best is not None and gain <= best[0]):
            return best
        return gain, {pair: self._blocks[pair] - blocks, other: self._blocks.get(other, 0) + blocks}

    def _gain(self, pair: _Pair, blocks: int) -> float:
        """What a loan brings, beside all the others, as a fraction of what its two ends do without any."""
        debtor, creditor = pair
        fewer = np.array([-float(blocks)])
        with_it = self._debtor(debtor) + self._creditor(creditor)
        without = self._debtor(debtor, fewer, -1) + self._creditor(creditor, fewer)
        return float(with_it[0] - without[0]) / max(
            self._loads[debtor].throughput + self._loads[creditor].throughput, 1e-300
        )

    def _allowed(self, debtor: PeerId, creditor: PeerId, *, but: _Pair | None = None) -> bool:
        pairs = [pair for pair in self._blocks if pair != but]
        return debtor != creditor and not any(pair[0] == creditor or pair[1] == debtor for pair in pairs)

    def _left(self, debtor: PeerId) -> int:
        """Blocks of a debtor that nobody takes yet."""
        return _movable_blocks(self._loads[debtor]) - self._moved(debtor)

    def _spare(self, creditor: PeerId) -> int:
        """Blocks that a creditor could still lend."""
        return self._loads[creditor].lendable_blocks - self._lent(creditor)

    def _moved(self, debtor: PeerId) -> int:
        return sum(blocks for pair, blocks in self._blocks.items() if pair[0] == debtor)

    def _lent(self, creditor: PeerId) -> int:
        return sum(blocks for pair, blocks in self._blocks.items() if pair[1] == creditor)

    def _debtor(self, id: PeerId, more: _Floats = _NOTHING, more_holders: int | _Floats = 0) -> _Floats:
        """Throughput of a debtor that moves so many blocks more, for each of these numbers."""
        holders = sum(pair[0] == id for pair in self._blocks) + more_holders
        return _debtor_rates(self._loads[id], self._moved(id) + more, holders, self._block_tokens)

    def _creditor(self, id: PeerId, more: _Floats = _NOTHING) -> _Floats:
        return _creditor_rates(self._loads[id], self._lent(id) + more, self._block_tokens)


def _tried(most: int) -> _Floats:
    """Numbers of blocks up to the most, at most so many as are tried."""
    if most < _TRIED_AMOUNTS:
        return np.arange(1.0, most + 1)
    return np.unique(np.linspace(1, most, _TRIED_AMOUNTS).round())


def _movable_blocks(load: InstanceLoad) -> int:
    return sum(request.movable_blocks for request in load.requests)


def _rates(times: LayerTimes, requests: _Floats, tokens: _Floats, holders: int | _Floats) -> _Floats:
    """`LayerTimes.throughput` of many loads at once."""
    seconds = np.maximum(times.flat_s, times.per_request_s * requests) + times.per_token_s * tokens
    return requests / (times.layers * (seconds + times.per_holder_s * holders))


def _debtor_rates(load: InstanceLoad, moved: _Floats, holders: int | _Floats, block_tokens: int) -> _Floats:
    """See `after_move`; with nothing moved, nobody is admitted."""
    room_tokens = (load.free_blocks + moved) * block_tokens
    admitted = np.where(moved > 0, np.minimum(load.waiting, room_tokens / load.mean_request_tokens), 0.0)
    tokens = np.maximum(0, load.attended_tokens - moved * block_tokens)
    tokens += np.floor(admitted * load.mean_request_tokens)
    return _rates(load.times, load.running + admitted, tokens, load.holders + holders)


def _creditor_rates(load: InstanceLoad, lent: _Floats, block_tokens: int) -> _Floats:
    tokens = load.attended_tokens + lent * block_tokens
    return _rates(load.times, np.full(lent.shape, float(load.running)), tokens, load.holders)


def best_move(
    debtor: InstanceLoad, creditor: InstanceLoad, movable_blocks: int, block_tokens: int
) -> tuple[int, float]:
    """The number of blocks that gains most, and its gain as a fraction of what both do now; (0, 0.0) if none does."""
    most = min(movable_blocks, creditor.lendable_blocks)
    now = debtor.throughput + creditor.throughput
    if most <= 0 or now <= 0:
        return 0, 0.0
    blocks = np.arange(1.0, most + 1)
    together = _debtor_rates(debtor, blocks, 1, block_tokens) + _creditor_rates(
        creditor, blocks, block_tokens
    )
    best = int(together.argmax())
    gain = float(together[best]) / now - 1
    return (best + 1, gain) if gain > 0 else (0, 0.0)


def after_move(
    debtor: InstanceLoad,
    creditor: InstanceLoad,
    kv_blocks: int,
    block_tokens: int,
) -> tuple[InstanceLoad, InstanceLoad]:
    """Both ends once so many blocks have moved, and whom that admits has been admitted.

    Parts of a request count too: what one creditor has may be too little for it, and what several have enough.
    """
    moved_tokens = kv_blocks * block_tokens
    room_tokens = (debtor.free_blocks + kv_blocks) * block_tokens
    admitted = min(debtor.waiting, room_tokens / debtor.mean_request_tokens)
    admitted_tokens = int(admitted * debtor.mean_request_tokens)
    return (
        replace(
            debtor,
            running=debtor.running + admitted,
            waiting=debtor.waiting - admitted,
            attended_tokens=max(0, debtor.attended_tokens - moved_tokens) + admitted_tokens,
            free_blocks=(room_tokens - admitted_tokens) // block_tokens,
            holders=debtor.holders + 1,
        ),
        replace(
            creditor,
            attended_tokens=creditor.attended_tokens + moved_tokens,
            free_blocks=creditor.free_blocks - kv_blocks,
            lendable_blocks=creditor.lendable_blocks - kv_blocks,
        ),
    )
