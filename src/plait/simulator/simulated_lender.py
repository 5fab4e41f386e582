"""One machine's end of lending: the live agent, what its steps wait for, and what it computes for others.

Who borrows from whom, what moves when and what is refused is decided by `plait.kvcache.LendingAgent`, as on a real
machine. Here is what a driver has to do for it (carry out its actions between steps), and what remote blocks cost:

    step = own part + max(0, slowest holder - attention over own keys) + attention owed to others + copies of blocks

The queries of a layer go out first, local attention runs meanwhile, and each layer waits for its slowest holder. A
holder takes the queries' and parts' time on the links (their bytes queue behind blocks that move), two delays a layer,
and the attention over its keys by its own costs, as many times longer as others use the device at once. What it
computes for others in the meantime makes its own next step that much longer, unless it stood still anyway.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from plait.costs import StepWork
from plait.ids import PeerId, RequestId
from plait.kvcache import (
    BlockLoans,
    LendingAction,
    LendingAgent,
    LendingFacts,
    LendingOptions,
    LentBlock,
    LoansChanged,
    LoanScheduler,
    LoanTerms,
    Send,
    SendContent,
    StepSample,
    WriteContent,
)
from plait.scheduling import ScheduledChunk, ScheduledStep
from plait.simulator.event_heap import NS_PER_S, EventHeap
from plait.simulator.simulated_network import SimulatedNetwork
from plait.wire import LoanBooking

if TYPE_CHECKING:
    from plait.simulator.simulated_worker import SimulatedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingSpec:
    """How a machine lends and borrows.

    `query_bytes_per_token` go to each holder for a token of all blocks of the span, `part_bytes_per_token` come back.
    `copy_bytes_per_s`: of blocks between pool and link. With `knows_lengths` it borrows for the whole of what its
    requests will ever be, from the start: an oracle to compare with.
    """

    options: LendingOptions
    terms: LoanTerms
    query_bytes_per_token: int
    part_bytes_per_token: int
    copy_bytes_per_s: float
    knows_lengths: bool = False


@dataclass(slots=True)
class LendingTotals:
    """What a machine has lent and borrowed since the start; survives its crashes.

    `waited_ns`: of its steps, for parts beyond their own attention. `lent_attention_ns`: computed for others.
    """

    blocks_moved_out: int = 0
    blocks_moved_home: int = 0
    blocks_lost: int = 0
    blocks_recalled: int = 0
    loans_granted: int = 0
    loans_refused: int = 0
    content_bytes: int = 0
    message_bytes: int = 0
    query_bytes: int = 0
    part_bytes: int = 0
    waited_ns: int = 0
    lent_attention_ns: int = 0
    steps_with_holders: int = 0
    steps_undone: int = 0
    most_lent_blocks: int = 0
    most_borrowed_blocks: int = 0


class Peers(Protocol):
    """The other machines' ends, and the way to them."""

    def lender(self, peer: PeerId) -> "SimulatedLender | None":
        """A machine's end; None if it lends nothing."""
        ...

    def post(self, sender: "SimulatedLender", peer: PeerId, message: LoanBooking, content_bytes: int) -> None:
        """Send a message, with the content of a block maybe."""
        ...


@dataclass(slots=True)
class _Share:
    """What one creditor holds of one request."""

    tokens: int = 0
    blocks: list[LentBlock] = field(default_factory=list[LentBlock])
    numbers: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class _Placement:
    """Where the blocks of one table were when it began so, and so many reservations had been granted.

    Numbers stand for other blocks only after another reservation, and what is appended to a table is always own.
    """

    grants: int
    table: list[int]
    shares: dict[PeerId, _Share]


class SimulatedLender:
    """The lending end of one worker."""

    def __init__(
        self,
        worker: "SimulatedWorker",
        spec: LendingSpec,
        heap: EventHeap,
        network: SimulatedNetwork,
        peers: Peers,
    ) -> None:
        self.worker = worker
        self.spec = spec
        self.totals = LendingTotals()
        self.life = 0
        self.agent: LendingAgent
        self.taken_back = 0
        """How often it has taken back what it had lent."""
        self.touched = True
        """Whether its books may have changed since they were checked."""
        self.ticks = False
        """Whether a tick waits for the running step to end."""
        self.starving: RequestId | None
        """The first request, if it stands still for want of blocks, and since when."""
        self.starves_since_ns = 0
        self._heap = heap
        self._network = network
        self._peers = peers
        self._layers = len(worker.spec.blocks)
        self._block_bytes = worker.spec.costs.kv_bytes_per_token * worker.spec.block_tokens
        self._askers: dict[PeerId, None] = {}
        self._load_until_ns = 0
        self._carried_ns = 0
        self.build()

    def build(self) -> None:
        """Begin a life: an agent over the worker's new scheduler and pool."""
        self.life += 1
        worker, now_us = self.worker, self._heap.now_ns // 1000
        seen: LoanScheduler = worker.scheduler
        if self.spec.knows_lengths:
            seen = _Foreknowing(worker, lambda: self.agent.loans.debts.borrowed_blocks)
        loans = BlockLoans(seen, worker.pool, self.spec.terms, first_generation=now_us)
        self.agent = LendingAgent(
            worker.peer, loans, self.spec.options, first_number=now_us, layers=self._layers
        )
        self.ticks, self.starving = False, None
        self._placements: dict[RequestId, _Placement] = {}
        self._readable: dict[PeerId, tuple[int, int, int]] = {}
        self._asked: dict[PeerId, _Share] = {}
        self._sample: StepSample | None = None
        self._copied_bytes = self._lent_blocks = 0
        self._load_until_ns = self._carried_ns = 0

    def die(self) -> None:
        """The machine crashes; what it was asked is void."""
        self._count()
        self.forget_step()
        self._askers.clear()

    # What the agent wants done.

    def carry_out(self, actions: Sequence[LendingAction]) -> None:
        """Do what the agent wants, at once."""
        self.touched = True
        for action in actions:
            match action:
                case Send(peer, message):
                    self._peers.post(self, peer, message, 0)
                case SendContent(peer, message, _):
                    self._copied_bytes += self._block_bytes
                    self.totals.content_bytes += self._block_bytes
                    self._peers.post(self, peer, message, self._block_bytes)
                case WriteContent():
                    self._copied_bytes += self._block_bytes
                case LoansChanged():
                    self.worker.wake()
        loans, totals = self.agent.loans, self.totals
        lent_blocks = loans.book.lent_blocks
        if lent_blocks < self._lent_blocks:  # no event takes back and lends
            self.taken_back += 1
        self._lent_blocks = lent_blocks
        totals.most_lent_blocks = max(totals.most_lent_blocks, lent_blocks)
        totals.most_borrowed_blocks = max(totals.most_borrowed_blocks, loans.debts.borrowed_blocks)

    def hear(self, peer: PeerId, message: LoanBooking) -> None:
        """A message has arrived, between steps."""
        self.carry_out(self.agent.on_message(peer, message, self._heap.now_s))

    def before_step(self) -> None:
        """A step may begin."""
        self.carry_out(self.agent.before_step(self._heap.now_s))

    # Steps.

    def step_s(self, step: ScheduledStep, work: StepWork) -> float | None:
        """Seconds that a step takes which would be this work with all keys at home; None: a holder never answers."""
        holders: dict[PeerId, list[tuple[int, int]]] = {}
        own_tokens: list[int] = []
        self._asked = {}
        for chunk, new, context in zip(step.chunks, work.new_tokens, work.context_tokens, strict=True):
            for peer, share in self._shares(chunk).items():
                holders.setdefault(peer, []).append((new, share.tokens))
                asked = self._asked.setdefault(peer, _Share())
                asked.blocks += share.blocks
                asked.numbers += share.numbers
                context -= share.tokens
            own_tokens.append(context)
        worker, costs = self.worker, self.worker.spec.costs
        own = StepWork(work.new_tokens, tuple(own_tokens), work.sampled) if holders else work
        own_s = (costs.step_s(own) + costs.host_s(own)) * worker.slowness
        waited_s = 0.0
        if holders:
            self.totals.steps_with_holders += 1
            slowest_s = self._slowest_s(holders)
            if slowest_s is None:
                return None
            waited_s = max(0.0, slowest_s - costs.attention_s(own) * worker.slowness)
            self.totals.waited_ns += round(waited_s * NS_PER_S)
        step_s = own_s + waited_s + (self._owed_ns() + self._copies_ns()) / NS_PER_S
        attended = own.features.context_tokens + self.lent_tokens
        decodes = own.features.decodes == own.features.sequences
        self._sample = StepSample(len(own_tokens), attended, len(holders), step_s) if decodes else None
        return step_s

    def refused(self) -> bool:
        """Whether some creditor would not have attended, until now, over what the running step needs.

        What such a creditor has is lost then, as soon as the step is undone.
        """
        numbers: list[int] = []
        for peer, asked in self._asked.items():
            creditor = self._peers.lender(peer)
            assert creditor is not None
            if not self._all_readable(creditor) and not creditor.agent.may_read(
                self.worker.peer, asked.blocks
            ):
                numbers += asked.numbers
        if numbers:
            self.totals.steps_undone += 1
            self.worker.between_steps(self._lose, (self.life, numbers))
        return bool(numbers)

    def resumes_ns(self) -> int:
        """When all holders of the running step go on; in the past where none of them pauses."""
        found = [self._peers.lender(peer) for peer in self._asked]
        return max((each.worker.silent_until_ns for each in found if each is not None), default=0)

    def asks(self, peer: PeerId) -> bool:
        """Whether the running step waits for this machine."""
        return peer in self._asked

    def forget_step(self) -> None:
        """The running step is over, or undone."""
        for peer in self._asked:
            creditor = self._peers.lender(peer)
            if creditor is not None:
                creditor.let_go(self.worker.peer)
        self._asked = {}
        if self._carried_ns:
            self._load_until_ns = self._heap.now_ns + self._carried_ns
            self._carried_ns = 0

    def after_step(self, step: ScheduledStep | None) -> None:
        """A step has run; None: there was nothing to run, or no room for it."""
        self.forget_step()
        starving = self.worker.scheduler.starving
        if starving != self.starving:
            self.starving, self.starves_since_ns = starving, self._heap.now_ns
        sample = self._sample if step is not None else None
        self.carry_out(self.agent.after_step(sample, starving is not None, self._heap.now_s))

    @property
    def lent_tokens(self) -> int:
        """Tokens of others that it holds."""
        return self.agent.loans.book.lent_blocks * self.worker.spec.block_tokens

    def _all_readable(self, creditor: "SimulatedLender") -> bool:
        """Whether a creditor would attend over all that this machine has there; asked anew after it took any back."""
        key = self.agent.counts.moved_out_total, creditor.life, creditor.taken_back
        peer = creditor.worker.peer
        if self._readable.get(peer) != key:
            held = set(self.agent.loans.debts.held)
            numbers = self.agent.loans.debts.numbers(peer)
            filled = [block for block, number in numbers.items() if number not in held]
            if not creditor.agent.may_read(self.worker.peer, filled):
                return False
            self._readable[peer] = key
        return True

    def _lose(self, what: tuple[int, list[int]]) -> None:
        life, numbers = what
        if life == self.life:
            borrowed = self.worker.pool.borrowed_numbers
            self.agent.loans.lose([number for number in dict.fromkeys(numbers) if number in borrowed])

    # What it computes for others.

    def let_go(self, asker: PeerId) -> None:
        """A step for which it attended is over."""
        self._askers.pop(asker, None)

    def attend_s(self, asker: PeerId, asks: Sequence[tuple[int, int]]) -> float:
        """Seconds to attend with (rows, keys) of some sequences, and do it; slower if others use the device too."""
        # A step's own chunk is attended causally, so half of it counts; here every row sees every key.
        rows = [(new, max(0, keys - (new + 1) // 2)) for new, keys in asks]
        worker = self.worker
        alone_s = worker.spec.costs.attention_s(StepWork.of(rows, sampled=0)) * worker.slowness
        self._askers.pop(asker, None)
        users = 1 + len(self._askers) + worker.computes
        self._askers[asker] = None
        alone_ns = round(alone_s * NS_PER_S)
        self.totals.lent_attention_ns += alone_ns
        if worker.computes:
            self._carried_ns += alone_ns
        else:
            self._load_until_ns = max(self._load_until_ns, self._heap.now_ns) + alone_ns
        return alone_s * users

    # What it says of itself.

    @property
    def borrowable_blocks(self) -> int:
        """Blocks that it may still borrow."""
        return max(0, self.worker.scheduler.borrowable_blocks - self.agent.loans.debts.borrowed_blocks)

    def note_counts(self) -> None:
        """Add what the present agent has counted to the totals, at the end."""
        if self.worker.up:
            self._count()

    def holders(self) -> list[list[int]]:
        """Who holds blocks of the pool besides the scheduler."""
        return self.agent.loans.holders()

    def debts(self) -> Iterator[tuple[PeerId, LentBlock]]:
        """All that it has borrowed: creditor and block."""
        debts = self.agent.loans.debts
        for creditor in debts.borrowed_from():
            for block in debts.numbers(creditor):
                yield creditor, block

    def check(self) -> None:
        """Assert that its books agree with themselves."""
        self.agent.check()

    def _count(self) -> None:
        counts, totals = self.agent.counts, self.totals
        totals.blocks_moved_out += counts.moved_out_total
        totals.blocks_moved_home += counts.moved_home_total
        totals.blocks_lost += counts.lost_total
        totals.blocks_recalled += counts.recalled_total
        totals.loans_granted += counts.granted_total
        totals.loans_refused += counts.refused_total

    def _owed_ns(self) -> int:
        owed_ns = max(0, self._load_until_ns - self._heap.now_ns) + self._carried_ns
        self._load_until_ns = self._carried_ns = 0
        return owed_ns

    def _copies_ns(self) -> int:
        copied_bytes, self._copied_bytes = self._copied_bytes, 0
        return round(copied_bytes / self.spec.copy_bytes_per_s * NS_PER_S)

    def _slowest_s(self, holders: dict[PeerId, list[tuple[int, int]]]) -> float | None:
        """How long the slowest of them takes over all layers of a step; None: one of them never answers."""
        now_ns, name, spec = self._heap.now_ns, self.worker.name, self.spec
        slowest_s = 0.0
        for peer, asks in holders.items():
            creditor = self._peers.lender(peer)
            if creditor is None or not creditor.worker.up:
                return None
            rows, other = sum(new for new, _ in asks), creditor.worker.name
            out_bytes, back_bytes = rows * spec.query_bytes_per_token, rows * spec.part_bytes_per_token
            out_ns = self._network.send(name, other, out_bytes, now_ns)
            back_ns = self._network.send(other, name, back_bytes, now_ns)
            if out_ns is None or back_ns is None:
                return None
            self.totals.query_bytes += out_bytes
            self.totals.part_bytes += back_bytes
            delays_ns = self._network.delay_ns(name, other) + self._network.delay_ns(other, name)
            ways_ns = out_ns + back_ns - 2 * now_ns + (self._layers - 1) * delays_ns
            attend_s = creditor.attend_s(self.worker.peer, asks)
            slowest_s = max(slowest_s, ways_ns / NS_PER_S + attend_s)
        return slowest_s

    def _shares(self, chunk: ScheduledChunk) -> dict[PeerId, _Share]:
        """Who holds how much of what a sequence attends to."""
        table, grants = chunk.kv_blocks, self.agent.counts.granted_total
        known = self._placements.get(chunk.request_id)
        if known is not None and known.grants == grants and table[: len(known.table)] == known.table:
            return known.shares
        debts, own = self.agent.loans.debts, self.worker.pool.kv_blocks
        shares: dict[PeerId, _Share] = {}
        for number in table:
            if number >= own:
                remote = debts.place(number)
                share = shares.setdefault(remote.creditor, _Share())
                share.tokens += self.worker.spec.block_tokens
                share.blocks.append(remote.block)
                share.numbers.append(number)
        if len(self._placements) > 2 * len(self.worker.rounds) + 8:
            self._placements = {id: each for id, each in self._placements.items() if id in self.worker.rounds}
        self._placements[chunk.request_id] = _Placement(grants, list(table), shares)
        return shares


class _Foreknowing:
    """A scheduler whose wants are those of somebody who knows how long every request here will be."""

    def __init__(self, worker: "SimulatedWorker", borrowed: Callable[[], int]) -> None:
        self._worker = worker
        self._scheduler = worker.scheduler
        self._borrowed = borrowed

    @property
    def borrowable_blocks(self) -> int:
        return self._scheduler.borrowable_blocks

    def movable(self, kv_blocks: int, staying: Container[int]) -> list[int]:
        return self._scheduler.movable(kv_blocks, staying)

    def relocate(self, source: int, target: int) -> bool:
        return self._scheduler.relocate(source, target)

    def lose(self, kv_blocks: Iterable[int]) -> list[RequestId]:
        return self._scheduler.lose(kv_blocks)

    def give_way(self) -> RequestId | None:
        return self._scheduler.give_way()

    def short_blocks(self) -> int:
        pool = self._worker.pool
        needed = sum(pool.blocks_for(tokens) for tokens in self._worker.asked_tokens.values())
        filled = self._borrowed() - pool.promised_blocks
        return max(self._scheduler.lending_facts().short_blocks, needed - pool.kv_blocks - filled)

    def lending_facts(self) -> LendingFacts:
        return replace(self._scheduler.lending_facts(), short_blocks=self.short_blocks())
