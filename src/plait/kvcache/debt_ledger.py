"""Who has lent how much to whom, all over the swarm, as heartbeats tell it.

The ledger decides nothing alone and owns nothing: creditors keep their own books (`loan_book.py`). It may be behind,
and it may die: a new one hears each instance's next heartbeat, misses a number, asks for a whole one, and knows what
the old one knew. After the gManager of Infinite-LLM (Lin et al. 2024): the debt ledger of version 1, the placement map
of version 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from plait.ids import PeerId, RequestId
from plait.kvcache.lending_plan import LayerTimes

MAX_CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class PlacementChange:
    """So many blocks of a request lie at `holder` now; 0 where there were some."""

    request: RequestId
    holder: PeerId
    kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DebtHeartbeat:
    """What an instance says of itself; `changes` since its heartbeat before, or all if it is `whole`.

    `lendable_blocks`: what it would lend now. `spare_blocks`: free ones that it needs for nothing of its own. `lent` by
    debtor, `borrowed` by creditor. `attended_tokens`: those whose attention runs there, own and lent. `starving`: the
    priority of a request that cannot go on for want of blocks, if there is one; lower goes first. `times` is None as
    long as too little has been measured.
    """

    instance: PeerId
    number: int
    whole: bool
    kv_blocks: int
    free_blocks: int
    lendable_blocks: int
    running: int
    waiting: int
    lent: Mapping[PeerId, int]
    borrowed: Mapping[PeerId, int]
    spare_blocks: int = 0
    attended_tokens: int = 0
    mean_request_tokens: float = 0.0
    starving: int | None = None
    times: LayerTimes | None = None
    changes: tuple[PlacementChange, ...] = ()


@dataclass(frozen=True, slots=True)
class DebtRow:
    """The latest heartbeat of an instance, and when it came."""

    heartbeat: DebtHeartbeat
    heard_s: float


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A debt that its two ends tell differently: a transfer in flight, or a loss."""

    debtor: PeerId
    creditor: PeerId
    lent_blocks: int
    borrowed_blocks: int


class DebtLedger:
    """All rows, and the placement map, as of the heartbeats that were heard."""

    def __init__(self) -> None:
        self._rows: dict[PeerId, DebtRow] = {}
        self._placement: dict[PeerId, dict[tuple[RequestId, PeerId], int]] = {}

    @property
    def rows(self) -> Mapping[PeerId, DebtRow]:
        """One row for each instance, by id."""
        return dict(sorted(self._rows.items()))

    def hear(self, heartbeat: DebtHeartbeat, now_s: float) -> bool:
        """Take a heartbeat; False if one before it is missing, so that the instance must send a whole one."""
        known = self._rows.get(heartbeat.instance)
        if heartbeat.whole:
            self._placement[heartbeat.instance] = {}
        elif known is None or heartbeat.number > known.heartbeat.number + 1:
            return False
        elif heartbeat.number <= known.heartbeat.number:
            return True
        self._rows[heartbeat.instance] = DebtRow(heartbeat, now_s)
        placed = self._placement[heartbeat.instance]
        for change in heartbeat.changes:
            if change.kv_blocks:
                placed[change.request, change.holder] = change.kv_blocks
            else:
                placed.pop((change.request, change.holder), None)
        return True

    def forget_silent(self, before_s: float) -> tuple[PeerId, ...]:
        """Strike out instances that were last heard of before that time."""
        silent = tuple(sorted(each for each, row in self._rows.items() if row.heard_s < before_s))
        for instance in silent:
            del self._rows[instance]
            del self._placement[instance]
        return silent

    def placement(self, debtor: PeerId) -> dict[RequestId, dict[PeerId, int]]:
        """Where the blocks of an instance's requests lie."""
        placed: dict[RequestId, dict[PeerId, int]] = {}
        for (request, holder), kv_blocks in sorted(self._placement.get(debtor, {}).items()):
            placed.setdefault(request, {})[holder] = kv_blocks
        return placed

    def debts(self) -> dict[tuple[PeerId, PeerId], int]:
        """Blocks by (debtor, creditor): as many as both ends say."""
        debts: dict[tuple[PeerId, PeerId], int] = {}
        for debtor, row in self.rows.items():
            for creditor, borrowed in sorted(row.heartbeat.borrowed.items()):
                other = self._rows.get(creditor)
                lent = other.heartbeat.lent.get(debtor, 0) if other else 0
                if blocks := min(lent, borrowed):
                    debts[debtor, creditor] = blocks
        return debts

    def disagreements(self) -> tuple[Disagreement, ...]:
        """Debts between two known instances that they tell differently."""
        told: dict[tuple[PeerId, PeerId], list[int]] = {}
        for instance, row in self._rows.items():
            for debtor, blocks in row.heartbeat.lent.items():
                told.setdefault((debtor, instance), [0, 0])[0] = blocks
            for creditor, blocks in row.heartbeat.borrowed.items():
                told.setdefault((instance, creditor), [0, 0])[1] = blocks
        return tuple(
            Disagreement(debtor, creditor, lent, borrowed)
            for (debtor, creditor), (lent, borrowed) in sorted(told.items())
            if lent != borrowed and debtor in self._rows and creditor in self._rows
        )

    def candidates(
        self, debtor: PeerId, kv_blocks: int, one_way_s: Mapping[PeerId, float]
    ) -> tuple[PeerId, ...]:
        """Whom a debtor should ask for blocks, best first, three at most: version 1's pull.

        Those who could lend all of it go first, nearest first; then the others, who has most first. Unknown distances
        count as the longest.
        """
        longest_s = max(one_way_s.values(), default=0.0)

        def badness(instance: PeerId) -> tuple[bool, float, int, PeerId]:
            lendable = self._rows[instance].heartbeat.lendable_blocks
            enough = lendable >= kv_blocks
            return not enough, one_way_s.get(instance, longest_s) if enough else 0.0, -lendable, instance

        lenders = [each for each, row in self._rows.items() if row.heartbeat.lendable_blocks > 0]
        return tuple(sorted((each for each in lenders if each != debtor), key=badness)[:MAX_CANDIDATES])
