"""What the one does that keeps the ledger for all: names candidates, and orders moves and returns.

It holds nothing that the next heartbeats would not bring back, and owns no block: an order is a proposal, which the
creditor's book may refuse. So it may die, or two may believe to be it, and only questions are asked again.
"""

from plait.ids import PeerId, RequestId
from plait.kvcache.debt_cycles import plan_take_home, settle_cycles
from plait.kvcache.debt_ledger import DebtHeartbeat, DebtLedger, DebtRow, PlacementChange
from plait.kvcache.lending_actions import LendingOptions
from plait.kvcache.lending_plan import InstanceLoad, LayerTimes, MovableRequest, plan_lending
from plait.wire import (
    MAX_LOAN_BLOCKS,
    HomeOrder,
    LoanBeat,
    LoanBeatAsk,
    LoanCandidates,
    LoanWant,
    MoveOrder,
    WireLayerTimes,
    WirePlacement,
    YieldOrder,
)

# As long as nothing has been measured: a batch costs little more than one request, and moved blocks nothing.
UNMEASURED = LayerTimes(layers=1, flat_s=1e-3, per_request_s=1e-5, per_token_s=0.0, per_holder_s=0.0)
SILENT_BEATS = 5

Order = tuple[PeerId, MoveOrder | HomeOrder | YieldOrder]


class LoanManager:
    """The ledger, and what follows from it."""

    def __init__(self, options: LendingOptions, block_tokens: int) -> None:
        self.ledger = DebtLedger()
        self._options = options
        self._block_tokens = block_tokens
        self._moved_s: dict[PeerId, float] = {}
        self._starving: dict[PeerId, int] = {}
        self._planned_s = float("-inf")

    def hear(self, peer: PeerId, beat: LoanBeat, now_s: float) -> LoanBeatAsk | None:
        """Take a heartbeat; what to answer."""
        heard = self.ledger.hear(heartbeat_of(peer, beat), now_s)
        return None if heard else LoanBeatAsk(beat.number)

    def candidates(self, peer: PeerId, want: LoanWant) -> LoanCandidates:
        """Whom a debtor should ask."""
        return LoanCandidates(
            want.number, self.ledger.candidates(peer, max(1, want.kv_blocks), want.one_way_s)
        )

    def orders(self, now_s: float) -> tuple[Order, ...]:
        """What others should move, and where, if it is time to plan."""
        options = self._options
        if now_s - self._planned_s < options.manage_s:
            return ()
        self._planned_s = now_s
        for silent in self.ledger.forget_silent(now_s - SILENT_BEATS * options.heartbeat_s):
            self._moved_s.pop(silent, None)
        moves = self._moves(now_s) if options.policy == "plan" else ()
        return (*self._yielding(), *moves, *self._homeward(now_s))

    def _yielding(self) -> tuple[Order, ...]:
        """Of several that have starved since the last plan, the one whose request came last gives up what it holds.

        Each may hold what another lacks; the earliest goes on, as in wound-wait (scheduling/idle.py), so not all wait.
        """
        starving = {
            peer: row.heartbeat.starving
            for peer, row in self.ledger.rows.items()
            if row.heartbeat.starving is not None
        }
        still = [peer for peer, order in starving.items() if self._starving.get(peer) == order]
        self._starving = starving
        if len(still) < 2:
            return ()
        last = max(still, key=lambda peer: (starving[peer], peer))
        del self._starving[last]
        return ((last, YieldOrder()),)

    def _moves(self, now_s: float) -> tuple[Order, ...]:
        loads = [self._load(peer, row) for peer, row in self.ledger.rows.items()]
        plan = plan_lending(loads, self._options.rules, self._block_tokens, now_s)
        for move in plan:
            self._moved_s[move.debtor] = self._moved_s[move.creditor] = now_s
        return tuple(
            (move.debtor, MoveOrder(move.request, move.creditor, min(MAX_LOAN_BLOCKS, move.kv_blocks)))
            for move in plan
        )

    def _homeward(self, now_s: float) -> tuple[Order, ...]:
        """Debts on a cycle are settled; then who has memory to spare takes home what fits."""
        settlements, left = settle_cycles(self.ledger.debts())
        orders: list[Order] = []
        for each in settlements:
            for debtor, creditor in zip(each.members, each.members[1:] + each.members[:1], strict=True):
                orders.append((debtor, HomeOrder(creditor, min(MAX_LOAN_BLOCKS, each.kv_blocks))))
        rested_s = now_s - self._options.rules.dwell_s
        spare = {
            peer: row.heartbeat.spare_blocks
            for peer, row in self.ledger.rows.items()
            if self._moved_s.get(peer, rested_s) <= rested_s
        }
        for each in plan_take_home(left, spare):
            orders.append((each.debtor, HomeOrder(each.creditor, min(MAX_LOAN_BLOCKS, each.kv_blocks))))
        return tuple(orders)

    def _load(self, peer: PeerId, row: DebtRow) -> InstanceLoad:
        beat = row.heartbeat
        return InstanceLoad(
            id=peer,
            times=beat.times or UNMEASURED,
            running=beat.running,
            waiting=beat.waiting,
            kv_blocks=beat.kv_blocks,
            free_blocks=beat.free_blocks,
            lendable_blocks=beat.lendable_blocks,
            attended_tokens=beat.attended_tokens,
            mean_request_tokens=max(1.0, beat.mean_request_tokens),
            holders=len(beat.borrowed),
            requests=self._movable(peer),
            moved_s=self._moved_s.get(peer, float("-inf")),
        )

    def _movable(self, peer: PeerId) -> tuple[MovableRequest, ...]:
        """What its requests have at home; the last block of each is still being written."""
        return tuple(
            MovableRequest(
                request, sum(placed.values()) * self._block_tokens, max(0, placed.get(peer, 0) - 1)
            )
            for request, placed in self.ledger.placement(peer).items()
        )


def heartbeat_of(peer: PeerId, beat: LoanBeat) -> DebtHeartbeat:
    """What a heartbeat on the wire says."""
    times = beat.times
    return DebtHeartbeat(
        instance=peer,
        number=beat.number,
        whole=beat.whole,
        kv_blocks=max(1, beat.kv_blocks),
        free_blocks=beat.free_blocks,
        lendable_blocks=beat.lendable_blocks,
        running=beat.running,
        waiting=beat.waiting,
        lent=beat.lent,
        borrowed=beat.borrowed,
        spare_blocks=beat.spare_blocks,
        starving=beat.starving,
        attended_tokens=beat.attended_tokens,
        mean_request_tokens=beat.mean_request_tokens,
        times=None
        if times is None or times.flat_s == 0  # no time at all would be divided by
        else LayerTimes(
            layers=times.layers,
            flat_s=times.flat_s,
            per_request_s=times.per_request_s,
            per_token_s=times.per_token_s,
            per_holder_s=times.per_holder_s,
        ),
        changes=tuple(
            PlacementChange(RequestId(each.request), each.holder, each.kv_blocks) for each in beat.changes
        ),
    )


def wire_times(times: LayerTimes | None) -> WireLayerTimes | None:
    """Fitted times as a heartbeat carries them."""
    if times is None:
        return None
    return WireLayerTimes(
        times.layers, times.flat_s, times.per_request_s, times.per_token_s, times.per_holder_s
    )


def wire_changes(
    told: dict[tuple[RequestId, PeerId], int], now: dict[tuple[RequestId, PeerId], int], most: int
) -> tuple[WirePlacement, ...]:
    """Up to so many differences between what was told and what is; `told` is what was told afterwards."""
    changes: list[WirePlacement] = []
    for key in sorted(told.keys() | now.keys()):
        blocks = now.get(key, 0)
        if told.get(key, 0) == blocks or len(changes) == most:
            continue
        changes.append(WirePlacement(key[0], key[1], blocks))
        if blocks:
            told[key] = blocks
        else:
            del told[key]
    return tuple(changes)
