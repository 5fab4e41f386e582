"""Both ends of one pool's loans, with the scheduler that uses it; what blocks hold is copied by whoever calls this.

A debtor moves full blocks out while it goes on computing: their content does not change any more, so it is copied at
leisure (`start_moves`), and between two steps, once the creditor has it, the block tables name the borrowed block
instead (`finish_move`). All calls come between steps.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from plait.ids import PeerId, RequestId
from plait.kvcache.debt_book import DebtBook, RemoteBlock
from plait.kvcache.loan_book import LoanBook, LoanTerms
from plait.kvcache.pool import KvBlockPool


@dataclass(frozen=True, slots=True)
class PlacedRequest:
    """A running request: tokens that are computed, and the blocks of its tables, each once."""

    id: RequestId
    tokens: int
    kv_blocks: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingFacts:
    """What a scheduler knows of its memory.

    `short_blocks`: blocks that running requests and the first waiting one lack for all that is known of them; below 0
    where that many are free beyond it. Promised blocks do not count. `mean_request_tokens`: what is known of such a
    request. `starving_order`: the priority of the first request, if it cannot go on for want of blocks; lower goes
    first. `requests`: the longest that run, longest first.
    """

    running: int
    waiting: int
    short_blocks: int
    computed_tokens: int
    mean_request_tokens: float
    starving_order: int | None
    requests: tuple[PlacedRequest, ...]


class LoanScheduler(Protocol):
    """What lending needs of a scheduler; `scheduling.Scheduler` has it."""

    @property
    def borrowable_blocks(self) -> int: ...

    def movable(self, kv_blocks: int, staying: Container[int]) -> list[int]: ...

    def relocate(self, source: int, target: int) -> bool: ...

    def lose(self, kv_blocks: Iterable[int]) -> list[RequestId]: ...

    def give_way(self) -> RequestId | None: ...

    def short_blocks(self) -> int: ...

    def lending_facts(self) -> LendingFacts: ...


@dataclass(frozen=True, slots=True)
class BegunMove:
    """A full block on its way: where it is here, the number that will stand for it, and where it goes."""

    source: int
    borrowed: int
    place: RemoteBlock


class BlockLoans:
    """The books of one pool and what they do to its scheduler.

    `first_generation`: above all that the same machine ever lent under, as after a restart nothing else tells what was
    lent before from what is lent now.
    """

    def __init__(
        self, scheduler: LoanScheduler, pool: KvBlockPool, terms: LoanTerms, *, first_generation: int = 0
    ) -> None:
        self.book = LoanBook(pool, terms, first_generation=first_generation)
        self.debts = DebtBook(pool)
        self.scheduler = scheduler
        self.pool = pool
        self._moves: dict[int, int] = {}
        self.lost_total = 0
        """Borrowed blocks that were lost, or given up before they were needed no more."""
        self._kept: list[int] = []

    @property
    def moving(self) -> list[int]:
        """Borrowed numbers of the blocks that are on their way out."""
        return list(self._moves)

    def wanted_blocks(self) -> int:
        """Blocks that should be borrowed now, as far as the scheduler may."""
        most = self.scheduler.borrowable_blocks - self.debts.borrowed_blocks
        short = self.scheduler.short_blocks()
        return max(0, min(most, short - self.pool.promised_blocks))

    def begin_moves(self, kv_blocks: int) -> list[BegunMove]:
        """Choose up to so many full blocks to move out, as far as borrowed ones are empty."""
        room = min(kv_blocks, self.debts.empty_blocks)
        sources = self.scheduler.movable(room, self._moves.values()) if room > 0 else []
        begun: list[BegunMove] = []
        for source, borrowed in zip(sources, self.debts.take_empty(len(sources)), strict=True):
            self.pool.share([source])
            self._moves[borrowed] = source
            begun.append(BegunMove(source, borrowed, self.debts.place(borrowed)))
        return begun

    def source_of(self, borrowed: int) -> int | None:
        """The own block whose content is on its way to a borrowed one, if there is one."""
        return self._moves.get(borrowed)

    def finish_move(self, borrowed: int, accepted: bool) -> None:
        """The creditor has the content, or refused it: then the block stays here, and that borrowed one is lost."""
        source = self._moves.pop(borrowed, None)
        if source is None:  # it was lost meanwhile
            return
        self.pool.release([source])
        if not accepted:
            self.debts.lose([borrowed])
        elif self.scheduler.relocate(source, borrowed):
            self.debts.filled(borrowed)
        else:
            self.debts.cancel(borrowed)

    def homeward(self, creditor: PeerId, kv_blocks: int) -> list[int]:
        """Up to so many borrowed numbers in use, of blocks of this creditor, that there is room for here."""
        held = set(self.debts.held)
        room = min(kv_blocks, self.pool.free_blocks)
        return [number for number in self.debts.numbers(creditor).values() if number not in held][
            : max(0, room)
        ]

    def bring_home(self, borrowed: int) -> int | None:
        """Name an own block instead of a borrowed one, whose content the caller then writes there before anything else.

        None if there is no room, or nobody needs it.
        """
        if not self.pool.free_blocks or borrowed not in self.pool.borrowed_numbers:
            return None
        [own] = self.pool.allocate(1)
        if borrowed in self.debts.held or not self.scheduler.relocate(borrowed, own):
            self.pool.release([own])
            return None
        return own

    def lose(self, numbers: Iterable[int]) -> None:
        """Borrowed blocks are lost: whoever used them computes them again."""
        lost = list(numbers)
        self.lost_total += len(lost)
        self.scheduler.lose(lost)
        for borrowed in lost:
            if borrowed in self._moves:
                self.pool.release([self._moves.pop(borrowed)])
        self.debts.lose(lost)

    def lose_creditor(self, creditor: PeerId) -> None:
        """A creditor is gone, and all that it lent."""
        self.lose(list(self.debts.numbers(creditor).values()))

    @property
    def kept_blocks(self) -> int:
        """Blocks that are kept free for others."""
        return len(self._kept)

    def keep(self) -> None:
        """Keep what could be lent, so that nobody here takes it before it is."""
        self._kept += self.pool.allocate(self.book.lendable_blocks)

    def let_go(self) -> None:
        """Keep nothing any more."""
        self.pool.release(self._kept)
        self._kept = []

    def holders(self) -> list[list[int]]:
        """Who holds blocks of the pool besides the scheduler."""
        return [self.book.held, self.debts.held, list(self._moves.values()), self._kept]

    def check(self) -> None:
        """Assert that both books agree with themselves."""
        self.book.check()
        self.debts.check()
