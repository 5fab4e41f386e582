"""Loans between three machines whose messages are lost, doubled and overtaken: nothing has two owners, nothing
leaks."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from plait.ids import PeerId
from plait.kvcache import (
    DebtBook,
    Granted,
    KvBlockPool,
    LentBlock,
    LoanBook,
    LoanTerms,
    NotGranted,
    chain_keys,
)

TERMS = LoanTerms(lendable_blocks=5, keep_free_blocks=1, lease_s=10.0, recall_s=5.0)
BLOCK_TOKENS = 2


@dataclass
class Reserve:
    number: int
    kv_blocks: int


@dataclass
class Fill:
    borrowed: int
    block: LentBlock
    content: str


@dataclass
class Filled:
    borrowed: int
    block: LentBlock
    accepted: bool


@dataclass
class Release:
    blocks: list[LentBlock]


@dataclass
class Renew:
    blocks: list[LentBlock]
    settled: int


@dataclass
class Lost:
    blocks: tuple[LentBlock, ...]


Body = Reserve | Granted | NotGranted | Fill | Filled | Release | Renew | Lost


@dataclass
class Machine:
    """One machine: its pool, both books, what its lent blocks hold, and its own tables."""

    id: PeerId
    pool: KvBlockPool = field(default_factory=lambda: KvBlockPool(8, BLOCK_TOKENS))
    table: list[int] = field(default_factory=list[int])
    contents: dict[int, str] = field(default_factory=dict[int, str])
    moved: dict[int, str] = field(default_factory=dict[int, str])
    pinned: dict[int, int] = field(default_factory=dict[int, int])
    asked: dict[int, PeerId] = field(default_factory=dict[int, PeerId])
    number: int = 0

    def __post_init__(self) -> None:
        self.loans = LoanBook(self.pool, TERMS)
        self.debts = DebtBook(self.pool)

    @property
    def settled(self) -> int:
        return min(self.asked, default=self.number) - 1

    def check(self) -> None:
        tables = [self.table, list(self.pinned.values())]
        self.loans.check()
        self.debts.check()
        self.pool.check([*tables, self.debts.held, self.loans.held])
        assert self.pool.free_blocks + self.pool.used_blocks == self.pool.kv_blocks


class LoanMachine(RuleBasedStateMachine):
    """Any order of asking, filling, growing, recalling, dying and time; any fate of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.machines = [Machine(PeerId(name)) for name in "abc"]
        self.flying: list[tuple[Machine, Machine, Body]] = []
        self.contents = 0
        self.sent: dict[tuple[LentBlock, PeerId], str] = {}

    def send(self, sender: Machine, to: Machine, body: Body) -> None:
        self.flying.append((sender, to, body))

    def of(self, peer: PeerId) -> Machine:
        return next(machine for machine in self.machines if machine.id == peer)

    machine = st.integers(0, 2)

    @rule(who=machine, other=st.integers(1, 2), kv_blocks=st.integers(1, 4))
    def ask(self, who: int, other: int, kv_blocks: int) -> None:
        debtor, creditor = self.machines[who], self.machines[(who + other) % 3]
        debtor.asked[debtor.number] = creditor.id
        self.send(debtor, creditor, Reserve(debtor.number, kv_blocks))
        debtor.number += 1

    @precondition(lambda self: any(machine.asked for machine in self.machines))
    @rule(data=st.data())
    def give_up_asking(self, data: st.DataObject) -> None:
        debtor = data.draw(st.sampled_from([each for each in self.machines if each.asked]))
        del debtor.asked[min(debtor.asked)]

    @rule(who=machine, kv_blocks=st.integers(1, 3))
    def grow(self, who: int, kv_blocks: int) -> None:
        machine = self.machines[who]
        if kv_blocks <= machine.pool.free_blocks:
            machine.table += machine.pool.allocate(kv_blocks)

    @rule(who=machine, kv_blocks=st.integers(1, 4))
    def shrink(self, who: int, kv_blocks: int) -> None:
        machine = self.machines[who]
        gone, machine.table = machine.table[-kv_blocks:], machine.table[:-kv_blocks]
        machine.pool.release(gone)
        for borrowed in gone:
            machine.moved.pop(borrowed, None)
        self.return_spent(machine)

    def return_spent(self, debtor: Machine) -> None:
        for creditor, blocks in debtor.debts.take_spent().items():
            self.send(debtor, self.of(creditor), Release(blocks))

    @rule(who=machine)
    def start_moving(self, who: int) -> None:
        machine = self.machines[who]
        own = [
            each
            for each in machine.table
            if machine.pool.is_own(each) and each not in machine.pinned.values()
        ]
        if own and (taken := machine.debts.take_empty(1)):
            [borrowed] = taken
            machine.pinned[borrowed] = own[0]
            machine.pool.share([own[0]])
            self.contents += 1
            place = machine.debts.place(borrowed)
            body = Fill(borrowed, place.block, f"{machine.id}{self.contents}")
            self.sent[place.block, place.creditor] = body.content
            self.send(machine, self.of(place.creditor), body)

    @rule(who=machine, kv_blocks=st.integers(1, 3))
    def give_back(self, who: int, kv_blocks: int) -> None:
        debtor = self.machines[who]
        for creditor, blocks in debtor.debts.give_back(kv_blocks).items():
            self.send(debtor, self.of(creditor), Release(blocks))

    @rule(who=machine, other=st.integers(1, 2))
    def renew(self, who: int, other: int) -> None:
        debtor, creditor = self.machines[who], self.machines[(who + other) % 3]
        self.send(debtor, creditor, Renew(list(debtor.debts.numbers(creditor.id)), debtor.settled))

    @rule(who=machine, kv_blocks=st.integers(1, 3))
    def recall(self, who: int, kv_blocks: int) -> None:
        self.machines[who].loans.recall(kv_blocks, self.now_s)

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for machine in self.machines:
            machine.loans.expire(self.now_s)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fate=st.sampled_from(["arrives", "arrives", "arrives", "arrives twice", "is lost"]))
    def message(self, data: st.DataObject, fate: str) -> None:
        place = data.draw(st.integers(0, len(self.flying) - 1))
        sender, to, body = self.flying[place]
        if fate != "arrives twice":
            del self.flying[place]
        if fate != "is lost":
            self.arrive(sender, to, body)

    def arrive(self, sender: Machine, to: Machine, body: Body) -> None:
        to.loans.hear(sender.id, now_s := self.now_s)
        match body:
            case Reserve(number, kv_blocks):
                borrowed = to.debts.borrowed_blocks
                self.send(to, sender, to.loans.reserve(sender.id, number, kv_blocks, now_s))
                assert to.debts.borrowed_blocks == borrowed and not to.asked.keys() - set(range(to.number))
            case Granted(number, blocks):
                if to.asked.get(number) == sender.id:
                    del to.asked[number]
                    to.debts.granted(sender.id, blocks)
            case NotGranted(number, _):
                if to.asked.get(number) == sender.id:
                    del to.asked[number]
            case Fill(borrowed, block, content):
                answer = to.loans.fill(sender.id, block)
                if answer == "write":
                    to.contents[block.kv_block] = content
                self.send(to, sender, Filled(borrowed, block, answer != "refused"))
            case Filled(borrowed, block, accepted):
                self.finish_move(to, sender, borrowed, block, accepted)
            case Release(blocks):
                to.loans.release(sender.id, blocks)
            case Renew(blocks, settled):
                self.send(to, sender, Lost(to.loans.renew(sender.id, blocks, settled, now_s)))
            case Lost(blocks):
                self.lose(to, sender, blocks)

    def finish_move(
        self, debtor: Machine, creditor: Machine, borrowed: int, block: LentBlock, accepted: bool
    ) -> None:
        if debtor.debts.numbers(creditor.id).get(block) != borrowed or borrowed not in debtor.pinned:
            return
        source = debtor.pinned.pop(borrowed)
        debtor.pool.release([source])
        if not accepted:
            debtor.debts.lose([borrowed])
        elif debtor.pool.references(source) == 0 or source not in debtor.table:
            debtor.debts.cancel(borrowed)
            self.return_spent(debtor)
        else:
            debtor.debts.filled(borrowed)
            debtor.pool.move(source, borrowed)
            debtor.table[debtor.table.index(source)] = borrowed
            debtor.moved[borrowed] = self.sent[block, creditor.id]

    def lose(self, debtor: Machine, creditor: Machine, blocks: tuple[LentBlock, ...]) -> None:
        numbers = debtor.debts.numbers(creditor.id)
        gone = [numbers[block] for block in blocks if block in numbers]
        if any(borrowed in debtor.table for borrowed in gone):
            debtor.pool.release(debtor.table)
            debtor.table, debtor.moved = [], {}
        for borrowed in gone:
            if borrowed in debtor.pinned:
                debtor.pool.release([debtor.pinned.pop(borrowed)])
        debtor.debts.lose(gone)

    @invariant()
    def every_book_holds(self) -> None:
        for machine in self.machines:
            machine.check()

    @invariant()
    def what_may_be_read_is_what_was_written(self) -> None:
        for debtor in self.machines:
            for borrowed, content in debtor.moved.items():
                place = debtor.debts.place(borrowed)
                creditor = self.of(place.creditor)
                if creditor.loans.may_read(debtor.id, [place.block]):
                    assert creditor.contents[place.block.kv_block] == content

    def teardown(self) -> None:
        """Once messages get through again, both ends of every debt agree."""
        self.flying = []
        for machine in self.machines:
            machine.asked = {}
        for debtor in self.machines:
            for creditor in self.machines:
                if debtor is not creditor:
                    listed = list(debtor.debts.numbers(creditor.id))
                    lost = creditor.loans.renew(debtor.id, listed, debtor.settled, self.now_s)
                    self.lose(debtor, creditor, lost)
        for debtor in self.machines:
            for creditor in self.machines:
                if debtor is not creditor:
                    told = debtor.debts.borrowed_from().get(creditor.id, 0)
                    assert creditor.loans.lent_to().get(debtor.id, 0) == told, (debtor, creditor)
        self.every_book_holds()
        self.now_s += 100.0
        for machine in self.machines:
            machine.loans.expire(self.now_s)
            assert machine.loans.lent_blocks == 0, "leases reclaim everything"


TestLoans = LoanMachine.TestCase
TestLoans.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def lender(**terms: int) -> LoanBook:
    return LoanBook(KvBlockPool(8, BLOCK_TOKENS), LoanTerms(**({"lendable_blocks": 6} | terms)))


def granted(answer: Granted | NotGranted) -> tuple[LentBlock, ...]:
    assert isinstance(answer, Granted)
    return answer.blocks


def test_two_debtors_cannot_reserve_the_same_space() -> None:
    book = lender()
    first = granted(book.reserve(PeerId("a"), 0, 4, 0.0))
    assert book.reserve(PeerId("b"), 0, 4, 0.0) == NotGranted(0, 2)
    second = granted(book.reserve(PeerId("b"), 1, 2, 0.0))
    assert not set(first) & set(second)


def test_a_reservation_that_comes_twice_is_one_and_one_that_has_ended_stays_ended() -> None:
    book = lender()
    blocks = granted(book.reserve(PeerId("a"), 0, 3, 0.0))
    assert granted(book.reserve(PeerId("a"), 0, 3, 0.0)) == blocks and book.lent_blocks == 3
    book.release(PeerId("a"), blocks)
    book.release(PeerId("a"), blocks)
    assert isinstance(book.reserve(PeerId("a"), 0, 3, 0.0), NotGranted) and book.lent_blocks == 0


def test_a_cap_and_own_growth_bound_what_is_lent() -> None:
    assert isinstance(lender(lendable_blocks=2).reserve(PeerId("a"), 0, 3, 0.0), NotGranted)
    assert isinstance(lender(keep_free_blocks=6).reserve(PeerId("a"), 0, 3, 0.0), NotGranted)


def test_a_block_is_not_read_before_it_is_filled_nor_under_an_old_generation() -> None:
    book = lender(lendable_blocks=1)
    [old] = granted(book.reserve(PeerId("a"), 0, 1, 0.0))
    assert not book.may_read(PeerId("a"), [old])
    assert book.fill(PeerId("a"), old) == "write" and book.may_read(PeerId("a"), [old])
    assert book.fill(PeerId("a"), old) == "filled", "what comes late does not overwrite"
    assert not book.may_read(PeerId("b"), [old])
    assert book.expire(6.0) == 1
    [new] = granted(book.reserve(PeerId("a"), 1, 1, 7.0))
    assert new.kv_block == old.kv_block and new.generation > old.generation
    assert book.fill(PeerId("a"), old) == "refused" and not book.may_read(PeerId("a"), [old])


def test_a_renewal_tells_what_was_lost_and_frees_what_the_debtor_does_not_know() -> None:
    book = lender(lendable_blocks=2)
    old = granted(book.reserve(PeerId("a"), 0, 2, 0.0))
    book.expire(6.0)
    new = granted(book.reserve(PeerId("a"), 1, 2, 7.0))
    assert {block.kv_block for block in old} == {block.kv_block for block in new}
    assert book.renew(PeerId("a"), old, 0, 7.0) == old and book.lent_blocks == 2, "loan 1 is not settled yet"
    assert book.renew(PeerId("a"), old, 1, 7.0) == old and book.lent_blocks == 0


def test_a_recall_names_the_youngest_loans_and_takes_what_does_not_come() -> None:
    book = lender()
    granted(book.reserve(PeerId("a"), 0, 2, 0.0))
    young = granted(book.reserve(PeerId("a"), 1, 2, 0.0))
    [recall] = book.recall(1, 0.0)
    assert recall.number == 1 and set(recall.kv_blocks) == {block.kv_block for block in young}
    assert book.recall(2, 0.0) == (), "what is called back already counts"
    book.renew(PeerId("a"), young, -1, 9.0)
    assert book.expire(10.5) == 2 and book.lent_to() == {PeerId("a"): 2}


@pytest.mark.parametrize("named_first", [True, False])
def test_a_moved_block_keeps_its_holders_and_its_name(named_first: bool) -> None:
    pool = KvBlockPool(4, BLOCK_TOKENS)
    keys: list[bytes] = []
    chain_keys(keys, b"root", [1, 2], 1, BLOCK_TOKENS)
    [source] = pool.allocate(1)
    fork = pool.fork([source])
    pool.publish(source, keys[0])
    copies = pool.allocate(1)
    pool.publish(copies[0], keys[0])
    moving = source if named_first else copies[0]
    [target] = pool.borrow(1)
    pool.move(moving, target)
    tables = [[target], [target], copies] if named_first else [[source], fork, [target]]
    assert pool.references(target) == (2 if named_first else 1)
    assert pool.match(keys) == ([target] if named_first else [source])
    pool.check(tables)
    for table in tables:
        pool.release(table)
    assert pool.free_blocks == 4 and pool.take_unheld() == [target]
    pool.check([[target]])
    pool.forget([target])
    pool.check([])
