"""One instance among those that lend each other KV memory: creditor, debtor, and for one of them manager of the ledger.

Events in, actions out: `LendingAgent` performs nothing but bookkeeping in the pool and the scheduler of its instance.
The live worker (worker/lending.py) and the simulator drive the same agent. All its methods are called between steps of
its instance, and what they return is carried out in order, at once.

    agent(d) ──beat──▶ manager ◀──beat── agent(c)        the manager is the group's smallest peer that is not gone
    agent(d) ──want──▶ manager ──candidates──▶ agent(d) ──reserve──▶ agent(c) ──grant──▶ agent(d)
    agent(d) ──content──▶ agent(c) ──stored──▶ agent(d): between two steps, its tables name the borrowed block

Infinite-LLM (Lin et al. 2024) for the roles; leases, fencing and the choice of the manager are ours.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from plait.ids import PeerId, RequestId
from plait.kvcache.block_loans import BlockLoans, LendingFacts
from plait.kvcache.lending_actions import (
    LendingAction,
    LendingCounts,
    LendingOptions,
    LoansChanged,
    Send,
    SendContent,
    WriteContent,
)
from plait.kvcache.lending_debtor import DebtorSide, blocks_of, wire_blocks
from plait.kvcache.lending_plan import LayerTimes, StepSample, fit_layer_times
from plait.kvcache.loan_book import Granted, LentBlock, Recall
from plait.kvcache.loan_manager import LoanManager, wire_changes, wire_times
from plait.wire import (
    MAX_BEAT_CHANGES,
    MAX_LOAN_BLOCKS,
    BlockAsk,
    BlockContent,
    BlockGone,
    BlockStored,
    BlockTold,
    HomeOrder,
    LoanBeat,
    LoanBeatAsk,
    LoanBooking,
    LoanCandidates,
    LoanGrant,
    LoanKeep,
    LoanLost,
    LoanNo,
    LoanRecall,
    LoanRelease,
    LoanRenew,
    LoanReserve,
    LoanWant,
    MoveOrder,
    WireBlocks,
    YieldOrder,
)

GONE_S = 5.0
"""How long a peer that was lost is not thought of as manager, though records still name it."""
MEASURED_STEPS = 64
FEW_STEPS = 8
_FIT_EVERY = 16
_LONGEST_HOLD_S = 30.0

Actions = tuple[LendingAction, ...]


class LendingAgent:
    """The lending of one instance; see the head of this file.

    `first_number`: above all numbers that this peer ever used for loans and heartbeats, so that what it sent before a
    restart is told from what it sends now. `layers`: blocks of the model that the instance computes.
    """

    def __init__(
        self,
        peer: PeerId,
        loans: BlockLoans,
        options: LendingOptions,
        *,
        first_number: int = 0,
        layers: int = 1,
    ) -> None:
        self.peer = peer
        self.loans = loans
        self.options = options
        self.counts = LendingCounts()
        self._layers = layers
        self._debtor = DebtorSide(loans, options, self.counts, first_number=first_number)
        self._group: tuple[PeerId, ...] = (peer,)
        self._one_way_s: Mapping[PeerId, float] = {}
        self._gone: dict[PeerId, float] = {}
        self._manages: LoanManager | None = None
        self._told_manager: PeerId | None = None
        self._told: dict[tuple[RequestId, PeerId], int] = {}
        self._beat_number = first_number
        self._beat_s = float("-inf")
        self._renew: dict[PeerId, None] = {}
        self._samples: deque[StepSample] = deque(maxlen=MEASURED_STEPS)
        self._unfitted = 0
        self._times: LayerTimes | None = None
        self._decoding = False
        self._starved = False
        self._stepped = False
        self._leaving = False
        self._held_until_s = float("-inf")
        self._yields = 0

    # -- what it is asked ------------------------------------------------------------------------------------

    def manager(self, now_s: float) -> PeerId:
        """Whom this instance takes for the manager now; maybe itself."""
        return min(
            (each for each in self._group if each == self.peer or self._gone.get(each, now_s) <= now_s),
        )

    @property
    def creditors(self) -> list[PeerId]:
        """Whom it has borrowed from."""
        return list(self.loans.debts.borrowed_from())

    def may_read(self, peer: PeerId, blocks: Iterable[LentBlock]) -> bool:
        """Whether all of these are lent to that peer and filled; allowed at any time."""
        return self.loans.book.may_read(peer, blocks)

    def heard(self, peer: PeerId, now_s: float) -> None:
        """A peer has asked for what it has borrowed; allowed at any time."""
        self.loans.book.hear(peer, now_s)

    # -- what happens ----------------------------------------------------------------------------------------

    def set_group(self, peers: Sequence[PeerId], one_way_s: Mapping[PeerId, float], now_s: float) -> Actions:
        """Who lends the same blocks to each other, and how far they are, where that is known."""
        self._group = tuple(sorted({*peers, self.peer}))
        self._one_way_s = {peer: one_way_s[peer] for peer in self._group if peer in one_way_s}
        return self._done(self._see_manager(now_s), now_s)

    def on_gone(self, peer: PeerId, now_s: float) -> Actions:
        """The link to a peer is lost: what it lent is, too. What it borrowed is its own until its lease runs out."""
        self._gone[peer] = now_s + GONE_S
        if peer in self.creditors:
            self._renew[peer] = None
        return self._done(self._debtor.creditor_gone(peer, now_s), now_s)

    def on_message(self, peer: PeerId, message: LoanBooking, now_s: float) -> Actions:
        """A peer says something; content has been checked to be one block of this pool."""
        return self._done(self._hear(peer, message, now_s), now_s)

    def on_tick(self, now_s: float) -> Actions:
        """Time has passed; call it at least every `heartbeat_s`."""
        return self._done(self._tick(now_s), now_s)

    def before_step(self, now_s: float) -> Actions:
        """A step is about to be run: blocks may begin to leave beside it."""
        self._stepped = True
        self._debtor.allow_step(self._decoding)
        return self._done(iter(()), now_s)

    def after_step(self, sample: StepSample | None, starved: bool, now_s: float) -> Actions:
        """A step is over: `sample` if it only decoded; `starved` if the first request could not go on for want of
        blocks."""
        self._decoding = sample is not None and not starved
        self._starved = starved
        if sample is not None:
            self._samples.append(sample)
            self._unfitted += 1
        if not self._decoding:
            self._debtor.allow_step(False)
        return self._done(self._search(now_s), now_s)

    def leave(self, now_s: float) -> Actions:
        """Lend no more, call back what is lent, return what is borrowed and empty."""
        self._leaving = True
        return self._done(self._leave(now_s), now_s)

    def part(self, now_s: float) -> Actions:
        """This instance stops: all that it borrowed goes back, and all that it lent is called back in vain."""
        self._leaving = True
        return tuple(self._own(self._debtor.give_up(), now_s))

    def holders(self) -> list[list[int]]:
        """Who holds blocks of the pool besides the scheduler."""
        return self.loans.holders()

    def check(self) -> None:
        """Assert that the books agree with themselves."""
        self.loans.check()

    # -- parts of the above ----------------------------------------------------------------------------------

    def _done(self, actions: Iterator[LendingAction], now_s: float) -> Actions:
        """What these do, and what can be moved after them; orders to oneself are followed at once."""
        done = list(self._own(actions, now_s))
        done += self._debtor.move(now_s)
        return tuple(done)

    def _own(self, actions: Iterator[LendingAction], now_s: float) -> Iterator[LendingAction]:
        for action in actions:
            if isinstance(action, Send) and action.peer == self.peer:
                yield from self._own(self._hear(self.peer, action.message, now_s), now_s)
            else:
                if isinstance(action, Send) and isinstance(action.message, LoanReserve | LoanRelease):
                    self._renew[action.peer] = (
                        None  # if it is lost, or its answer: the renewal says what is so
                    )
                yield action

    def _hear(self, peer: PeerId, message: LoanBooking, now_s: float) -> Iterator[LendingAction]:
        debtor = self._debtor
        match message:
            case LoanBeat() | LoanWant():
                return self._manage(peer, message, now_s)
            case LoanReserve() | BlockContent() | BlockAsk() | LoanRelease() | LoanRenew():
                return self._lend(peer, message, now_s)
            case LoanBeatAsk():
                self._told_manager = None
                return self._see_manager(now_s)
            case LoanCandidates(number, creditors):
                others = [each for each in creditors if each != self.peer and each in self._group]
                return debtor.candidates(number, others, now_s)
            case LoanGrant():
                return debtor.granted(peer, message, now_s)
            case LoanNo():
                return debtor.refused(peer, message, now_s)
            case BlockStored():
                return debtor.stored(peer, message)
            case BlockTold():
                return debtor.told(peer, message)
            case BlockGone():
                return debtor.gone(peer, message)
            case LoanLost(blocks):
                return debtor.lost(peer, blocks_of(blocks))
            case LoanRecall():
                return debtor.recall(peer, message, now_s)
            case MoveOrder(_, creditor, kv_blocks):
                if peer == self.manager(now_s) and creditor != self.peer and creditor in self._group:
                    return debtor.order(creditor, kv_blocks, now_s)
            case HomeOrder(creditor, kv_blocks):
                if peer == self.manager(now_s):
                    debtor.bring_home(creditor, kv_blocks)
            case YieldOrder():
                if peer == self.manager(now_s):
                    return self._yield(now_s)
            case LoanKeep():
                self.loans.book.hear(peer, now_s)
        return iter(())

    # -- as creditor -----------------------------------------------------------------------------------------

    def _lend(
        self,
        peer: PeerId,
        message: LoanReserve | BlockContent | BlockAsk | LoanRelease | LoanRenew,
        now_s: float,
    ) -> Iterator[LendingAction]:
        book = self.loans.book
        book.hear(peer, now_s)
        match message:
            case LoanReserve(number, kv_blocks):
                if self._leaving or peer not in self._group or peer == self.peer:
                    yield Send(peer, LoanNo(number, 0))
                    return
                self.loans.let_go()
                answer = book.reserve(peer, number, kv_blocks, now_s)
                self._keep_free(now_s)
                if isinstance(answer, Granted):
                    yield Send(peer, LoanGrant(number, wire_blocks(answer.blocks)))
                else:
                    yield Send(peer, LoanNo(number, answer.lendable_blocks))
            case BlockContent(kv_block, generation):
                filled = book.fill(peer, LentBlock(kv_block, generation))
                if filled == "write":
                    yield WriteContent(kv_block)
                yield Send(peer, BlockStored(kv_block, generation, filled != "refused"))
            case BlockAsk(kv_block, generation):
                if book.may_read(peer, [LentBlock(kv_block, generation)]):
                    yield SendContent(peer, BlockTold(kv_block, generation), kv_block)
                else:
                    yield Send(peer, BlockGone(kv_block, generation))
            case LoanRelease(blocks):
                book.release(peer, blocks_of(blocks))
                yield LoansChanged()
            case LoanRenew(blocks, settled):
                lost = book.renew(peer, blocks_of(blocks), settled, now_s)
                if lost:
                    yield Send(peer, LoanLost(wire_blocks(lost)))
                yield LoansChanged()

    def _recall(self, kv_blocks: int, now_s: float) -> Iterator[LendingAction]:
        for recall in self.loans.book.recall(kv_blocks, now_s):
            self.counts.recalled_total += len(recall.kv_blocks)
            yield Send(recall.debtor, LoanRecall(self._named(recall), self.loans.book.terms.recall_s))

    def _named(self, recall: Recall) -> WireBlocks:
        return wire_blocks(map(self.loans.book.named, recall.kv_blocks))

    def _yield(self, now_s: float) -> Iterator[LendingAction]:
        """Compute again later what uses borrowed blocks or starves, and keep the memory for others for a while."""
        yield from self._debtor.give_up()
        self.loans.scheduler.give_way()
        self._yields = 1 if now_s - self._held_until_s > 2 * _LONGEST_HOLD_S else self._yields + 1
        hold_s = min(_LONGEST_HOLD_S, 2 * self.options.manage_s * 2 ** min(self._yields - 1, 10))
        self._held_until_s = now_s + hold_s
        self._keep_free(now_s)
        yield LoansChanged()

    def _keep_free(self, now_s: float) -> None:
        """While it yields, what could be lent is lent or stays free: nobody here takes it meanwhile."""
        if now_s < self._held_until_s:
            self.loans.keep()

    def _leave(self, now_s: float) -> Iterator[LendingAction]:
        yield from self._recall(self.loans.book.lent_blocks, now_s)
        yield from self._debtor.return_empty()

    # -- as manager ------------------------------------------------------------------------------------------

    def _manage(self, peer: PeerId, message: LoanBeat | LoanWant, now_s: float) -> Iterator[LendingAction]:
        if peer not in self._group or self.manager(now_s) != self.peer:
            return
        manages = self._ledger()
        if isinstance(message, LoanWant):
            yield Send(peer, manages.candidates(peer, message))
            return
        ask = manages.hear(peer, message, now_s)
        if ask is not None:
            yield Send(peer, ask)

    def _ledger(self) -> LoanManager:
        if self._manages is None:
            self._manages = LoanManager(self.options, self.loans.pool.block_tokens)
        return self._manages

    def _see_manager(self, now_s: float) -> Iterator[LendingAction]:
        """Tell a new manager everything at once."""
        manager = self.manager(now_s)
        if manager != self.peer:
            self._manages = None
        if manager != self._told_manager:
            yield self._beat(manager)

    # -- time passes -----------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> Iterator[LendingAction]:
        if not self._stepped:  # nothing computes that moves could slow down
            self._debtor.allow_step(False)
        self._stepped = False
        expired = self.loans.book.expire(now_s)
        self.counts.expired_total += expired
        if expired:
            yield LoansChanged()
        yield from self._debtor.tick(now_s)
        yields = now_s < self._held_until_s
        if not yields and self.loans.kept_blocks:
            self.loans.let_go()
            yield LoansChanged()
        yield from self._search(now_s)
        manager = self.manager(now_s)
        short = self.loans.scheduler.short_blocks() - self.loans.pool.promised_blocks
        may_borrow = self.loans.scheduler.borrowable_blocks > self.loans.debts.borrowed_blocks
        if (
            not yields
            and short > 0
            and self.loans.book.lent_blocks
            and (self._debtor.hunts_in_vain or not may_borrow)
        ):
            yield from self._recall(short, now_s)
        if now_s - self._beat_s >= self.options.heartbeat_s:
            self._beat_s = now_s
            yield self._beat(manager)
            for creditor in dict.fromkeys([*self.creditors, *self._renew]):
                yield Send(creditor, self._debtor.renewal(creditor))
            self._renew.clear()
        if manager == self.peer:
            for peer, order in self._ledger().orders(now_s):
                yield Send(peer, order)

    def _search(self, now_s: float) -> Iterator[LendingAction]:
        """Look for memory, if some is wanted."""
        yields = self._leaving or now_s < self._held_until_s
        planned = self.options.policy == "plan" and not self._starved
        wanted = 0 if yields or planned else self._debtor.wanted_blocks()
        manager = self.manager(now_s)
        return self._debtor.search(min(wanted, MAX_LOAN_BLOCKS), manager, self._one_way_s, now_s)

    def _beat(self, manager: PeerId) -> Send:
        """A heartbeat, whole for who has not had one before."""
        whole = manager != self._told_manager
        if whole:
            self._told.clear()
        self._told_manager = manager
        self._beat_number += 1
        book, debts, pool = self.loans.book, self.loans.debts, self.loans.pool
        facts = self.loans.scheduler.lending_facts()
        placed = self._placement(facts)
        there = sum(blocks for (_, holder), blocks in placed.items() if holder != self.peer)
        here_tokens = max(0, facts.computed_tokens - there * pool.block_tokens)
        spare = min(pool.free_blocks, -facts.short_blocks) - int(self.options.spare_fraction * pool.kv_blocks)
        message = LoanBeat(
            number=self._beat_number,
            whole=whole,
            kv_blocks=pool.kv_blocks,
            free_blocks=pool.free_blocks,
            lendable_blocks=0 if self._leaving else book.lendable_blocks + self.loans.kept_blocks,
            starving=_wire_order(facts.starving_order),
            spare_blocks=0 if facts.waiting else max(0, spare),
            running=facts.running,
            waiting=facts.waiting,
            attended_tokens=here_tokens + book.lent_blocks * pool.block_tokens,
            mean_request_tokens=facts.mean_request_tokens,
            lent=book.lent_to(),
            borrowed=debts.borrowed_from(),
            changes=wire_changes(self._told, placed, MAX_BEAT_CHANGES),
            times=wire_times(self._fitted()),
        )
        return Send(manager, message)

    def _placement(self, facts: LendingFacts) -> dict[tuple[RequestId, PeerId], int]:
        """How many blocks of its longest requests lie where."""
        placed: dict[tuple[RequestId, PeerId], int] = {}
        for request in facts.requests:
            for kv_block in request.kv_blocks:
                own = self.loans.pool.is_own(kv_block)
                holder = self.peer if own else self.loans.debts.place(kv_block).creditor
                key = request.id, holder
                placed[key] = placed.get(key, 0) + 1
        return placed

    def _fitted(self) -> LayerTimes | None:
        """Times of a layer, fitted anew now and then."""
        if len(self._samples) >= FEW_STEPS and self._unfitted >= _FIT_EVERY * (self._times is not None):
            self._unfitted = 0
            self._times = fit_layer_times(self._samples, self._layers)
        return self._times


def _wire_order(order: int | None) -> int | None:
    """A priority in what a message has room for: sessions' begin with a time, and all are of one length."""
    return None if order is None else order >> max(0, order.bit_length() - 62)
