"""Which debtor should move how many blocks to which creditor, so that all together serve more.

The time of a layer on an instance is W(requests in its batch) + A(tokens attended there, own and lent) + a constant for
each remote holder; its throughput is requests / (layers x that time). A debtor with a small batch is short of memory:
moved blocks admit more of those that wait, and take attention off its hands; the creditor attends more. Infinite-LLM
(Lin et al. 2024, version 2): the greedy placement over debtors and creditors. The paper goes through debtors by the
size of their batches; where two want the same memory, we serve who makes more of it. Ours are also the exact form of W
and A, the minimum gain and the dwell time, which keep a plan from moving back what the one before moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

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
    """Greedily: of all debtors, with their longest requests, and all creditors, the move that gains most; then again.

    Nobody is both in one plan.
    """
    loads = {load.id: load for load in instances}
    rested = [load for load in instances if now_s - load.moved_s >= rules.dwell_s]
    creditors = {load.id for load in rested if 1 - load.free_blocks / load.kv_blocks < rules.spare_fraction}
    debtors = {load.id for load in rested if load.running < rules.small_batch and load.waiting}
    movable = {load.id: [request for request in load.requests if request.movable_blocks] for load in rested}
    moves: list[PlannedMove] = []
    while True:
        best: tuple[float, PlannedMove] | None = None
        for debtor, creditor in product(sorted(debtors), sorted(creditors)):
            if debtor == creditor or not movable[debtor]:
                continue
            request = max(movable[debtor], key=lambda each: (each.tokens, each.id))
            blocks, gain = best_move(loads[debtor], loads[creditor], request.movable_blocks, block_tokens)
            gained = gain * (loads[debtor].throughput + loads[creditor].throughput)
            if gain >= rules.least_gain_fraction and (best is None or gained > best[0]):
                best = gained, PlannedMove(request.id, debtor, creditor, blocks, gain)
        if best is None:
            return tuple(moves)
        move = best[1]
        moves.append(move)
        loads[move.debtor], loads[move.creditor] = after_move(
            loads[move.debtor], loads[move.creditor], move.kv_blocks, block_tokens
        )
        movable[move.debtor] = [
            replace(each, movable_blocks=each.movable_blocks - move.kv_blocks * (each.id == move.request))
            for each in movable[move.debtor]
        ]
        movable[move.debtor] = [each for each in movable[move.debtor] if each.movable_blocks]
        debtors.discard(move.creditor)
        creditors.discard(move.debtor)


def best_move(
    debtor: InstanceLoad, creditor: InstanceLoad, movable_blocks: int, block_tokens: int
) -> tuple[int, float]:
    """The number of blocks that gains most, and its gain as a fraction of what both do now; (0, 0.0) if none does."""
    most = min(movable_blocks, creditor.lendable_blocks)
    now = debtor.throughput + creditor.throughput
    if most <= 0 or now <= 0:
        return 0, 0.0
    together = np.array(
        [
            sum(load.throughput for load in after_move(debtor, creditor, blocks, block_tokens))
            for blocks in range(1, most + 1)
        ]
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
