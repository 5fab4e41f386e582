"""What one machine has lent of its KV blocks: to whom, until when, and under which generation.

    free ──reserve──▶ reserved ──fill, once──▶ filled ──release, expire──▶ free
                          └────────────release, expire────────────────────────▲

The creditor is the only authority over its blocks. Whatever a plan elsewhere supposed, a reservation holds here or it
does not, and a promise too many costs its debtor another question, never an answer. Three rules make silence harmless:

- **Lease.** A debtor that was not heard of for `lease_s` has nothing any more. Each message of it renews all it has,
  and now and then it says what that is (`renew`): what only one of the two believes in ends there.
- **Generation.** It rises each time a block is lent. Whoever names an older one, having been cut off meanwhile, is
  refused, so nobody reads what belongs to a stranger.
- **Numbers.** A loan is named by its debtor and a number that only rises. A request that comes twice gives the answer
  it gave; one that comes after its loan has ended gives a refusal.

Asked from outside, a creditor lends from free blocks or not at all: it never borrows in order to lend, so requests
for memory cannot run in a circle. After the rBlocks and rManagers of Infinite-LLM (Lin et al. 2024, version 1); leases,
generations and numbers are ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from plait.ids import PeerId
from plait.kvcache.pool import KvBlockPool


class LentBlock(NamedTuple):
    """A block of the creditor's pool, as its debtor must name it."""

    kv_block: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoanTerms:
    """How far a creditor goes.

    `lendable_blocks`: most that are lent at once. `keep_free_blocks`: free ones that no loan takes, so that the
    creditor's own sequences can grow. `lease_s`: how long a debtor may be silent. `recall_s`: how long it may take to
    return what is called back.
    """

    lendable_blocks: int
    keep_free_blocks: int = 0
    lease_s: float = 5.0
    recall_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Granted:
    """A reservation: these blocks are the debtor's to fill."""

    number: int
    blocks: tuple[LentBlock, ...]


@dataclass(frozen=True, slots=True)
class NotGranted:
    """No reservation; `lendable_blocks` could have been lent."""

    number: int
    lendable_blocks: int


FillAnswer = Literal["write", "filled", "refused"]
"""Write it; it is written already; it is not yours."""


@dataclass(frozen=True, slots=True)
class Recall:
    """The creditor wants these blocks back by `by_s`, or it will take them."""

    debtor: PeerId
    number: int
    kv_blocks: tuple[int, ...]
    by_s: float


@dataclass(slots=True)
class _Loan:
    blocks: tuple[LentBlock, ...]
    """As they were granted."""
    live: dict[int, bool]
    """Those not given back, and whether each is filled."""


@dataclass(slots=True)
class _Debtor:
    heard_s: float
    last_number: int = -1
    loans: dict[int, _Loan] = field(default_factory=dict[int, _Loan])


class LoanBook:
    """The loans of one pool; every call says what time it is.

    `terms` may change between calls. `first_generation`: above all that were ever used for blocks of this machine, by
    whatever ran here before; it may be set as long as nothing was lent.
    """

    def __init__(self, pool: KvBlockPool, terms: LoanTerms, *, first_generation: int = 0) -> None:
        self.terms = terms
        self._pool = pool
        self.first_generation = first_generation
        self._debtors: dict[PeerId, _Debtor] = {}
        self._loan_of: dict[int, tuple[PeerId, int]] = {}
        self._generations: dict[int, int] = {}
        self._recalls: dict[int, float] = {}

    @property
    def lent_blocks(self) -> int:
        """Blocks that debtors hold, filled or not."""
        return len(self._loan_of)

    @property
    def lendable_blocks(self) -> int:
        """Blocks that could be lent now."""
        return max(
            0,
            min(
                self.terms.lendable_blocks - self.lent_blocks,
                self._pool.free_blocks - self.terms.keep_free_blocks,
            ),
        )

    @property
    def held(self) -> list[int]:
        """The lent blocks: one more holder, for the pool's `check`."""
        return list(self._loan_of)

    def lent_to(self) -> dict[PeerId, int]:
        """How many blocks each debtor has."""
        counts = {
            debtor: sum(len(loan.live) for loan in known.loans.values())
            for debtor, known in self._debtors.items()
        }
        return {debtor: blocks for debtor, blocks in sorted(counts.items()) if blocks}

    def reserve(self, debtor: PeerId, number: int, kv_blocks: int, now_s: float) -> Granted | NotGranted:
        """Lend so many blocks, all or none."""
        assert kv_blocks >= 1
        known = self._debtors.setdefault(debtor, _Debtor(now_s))
        known.heard_s = now_s
        loan = known.loans.get(number)
        if loan is not None:
            return Granted(number, loan.blocks)
        if number <= known.last_number or kv_blocks > self.lendable_blocks:
            return NotGranted(number, self.lendable_blocks)
        known.last_number = number
        blocks: list[LentBlock] = []
        for kv_block in self._pool.allocate(kv_blocks):
            self._generations[kv_block] = generation = (
                self._generations.get(kv_block, self.first_generation) + 1
            )
            self._loan_of[kv_block] = (debtor, number)
            blocks.append(LentBlock(kv_block, generation))
        known.loans[number] = _Loan(tuple(blocks), {block.kv_block: False for block in blocks})
        return Granted(number, tuple(blocks))

    def hear(self, debtor: PeerId, now_s: float) -> None:
        """Something came from this debtor, which renews its lease."""
        if debtor in self._debtors:
            self._debtors[debtor].heard_s = now_s

    def fill(self, debtor: PeerId, block: LentBlock) -> FillAnswer:
        """Whether the debtor may write this block now, once; what comes again later is older than it seems."""
        loan = self._loan(debtor, block)
        if loan is None:
            return "refused"
        if loan.live[block.kv_block]:
            return "filled"
        loan.live[block.kv_block] = True
        return "write"

    def may_read(self, debtor: PeerId, blocks: Iterable[LentBlock]) -> bool:
        """Whether all of these are the debtor's, of these generations, and filled."""
        for block in blocks:
            loan = self._loan(debtor, block)
            if loan is None or not loan.live[block.kv_block]:
                return False
        return True

    def renew(
        self, debtor: PeerId, blocks: Iterable[LentBlock], settled: int, now_s: float
    ) -> tuple[LentBlock, ...]:
        """The debtor says that it has exactly `blocks`, of loans numbered up to `settled`; returns those it has not.

        What else it had of these loans is free then, so nothing that was lost on the way (a grant, a release) stays
        lost.
        """
        known = self._debtors.setdefault(debtor, _Debtor(now_s))
        known.heard_s = now_s
        known.last_number = max(known.last_number, settled)
        listed = tuple(blocks)
        lost = tuple(block for block in listed if self._loan(debtor, block) is None)
        kept = set(listed)
        for number, loan in list(known.loans.items()):
            for block in loan.blocks:
                if number <= settled and block.kv_block in loan.live and block not in kept:
                    self._take_back(block.kv_block)
        return lost

    def release(self, debtor: PeerId, blocks: Iterable[LentBlock]) -> None:
        """Take blocks back that the debtor does not want any more; what it does not have is ignored."""
        for block in blocks:
            if self._loan(debtor, block) is not None:
                self._take_back(block.kv_block)

    def recall(self, kv_blocks: int, now_s: float) -> tuple[Recall, ...]:
        """Choose loans of at least so many blocks in all to be called back, the youngest first."""
        recalls: list[Recall] = []
        missing = kv_blocks - len(self._recalls)
        loans = [(number, debtor) for debtor, known in self._debtors.items() for number in known.loans]
        for number, debtor in sorted(loans, reverse=True):
            wanted = [
                block for block in self._debtors[debtor].loans[number].live if block not in self._recalls
            ]
            if missing <= 0 or not wanted:
                continue
            by_s = now_s + self.terms.recall_s
            self._recalls.update(dict.fromkeys(wanted, by_s))
            recalls.append(Recall(debtor, number, tuple(wanted), by_s))
            missing -= len(wanted)
        return tuple(recalls)

    def named(self, kv_block: int) -> LentBlock:
        """A lent block as its debtor must name it now."""
        return LentBlock(kv_block, self._generations[kv_block])

    def forget(self, debtor: PeerId) -> int:
        """The debtor is gone for good: free all it had; returns how many blocks that were."""
        known = self._debtors.get(debtor)
        if known is None:
            return 0
        blocks = [kv_block for loan in list(known.loans.values()) for kv_block in loan.live]
        for kv_block in blocks:
            self._take_back(kv_block)
        return len(blocks)

    def expire(self, now_s: float) -> int:
        """Free what silent debtors had and what was called back in vain; returns how many blocks that were."""
        freed = sum(
            self.forget(debtor)
            for debtor, known in list(self._debtors.items())
            if known.loans and now_s - known.heard_s > self.terms.lease_s
        )
        late = [kv_block for kv_block, by_s in self._recalls.items() if now_s > by_s]
        for kv_block in late:
            self._take_back(kv_block)
        return freed + len(late)

    def check(self) -> None:
        """Assert that the book agrees with itself; `held` is a holder for the pool's own check."""
        owners: dict[int, tuple[PeerId, int]] = {}
        for debtor, known in self._debtors.items():
            for number, loan in known.loans.items():
                assert loan.live and number <= known.last_number
                assert loan.live.keys() <= {block.kv_block for block in loan.blocks}
                for kv_block in loan.live:
                    assert kv_block not in owners, f"kv_block {kv_block} is lent twice"
                    owners[kv_block] = (debtor, number)
        assert owners == self._loan_of
        assert self.lent_blocks <= self.terms.lendable_blocks
        assert self._recalls.keys() <= owners.keys()

    def _loan(self, debtor: PeerId, block: LentBlock) -> _Loan | None:
        """The loan that a block belongs to, if it is this debtor's and of this generation."""
        owner = self._loan_of.get(block.kv_block)
        if owner is None or owner[0] != debtor or self._generations.get(block.kv_block) != block.generation:
            return None
        return self._debtors[debtor].loans[owner[1]]

    def _take_back(self, kv_block: int) -> None:
        debtor, number = self._loan_of.pop(kv_block)
        known = self._debtors[debtor]
        del known.loans[number].live[kv_block]
        if not known.loans[number].live:
            del known.loans[number]
        self._recalls.pop(kv_block, None)
        self._pool.release([kv_block])
