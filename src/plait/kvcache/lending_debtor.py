"""The debtor's half of lending: it looks for memory, moves blocks out and home, and gives back what it does not need.

    wanted ─▶ hunt (loan_hunt.py), or an order to borrow ─▶ granted: empty ─▶ content sent ─▶ stored: tables name it
    spare memory, ordered home, or called back ─▶ content asked for ─▶ told: an own block again, the borrowed one spent

Whatever is lost on the way is repeated until `LOST_AFTER` answers' time has passed; then the block counts as lost. All
repeats are harmless: a creditor fills a block once and answers as before.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.ids import PeerId
from plait.kvcache.block_loans import BlockLoans
from plait.kvcache.debt_book import RemoteBlock
from plait.kvcache.lending_actions import (
    LendingAction,
    LendingCounts,
    LendingOptions,
    LoansChanged,
    Send,
    SendContent,
    WriteContent,
)
from plait.kvcache.loan_book import LentBlock
from plait.kvcache.loan_hunt import (
    AskCreditor,
    AskManager,
    Candidates,
    HuntEvent,
    LoanGranted,
    LoanHunt,
    LoanRefused,
    PeerGone,
    TimePassed,
    Wanted,
    on_hunt_event,
)
from plait.wire import (
    MAX_LOAN_BLOCKS,
    BlockAsk,
    BlockContent,
    BlockGone,
    BlockStored,
    BlockTold,
    LoanGrant,
    LoanNo,
    LoanRecall,
    LoanRelease,
    LoanRenew,
    LoanReserve,
    LoanWant,
    WireBlocks,
)

MAX_IN_FLIGHT = 32
"""Blocks that are on their way out, and as many home."""
AHEAD_BLOCKS = 8
"""Least that is asked for: a session that grows needs one after the other, and each question is a round trip."""
LOST_AFTER = 5
"""Times `answer_within_s` until content that nobody acknowledged is lost."""


@dataclass(slots=True)
class _Flight:
    """Content on its way, out or home: since when, and when it was last asked for or sent."""

    place: RemoteBlock
    since_s: float
    sent_s: float


class DebtorSide:
    """What one instance borrows. Every method says what is to be done next, in order."""

    def __init__(
        self, loans: BlockLoans, options: LendingOptions, counts: LendingCounts, *, first_number: int
    ) -> None:
        self.counts = counts
        self._loans = loans
        self._debts = loans.debts
        self._options = options
        self._hunt = LoanHunt(next_number=first_number, answer_within_s=options.answer_within_s)
        self._ordered: dict[int, tuple[PeerId, int, float]] = {}
        self._ordered_moves = 0
        self._out: dict[int, _Flight] = {}
        self._home: dict[int, _Flight] = {}
        self._home_orders: dict[PeerId, int] = {}
        self._recalled: dict[RemoteBlock, float] = {}
        self._allowance_tokens = 0
        self._idle_since_s: float | None = None

    # -- what it looks for ---------------------------------------------------------------------------------

    @property
    def hunts_in_vain(self) -> int:
        """Hunts in a row that found nothing."""
        return self._hunt.failures

    def wanted_blocks(self) -> int:
        """What it lacks, and what it must bring home while nothing is free for it."""
        called_back = sum(
            number is not None and self._debts.is_filled(number)
            for number in map(self._debts.number_of, self._recalled)
        )
        most = min(self._loans.scheduler.borrowable_blocks, MAX_LOAN_BLOCKS) - self._debts.borrowed_blocks
        short = self._loans.scheduler.short_blocks()
        lacking = short - self._loans.pool.promised_blocks + called_back
        return max(0, min(most, max(lacking, AHEAD_BLOCKS) if lacking > 0 else 0))

    def hunt(
        self, event: HuntEvent, manager: PeerId | None, one_way_s: Mapping[PeerId, float], now_s: float
    ) -> Iterator[LendingAction]:
        """Carry the search for memory on."""
        before = self._hunt.failures
        self._hunt, asked = on_hunt_event(self._hunt, event, now_s)
        self.counts.hunts_in_vain_total += self._hunt.failures > before
        for action in asked:
            match action:
                case AskManager(number, kv_blocks):
                    if manager is not None:
                        yield Send(manager, LoanWant(number, kv_blocks, dict(one_way_s)))
                case AskCreditor(creditor, number, kv_blocks):
                    yield Send(creditor, LoanReserve(number, kv_blocks))

    def search(
        self, wanted: int, manager: PeerId | None, one_way_s: Mapping[PeerId, float], now_s: float
    ) -> Iterator[LendingAction]:
        """Want so many blocks, and look at the clock."""
        yield from self.hunt(TimePassed(), manager, one_way_s, now_s)
        yield from self.hunt(Wanted(wanted), manager, one_way_s, now_s)

    def candidates(self, number: int, creditors: Sequence[PeerId], now_s: float) -> Iterator[LendingAction]:
        return self.hunt(Candidates(number, tuple(creditors)), None, {}, now_s)

    def order(self, creditor: PeerId, kv_blocks: int, now_s: float) -> Iterator[LendingAction]:
        """Borrow at a creditor that the manager named."""
        most = min(self._loans.scheduler.borrowable_blocks, MAX_LOAN_BLOCKS) - self._debts.borrowed_blocks
        kv_blocks = min(kv_blocks, most)
        if kv_blocks > 0:
            number = self._hunt.next_number
            self._hunt = replace(self._hunt, next_number=number + 1)
            self._ordered[number] = creditor, kv_blocks, now_s + self._options.answer_within_s
            yield Send(creditor, LoanReserve(number, kv_blocks))

    def granted(self, peer: PeerId, grant: LoanGrant, now_s: float) -> Iterator[LendingAction]:
        """What was asked for is lent; what was given up meanwhile is not taken, as the next renewal says."""
        number = grant.number
        if self._hunt.asked_creditor == (peer, number):
            asked = self._hunt.asked_blocks
            yield from self.hunt(LoanGranted(peer, number), None, {}, now_s)
        elif self._ordered.get(number, ("",))[0] == peer:
            asked = self._ordered.pop(number)[1]
            self._ordered_moves += asked
        else:
            return
        self._debts.granted(peer, blocks_of(grant.blocks)[:asked])
        self.counts.granted_total += 1
        self._idle_since_s = None
        yield LoansChanged()

    def refused(self, peer: PeerId, answer: LoanNo, now_s: float) -> Iterator[LendingAction]:
        self.counts.refused_total += 1
        self._ordered.pop(answer.number, None)
        return self.hunt(LoanRefused(peer, answer.number, answer.lendable_blocks), None, {}, now_s)

    # -- blocks on their way -------------------------------------------------------------------------------

    def allow_step(self, decoding: bool) -> None:
        """A step follows: so much may leave and come home beside it."""
        block_tokens = self._loans.pool.block_tokens
        if not decoding:
            self._allowance_tokens = MAX_IN_FLIGHT * block_tokens
            return
        rate = self._options.moved_tokens_per_step
        left = min(self._allowance_tokens, block_tokens - 1)
        self._allowance_tokens = left + rate

    def move(self, now_s: float) -> Iterator[LendingAction]:
        """Begin to bring home and to move out what should go, as far as that is allowed now."""
        block_tokens = self._loans.pool.block_tokens
        for number in self._homeward():
            if self._allowance_tokens < block_tokens or len(self._home) >= MAX_IN_FLIGHT:
                break
            self._allowance_tokens -= block_tokens
            yield self._ask_home(number, now_s)
        short = self._loans.scheduler.short_blocks()
        needed = max(0, short - len(self._out)) + self._ordered_moves
        room = min(needed, self._allowance_tokens // block_tokens, MAX_IN_FLIGHT - len(self._out))
        begun = self._loans.begin_moves(room) if room > 0 else []
        self._ordered_moves = max(0, self._ordered_moves - len(begun))
        for each in begun:
            self._allowance_tokens -= block_tokens
            self._idle_since_s = None
            self._out[each.borrowed] = _Flight(each.place, now_s, now_s)
            yield _content(each.place, each.source)

    def stored(self, peer: PeerId, answer: BlockStored) -> Iterator[LendingAction]:
        """A creditor has the content, or refused it."""
        place = RemoteBlock(peer, LentBlock(answer.kv_block, answer.generation))
        number = self._debts.number_of(place)
        if number is None or self._loans.source_of(number) is None:
            return
        self._out.pop(number, None)
        self._loans.finish_move(number, answer.accepted)
        self.counts.moved_out_total += answer.accepted
        self.counts.lost_total += not answer.accepted
        yield LoansChanged()
        yield from self.return_spent()

    def told(self, peer: PeerId, answer: BlockTold) -> Iterator[LendingAction]:
        """Content has come home."""
        place = RemoteBlock(peer, LentBlock(answer.kv_block, answer.generation))
        number = self._debts.number_of(place)
        if number is None or self._home.pop(number, None) is None:
            return
        own = self._loans.bring_home(number)
        if own is not None:
            self.counts.moved_home_total += 1
            yield WriteContent(own)
            yield LoansChanged()
        yield from self.return_spent()

    def gone(self, peer: PeerId, answer: BlockGone) -> Iterator[LendingAction]:
        """A creditor has no such block of ours."""
        return self.lost(peer, [LentBlock(answer.kv_block, answer.generation)])

    def lost(self, peer: PeerId, blocks: Iterable[LentBlock]) -> Iterator[LendingAction]:
        """A creditor says that these are not, or no more, lent to this debtor."""
        found = [self._debts.number_of(RemoteBlock(peer, block)) for block in blocks]
        numbers = [number for number in found if number is not None]
        if numbers:
            self.counts.lost_total += len(numbers)
            self._loans.lose(numbers)
            yield LoansChanged()
            yield from self.return_spent()

    def recall(self, peer: PeerId, recall: LoanRecall, now_s: float) -> Iterator[LendingAction]:
        """A creditor wants blocks back, by then."""
        for block in blocks_of(recall.blocks):
            place = RemoteBlock(peer, block)
            if self._debts.number_of(place) is not None:
                self._recalled[place] = now_s + recall.within_s
        yield from self._answer_recalls(now_s)

    def bring_home(self, creditor: PeerId, kv_blocks: int) -> None:
        """Take so many blocks home as room allows: a later order replaces an earlier one."""
        self._home_orders[creditor] = kv_blocks

    # -- time passes ---------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> Iterator[LendingAction]:
        """Repeat what was not answered, give up what is late, give back what nobody needs."""
        answer_s = self._options.answer_within_s
        for number, (_, _, until_s) in list(self._ordered.items()):
            if now_s > until_s:
                del self._ordered[number]
        for number, flight in list(self._out.items()):
            source = self._loans.source_of(number)
            if source is None or self._debts.number_of(flight.place) != number:
                del self._out[number]
            elif now_s - flight.since_s > LOST_AFTER * answer_s:
                del self._out[number]
                self.counts.lost_total += 1
                self._loans.finish_move(number, accepted=False)
                yield LoansChanged()
            elif now_s - flight.sent_s > answer_s:
                flight.sent_s = now_s
                yield _content(flight.place, source)
        for number, flight in list(self._home.items()):
            if self._debts.number_of(flight.place) != number or (
                now_s - flight.since_s > LOST_AFTER * answer_s
            ):
                del self._home[number]
            elif now_s - flight.sent_s > answer_s:
                flight.sent_s = now_s
                yield Send(flight.place.creditor, BlockAsk(*flight.place.block))
        yield from self._answer_recalls(now_s)
        yield from self._give_back(now_s)
        yield from self.return_spent()

    def creditor_gone(self, peer: PeerId, now_s: float) -> Iterator[LendingAction]:
        """All that it lent is lost, and it will not answer."""
        yield from self.lost(peer, list(self._debts.numbers(peer)))
        yield from self.hunt(PeerGone(peer), None, {}, now_s)
        self._home_orders.pop(peer, None)
        self._ordered = {number: each for number, each in self._ordered.items() if each[0] != peer}

    def renewal(self, creditor: PeerId) -> LoanRenew:
        """What it has of a creditor: all of it, as far as reservations are settled."""
        settled = min([self._hunt.settled, *(number - 1 for number in self._ordered)])
        return LoanRenew(wire_blocks(self._debts.numbers(creditor)), settled)

    def give_up(self) -> Iterator[LendingAction]:
        """Return all that is borrowed; who uses it computes again."""
        everything = {
            creditor: list(self._debts.numbers(creditor)) for creditor in self._debts.borrowed_from()
        }
        numbers = [number for peer in everything for number in self._debts.numbers(peer).values()]
        self.counts.given_up_total += len(numbers)
        self._loans.lose(numbers)
        for creditor, blocks in everything.items():
            yield Send(creditor, LoanRelease(wire_blocks(blocks)))

    def return_spent(self) -> Iterator[LendingAction]:
        """Give back what no block table names any more."""
        for creditor, blocks in self._debts.take_spent().items():
            yield Send(creditor, LoanRelease(wire_blocks(blocks)))

    def return_empty(self) -> Iterator[LendingAction]:
        """Give back all that nothing is in."""
        for creditor, blocks in self._debts.give_back(MAX_LOAN_BLOCKS).items():
            yield Send(creditor, LoanRelease(wire_blocks(blocks)))

    def _homeward(self) -> list[int]:
        """Borrowed numbers to bring home, those called back first."""
        free = self._loans.pool.free_blocks - len(self._home)
        if free <= 0 or not (self._recalled or self._home_orders):
            return []
        called = [self._debts.number_of(place) for place in self._recalled]
        numbers = [number for number in called if number is not None and self._debts.is_filled(number)]
        held = set(self._debts.held)
        for creditor, kv_blocks in list(self._home_orders.items()):
            there = [number for number in self._debts.numbers(creditor).values() if number not in held]
            numbers += there[:kv_blocks]
        unique = [number for number in dict.fromkeys(numbers) if number not in self._home]
        return unique[: max(0, free)]

    def _ask_home(self, number: int, now_s: float) -> LendingAction:
        place = self._debts.place(number)
        self._home[number] = _Flight(place, now_s, now_s)
        if place not in self._recalled and place.creditor in self._home_orders:
            self._home_orders[place.creditor] -= 1
            if not self._home_orders[place.creditor]:
                del self._home_orders[place.creditor]
        return Send(place.creditor, BlockAsk(*place.block))

    def _answer_recalls(self, now_s: float) -> Iterator[LendingAction]:
        """Empty ones go back at once; what could not come home in time is given up, and computed again."""
        given_up: list[int] = []
        returned: dict[PeerId, list[LentBlock]] = {}
        for place, by_s in list(self._recalled.items()):
            number = self._debts.number_of(place)
            if number is None:
                del self._recalled[place]
            elif number in self._out:
                continue
            elif not self._debts.is_filled(number) or now_s > by_s - self._options.answer_within_s:
                del self._recalled[place]
                returned.setdefault(place.creditor, []).append(place.block)
                given_up.append(number)
        if given_up:
            self.counts.given_up_total += len(given_up)
            self._loans.lose(given_up)
            for creditor, blocks in returned.items():
                yield Send(creditor, LoanRelease(wire_blocks(blocks)))
            yield LoansChanged()

    def _give_back(self, now_s: float) -> Iterator[LendingAction]:
        """Return empty blocks that nothing has needed for a while, whoever ordered them."""
        short = self._loans.scheduler.short_blocks()
        surplus = self._debts.empty_blocks - max(0, short)
        if surplus <= 0:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif now_s - self._idle_since_s >= self._options.return_after_s:
            self._idle_since_s = None
            self._ordered_moves = 0
            for creditor, blocks in self._debts.give_back(surplus).items():
                yield Send(creditor, LoanRelease(wire_blocks(blocks)))


def _content(place: RemoteBlock, source: int) -> SendContent:
    return SendContent(place.creditor, BlockContent(*place.block), source)


def wire_blocks(blocks: Iterable[LentBlock]) -> WireBlocks:
    """Lent blocks as a message carries them."""
    listed = list(blocks)
    return WireBlocks(tuple(block.kv_block for block in listed), tuple(block.generation for block in listed))


def blocks_of(blocks: WireBlocks) -> tuple[LentBlock, ...]:
    """Lent blocks that a message carries."""
    return tuple(map(LentBlock, blocks.kv_blocks, blocks.generations))
