# pyright: standard
"""A session several times longer than its machine's KV memory: the tokens of one large machine, whatever moves when."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from span_chain import TINY_BLOCKS, SpanChain, tiny_options

from plait.engine import KvLoans, Partial, PartialAsk, SpanEngine, load_span_engine
from plait.engine.kernel_kv import KernelKvStore
from plait.engine.kv_store import KvStore
from plait.errors import BlocksLost
from plait.ids import PeerId
from plait.kernels import native_available
from plait.kvcache import Granted, KvBlockPool, LoanTerms
from plait.scheduling import Scheduler, StepLimits, policy_named
from plait.session import SamplingParams

DEBTOR = PeerId("debtor")
PROMPT, ANSWER = 100, 60
SMALL_BLOCKS = 4
"""64 tokens: the session has 160."""


needs_kernels = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")
KINDS = {  # how weights are kept and computed with, and keys and values
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


def engine_of(kv_blocks: int, borrowable_blocks: int = 0, kind: str = "float32") -> SpanEngine:
    options = replace(
        tiny_options(
            "float32", 1, step_tokens=48, borrowable_blocks=borrowable_blocks, watermark_fraction=0.0
        ),
        **KINDS[kind],
    )
    engine = load_span_engine(replace(options, kv_cache_bytes=2**20), range(TINY_BLOCKS))
    spec, each = engine.spec, engine.store.extent_bytes
    # Kept inputs are paid from the same memory.
    given = int(kv_blocks * (each + 1.5 * 16 * spec.hidden * 4 + 64))
    engine = load_span_engine(
        replace(options, kv_cache_bytes=given),
        range(TINY_BLOCKS),
        loan_terms=LoanTerms(lendable_blocks=kv_blocks),
    )
    assert engine.store.kv_blocks == kv_blocks
    return engine


def lender_without_weights(like: SpanEngine, kv_blocks: int) -> KvLoans:
    """A machine that has memory for KV blocks and no model: what a CPU can do for a GPU."""
    if isinstance(like.store, KernelKvStore):
        store = KernelKvStore(like.spec, like.blocks, kv_blocks, 16, like.store.kv_format)
    else:
        store = KvStore(like.spec, like.blocks, kv_blocks, 16, like.store.extents.dtype, "cpu")
    pool = KvBlockPool(kv_blocks, 16)
    scheduler = Scheduler(policy_named("paged"), pool, None, StepLimits())
    return KvLoans(like.spec, scheduler, pool, store, LoanTerms(lendable_blocks=kv_blocks))


def loans_of(engines: dict[PeerId, SpanEngine]) -> dict[PeerId, KvLoans]:
    return {peer: engine.loans for peer, engine in engines.items() if engine.loans is not None}


class Neighbours:
    """A debtor and its creditors in one process; what would travel is handed over."""

    def __init__(self, debtor: SpanEngine, creditors: dict[PeerId, KvLoans]) -> None:
        assert debtor.loans is not None
        self.debtor, self.loans, self.creditors = debtor, debtor.loans, creditors
        self.loans.store.remote = self
        self.arriving: list[tuple[int, bool]] = []
        self.number = 0
        self.moved = 0
        self.asked = 0
        self.refused = 0
        self.home = 0
        self.given_up = 0
        self._parts: list[Partial] = []

    def ask(self, asked: PartialAsk) -> "Neighbours":
        self.asked += 1
        self._parts = []
        for share in self.loans.shares(asked):
            creditor = self.creditors.get(share.creditor)
            if creditor is None:
                raise BlocksLost(f"{share.creditor} is gone", kv_blocks=share.numbers)
            try:
                part = creditor.attend(
                    DEBTOR, share.blocks, share.starts, asked.block, asked.position, asked.query
                )
            except BlocksLost as lost:
                self.refused += 1
                raise BlocksLost(lost.message, kv_blocks=share.numbers) from None
            self._parts.append(part)
        return self

    def take(self) -> Sequence[Partial]:
        return self._parts

    def borrow(self, peer: PeerId, kv_blocks: int) -> bool:
        loans = self.creditors[peer]
        answer = loans.book.reserve(DEBTOR, self.number, kv_blocks, 0.0)
        self.number += 1
        if isinstance(answer, Granted):
            self.loans.debts.granted(peer, answer.blocks)
            self.debtor.loans_changed()
        return isinstance(answer, Granted)

    def borrow_what_is_wanted(self, most: int = 99) -> None:
        for peer in self.creditors:
            while (wanted := min(most, self.loans.wanted_blocks())) and self.borrow(peer, wanted):
                pass

    def start_moves(self, kv_blocks: int) -> None:
        for outgoing in self.loans.start_moves(kv_blocks):
            loans = self.creditors[outgoing.place.creditor]
            self.arriving.append(
                (outgoing.borrowed, loans.write(DEBTOR, outgoing.place.block, outgoing.content))
            )

    def finish_moves(self) -> None:
        for borrowed, accepted in self.arriving:
            self.loans.finish_move(borrowed, accepted)
            self.moved += accepted
        self.arriving.clear()
        self.return_spent()
        self.debtor.loans_changed()

    def return_spent(self) -> None:
        for peer, blocks in self.loans.debts.take_spent().items():
            if peer in self.creditors:
                loans = self.creditors[peer]
                loans.book.release(DEBTOR, blocks)

    def return_all(self) -> None:
        self.finish_moves()
        for peer, blocks in self.loans.debts.give_back(99).items():
            if peer in self.creditors:
                loans = self.creditors[peer]
                loans.book.release(DEBTOR, blocks)

    def answer_recall(self, peer: PeerId, kv_blocks: int) -> None:
        """The creditor wants blocks back: what fits goes home, the rest is given up and computed again."""
        loans = self.creditors[peer]
        for recall in loans.book.recall(kv_blocks, 0.0):
            blocks = {block.kv_block: block for block in self.loans.debts.numbers(peer)}
            for kv_block in recall.kv_blocks:
                number = self.loans.debts.numbers(peer)[blocks[kv_block]]
                if number in self.loans.homeward(peer, 99):
                    self.home += self.loans.take_home(number, loans.read(DEBTOR, blocks[kv_block]))
            self.return_spent()
            left = self.loans.debts.numbers(peer)
            rest = [blocks[kv_block] for kv_block in recall.kv_blocks if blocks[kv_block] in left]
            self.given_up += len(rest)
            self.loans.lose([left[block] for block in rest])
            loans.book.release(DEBTOR, rest)
        self.debtor.loans_changed()

    def kill(self, peer: PeerId) -> None:
        """A creditor dies, which its debtor notices when it next asks for what was there."""
        del self.creditors[peer]
        self.arriving = [each for each in self.arriving if self.loans.debts.place(each[0]).creditor != peer]

    def check(self) -> None:
        self.debtor.check()
        for creditor in self.creditors.values():
            creditor.check()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(0).integers(5, 900, PROMPT).tolist()


GREEDY = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=ANSWER, temperature=0.8, seed=11, ignore_eos=True)


@pytest.fixture(
    scope="module",
    params=["float32", *(pytest.param(kind, marks=needs_kernels) for kind in ("bfloat16", "int8", "int4"))],
)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(kind: str, prompt: list[int]) -> dict[str, tuple[int, ...]]:
    chain = SpanChain([engine_of(16, kind=kind)])
    return {
        name: chain.run(chain.open(prompt, sampling)).answer
        for name, sampling in (("greedy", GREEDY), ("seeded", SEEDED))
    }


@pytest.fixture(scope="module")
def machines(kind: str) -> tuple[SpanEngine, dict[PeerId, SpanEngine]]:
    return engine_of(SMALL_BLOCKS, 20, kind), {
        PeerId(name): engine_of(kv_blocks, kind=kind) for name, kv_blocks in (("b", 7), ("c", 8))
    }


def drive(
    chain: SpanChain, near: Neighbours, id, *, every: int, first: int, rate: int, kill_at: int = -1
) -> tuple:
    """One session to its end; blocks leave before step `first` and every `every` steps, and arrive a step later."""
    asked, start, step = chain.asked[id], 0, 0
    while not asked.ended:
        chain.feed(id, start)
        while near.debtor.has_work:
            near.finish_moves()
            near.borrow_what_is_wanted(most=2)
            if step >= first and (step - first) % every == 0:
                near.start_moves(rate)
            if step == kill_at:
                near.kill(next(iter(near.creditors)))
            chain.step(0)
            chain.arrive(0)
            near.check()
            step += 1
            assert step < 2000, "the session stands still"
        start = len(asked.token_ids) - 1
    chain.close(id)
    near.return_all()
    return asked.answer


numbers = iter(range(0, 10**6, 1000))
"""Loans are numbered upwards over all tests of these machines."""


def check_all_is_home(near: Neighbours, creditors: dict[PeerId, SpanEngine]) -> None:
    near.check()
    assert near.loans.debts.borrowed_blocks == 0
    for engine in creditors.values():
        assert engine.loans is not None and engine.loans.book.lent_blocks == 0
        engine.check()


def check_moves(machines, prompt, expected, first: int, every: int, rate: int) -> None:
    debtor, creditors = machines
    chain, near = SpanChain([debtor]), Neighbours(debtor, loans_of(creditors))
    near.number = next(numbers)
    answer = drive(chain, near, chain.open(prompt, GREEDY), every=every, first=first, rate=rate)
    assert answer == expected["greedy"]
    assert near.moved >= 6 and near.asked > ANSWER
    check_all_is_home(near, creditors)


@pytest.mark.parametrize(("first", "every", "rate"), [(0, 1, 1), (7, 4, 3)])
def test_a_long_session_on_a_small_machine_has_the_tokens_of_a_large_one(
    machines, prompt, expected, first: int, every: int, rate: int
) -> None:
    check_moves(machines, prompt, expected, first, every, rate)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 40))
@pytest.mark.parametrize(("every", "rate"), [(1, 1), (4, 3), (17, 1)])
def test_blocks_may_move_at_every_step(machines, prompt, expected, first: int, every: int, rate: int) -> None:
    check_moves(machines, prompt, expected, first, every, rate)


@pytest.mark.parametrize("kill_at", [9, 40])
def test_a_creditor_that_dies_costs_a_recomputation_and_no_token(
    machines, prompt, expected, kill_at: int
) -> None:
    debtor, creditors = machines
    chain, near = SpanChain([debtor]), Neighbours(debtor, loans_of(creditors))
    near.number = next(numbers)
    before = debtor.load().preemptions_total
    answer = drive(chain, near, chain.open(prompt, SEEDED), every=1, first=0, rate=2, kill_at=kill_at)
    assert answer == expected["seeded"]
    assert debtor.load().preemptions_total > before and PeerId("b") not in near.creditors
    dead = creditors[PeerId("b")].loans
    assert dead is not None and dead.book.lent_blocks
    dead.book.expire(1000.0)
    check_all_is_home(near, creditors)


def test_a_debtor_that_comes_back_after_its_lease_reads_nothing_of_others(machines, prompt, expected) -> None:
    """Its blocks went to somebody else meanwhile: it is refused, loses them, and computes again."""
    debtor, creditors = machines
    chain, near = SpanChain([debtor]), Neighbours(debtor, loans_of(creditors))
    near.number = next(numbers)
    id = chain.open(prompt, GREEDY)
    asked = chain.asked[id]
    chain.feed(id, 0)
    for _ in range(12):
        near.borrow_what_is_wanted()
        near.start_moves(2)
        near.finish_moves()
        if debtor.has_work:
            chain.step(0)
    loans = creditors[PeerId("b")].loans
    assert loans is not None and loans.book.expire(100.0)
    strangers = [
        block
        for number in range(7)
        if isinstance(answer := loans.book.reserve(PeerId("stranger"), number, 1, 100.0), Granted)
        for block in answer.blocks
    ]
    content = torch.full(loans.store.extents.shape[1:], 7, dtype=loans.store.extents.dtype)
    assert strangers and all(loans.write(PeerId("stranger"), block, content) for block in strangers)
    chain.arrive(0)
    while not asked.ended:
        if not debtor.has_work:
            chain.feed(id, len(asked.token_ids) - 1)
        near.borrow_what_is_wanted()
        near.start_moves(2)
        near.finish_moves()
        chain.step(0)
        chain.arrive(0)
        near.check()
    assert asked.answer == expected["greedy"] and near.refused
    chain.close(id)
    near.return_all()
    assert loans.book.forget(PeerId("stranger")) == len(strangers)
    check_all_is_home(near, creditors)


def test_a_creditor_that_wants_its_memory_back_gets_it_and_no_token_changes(
    machines, prompt, expected
) -> None:
    debtor, creditors = machines
    chain, near = SpanChain([debtor]), Neighbours(debtor, loans_of(creditors))
    near.number = next(numbers)
    id = chain.open(prompt, SEEDED)
    asked, steps = chain.asked[id], 0
    chain.feed(id, 0)
    while not asked.ended:
        near.finish_moves()
        near.borrow_what_is_wanted(most=3)
        near.start_moves(2)
        if debtor.has_work:
            chain.step(0)
            chain.arrive(0)
        elif not asked.ended:
            chain.feed(id, len(asked.token_ids) - 1)
        steps += 1
        if steps in (20, 50):
            near.finish_moves()
            near.answer_recall(PeerId("b"), 2)
        near.check()
    assert asked.answer == expected["seeded"]
    assert near.home + near.given_up >= 2, (near.home, near.given_up)
    chain.close(id)
    near.return_all()
    check_all_is_home(near, creditors)


def test_two_machines_may_lend_to_each_other(kind, prompt, expected) -> None:
    """Each has lent what it then has to borrow; both answers are right, and nobody waits for the other."""
    engines = {PeerId(name): engine_of(8, 20, kind) for name in ("one", "two")}
    sides: list[tuple[SpanChain, Neighbours]] = []
    for place, (name, engine) in enumerate(engines.items()):
        others = {peer: other for peer, other in engines.items() if peer != name}
        near = Neighbours(engine, loans_of(others))
        near.number = place
        sides.append((SpanChain([engine]), near))
    for (_, near), peer in zip(sides, reversed(engines), strict=True):
        assert near.borrow(peer, 3)
    ids = [chain.open(prompt, sampling) for (chain, _), sampling in zip(sides, (GREEDY, SEEDED), strict=True)]
    for (chain, _), id in zip(sides, ids, strict=True):
        chain.feed(id, 0)
    for (chain, near), id, name in zip(sides, ids, ("greedy", "seeded"), strict=True):
        asked = chain.asked[id]
        while not asked.ended:
            near.finish_moves()
            near.borrow_what_is_wanted()
            near.start_moves(2)
            if near.debtor.has_work:
                chain.step(0)
                chain.arrive(0)
            else:
                chain.feed(id, len(asked.token_ids) - 1)
        assert asked.answer == expected[name]
        chain.close(id)
        near.return_all()
    for _, near in sides:
        check_all_is_home(near, engines)


def test_a_creditor_needs_no_weights(machines, prompt, expected) -> None:
    """Memory and the model's shape are enough: it could not compute a token itself."""
    debtor, _ = machines
    lender = lender_without_weights(debtor, 12)
    chain, near = SpanChain([debtor]), Neighbours(debtor, {PeerId("memory"): lender})
    answer = drive(chain, near, chain.open(prompt, GREEDY), every=1, first=0, rate=2)
    assert answer == expected["greedy"] and near.moved >= 6
    near.check()
    lender.check()
    assert lender.book.lent_blocks == near.loans.debts.borrowed_blocks == 0


def test_who_shared_the_step_of_a_loss_goes_on_as_if_nothing_had_been(machines, prompt, expected) -> None:
    debtor, creditors = machines
    chain, near = SpanChain([debtor]), Neighbours(debtor, loans_of(creditors))
    near.number = next(numbers)
    alone = SpanChain([creditors[PeerId("c")]])
    short = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    wanted = alone.run(alone.open(prompt[:5], short)).answer
    long_id = chain.open(prompt, GREEDY)
    chain.feed(long_id, 0)
    while len(chain.asked[long_id].token_ids) < PROMPT + 4 or not debtor.has_work:
        near.finish_moves()
        near.borrow_what_is_wanted()
        near.start_moves(2)
        if debtor.has_work:
            chain.step(0)
        if chain.arrive(0):
            chain.feed(long_id, len(chain.asked[long_id].token_ids) - 1)
    near.finish_moves()
    near.kill(PeerId("b"))
    short_id = chain.open(prompt[:5], short)
    chain.feed(short_id, 0)
    before = debtor.load().preemptions_total
    for _ in range(500):
        if all(asked.ended for asked in chain.asked.values()):
            break
        near.borrow_what_is_wanted()
        near.start_moves(2)
        near.finish_moves()
        chain.step(0)
        for id in chain.arrive(0):
            if not chain.asked[id].ended:
                chain.feed(id, len(chain.asked[id].token_ids) - 1)
        near.check()
    assert debtor.load().preemptions_total > before
    assert chain.asked[short_id].answer == wanted and chain.asked[long_id].answer == expected["greedy"]
    for id in (long_id, short_id):
        chain.close(id)
    near.return_all()
    dead = creditors[PeerId("b")].loans
    assert dead is not None
    dead.book.expire(1000.0)
    check_all_is_home(near, creditors)
