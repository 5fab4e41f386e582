"""What one machine has borrowed: which block of which creditor stands behind each borrowed number of its own pool.

    granted ──▶ empty ──take_empty──▶ filling ──filled──▶ in tables ──last holder lets go──▶ spent ──take_spent──▶ gone
                  └──give_back──▶ gone   └──cancel──▶ spent                   any of them ──lose──▶ gone

A block is filled once and then goes back to its creditor, who lends it anew under another generation: so a message that
was long on its way never overwrites what came after it.

The pool numbers borrowed blocks beyond its own, so a block table may name both and nothing else of the
scheduler knows the difference: prefixes are shared, references counted, tables forked over borrowed blocks too. New
tokens are written to own blocks only; a full block moves out, and keeps its name in the prefix index.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.ids import PeerId
from plait.kvcache.loan_book import LentBlock
from plait.kvcache.pool import KvBlockPool


@dataclass(frozen=True, slots=True)
class RemoteBlock:
    """A borrowed block as its creditor knows it."""

    creditor: PeerId
    block: LentBlock


class DebtBook:
    """The debts of one pool."""

    def __init__(self, pool: KvBlockPool) -> None:
        self._pool = pool
        self._places: dict[int, RemoteBlock] = {}
        self._numbers: dict[RemoteBlock, int] = {}
        self._empty: dict[int, None] = {}
        self._filling: dict[int, None] = {}
        self._spent: dict[int, None] = {}

    @property
    def empty_blocks(self) -> int:
        """Borrowed blocks that nothing is in or on its way to."""
        return len(self._empty)

    @property
    def borrowed_blocks(self) -> int:
        """All borrowed blocks."""
        return len(self._places)

    @property
    def held(self) -> list[int]:
        """Borrowed numbers that the book itself holds: one more holder, for the pool's `check`."""
        return [*self._empty, *self._filling, *self._spent]

    def place(self, borrowed: int) -> RemoteBlock:
        """Where a borrowed block really is."""
        return self._places[borrowed]

    def number_of(self, place: RemoteBlock) -> int | None:
        """The borrowed number that stands for a creditor's block, if one does."""
        return self._numbers.get(place)

    def is_filled(self, borrowed: int) -> bool:
        """Whether a borrowed block is, or was, in block tables: its content is at its creditor."""
        return borrowed in self._places and not (borrowed in self._empty or borrowed in self._filling)

    def borrowed_from(self) -> dict[PeerId, int]:
        """How many blocks each creditor has lent."""
        counts: dict[PeerId, int] = {}
        for place in self._places.values():
            counts[place.creditor] = counts.get(place.creditor, 0) + 1
        return dict(sorted(counts.items()))

    def granted(self, creditor: PeerId, blocks: Sequence[LentBlock]) -> None:
        """A creditor has lent blocks; those known already (an answer that came twice) are left as they are."""
        places = [RemoteBlock(creditor, block) for block in dict.fromkeys(blocks)]
        fresh = [place for place in places if place not in self._numbers]
        for borrowed, place in zip(self._pool.borrow(len(fresh)), fresh, strict=True):
            self._places[borrowed] = place
            self._numbers[place] = borrowed
            self._empty[borrowed] = None
        self._promise()

    def take_empty(self, kv_blocks: int) -> list[int]:
        """Up to so many empty blocks, to be filled; those lent first come first."""
        taken = list(self._empty)[:kv_blocks]
        for borrowed in taken:
            del self._empty[borrowed]
            self._filling[borrowed] = None
        return taken

    def filled(self, borrowed: int) -> None:
        """The creditor has the content: from here on block tables hold the number, and the book does not."""
        del self._filling[borrowed]
        self._promise()

    def cancel(self, borrowed: int) -> None:
        """Nothing will be moved there after all; what was sent there may have arrived."""
        if borrowed in self._filling:
            del self._filling[borrowed]
            self._spent[borrowed] = None
            self._promise()

    def take_spent(self) -> dict[PeerId, list[LentBlock]]:
        """Part with all blocks that no table holds any more; returns what to tell each creditor."""
        self._spent.update(dict.fromkeys(self._pool.take_unheld()))
        spent, self._spent = list(self._spent), {}
        return self._part_with(spent)

    def give_back(self, kv_blocks: int) -> dict[PeerId, list[LentBlock]]:
        """Part with up to so many empty blocks, those lent last first; returns what to tell each creditor."""
        parted = list(self._empty)[::-1][:kv_blocks]
        for borrowed in parted:
            del self._empty[borrowed]
        return self._part_with(parted)

    def numbers(self, creditor: PeerId) -> dict[LentBlock, int]:
        """The borrowed numbers of a creditor's blocks."""
        return {
            place.block: borrowed for borrowed, place in self._places.items() if place.creditor == creditor
        }

    def lose(self, numbers: Iterable[int]) -> None:
        """Strike out blocks that are lost, once no block table holds them any more."""
        self._spent.update(dict.fromkeys(self._pool.take_unheld()))
        for borrowed in numbers:
            for state in (self._empty, self._filling, self._spent):
                if borrowed in state:
                    del state[borrowed]
                    self._part_with([borrowed])

    def check(self) -> None:
        """Assert that the book agrees with itself; `held` is a holder for the pool's own check."""
        places = list(self._places.values())
        assert len(places) == len(set(places)), "two borrowed numbers stand for one block"
        assert self._numbers == {place: borrowed for borrowed, place in self._places.items()}
        assert len(self.held) == len(set(self.held)) and set(self.held) <= self._places.keys()
        assert set(self._places) == self._pool.borrowed_numbers
        assert self._pool.promised_blocks == len(self._empty) + len(self._filling)

    def _part_with(self, numbers: Iterable[int]) -> dict[PeerId, list[LentBlock]]:
        parted: dict[PeerId, list[LentBlock]] = {}
        for borrowed in numbers:
            place = self._places.pop(borrowed)
            del self._numbers[place]
            parted.setdefault(place.creditor, []).append(place.block)
            self._pool.forget([borrowed])
        self._promise()
        return parted

    def _promise(self) -> None:
        self._pool.promised_blocks = len(self._empty) + len(self._filling)
