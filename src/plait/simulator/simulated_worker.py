"""One machine: the live scheduler over a pool of KV blocks, and a cost model in place of an engine.

What runs in a step, who waits, who is preempted and which prefix is shared is decided by `plait.scheduling` and
`plait.kvcache`, as on a real machine. Here are only the loop around them, whose steps take the time that the cost
model says, and what can befall the machine: it may crash (its memory is lost), pause, or be slow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plait.costs import CostModel, StepWork
from plait.ids import PeerId, RequestId
from plait.kvcache import KvBlockPool
from plait.scheduling import (
    SHARED_TOKENS,
    NewRequest,
    Round,
    ScheduledStep,
    Scheduler,
    SchedulingPolicy,
    StepLimits,
    gather_until_s,
)
from plait.simulator.event_heap import NS_PER_S, EventHeap, EventKind, ns_of
from plait.simulator.simulated_lender import LendingSpec, SimulatedLender

_SMOOTHING = 0.1  # of the announced duration of steps, as workers do
_USAGE_EVERY_STEPS = 16  # walking every block table costs more than a step


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """A machine that serves a span of the model's blocks.

    `kv_blocks` of `block_tokens` tokens fit on its device, `host_kv_blocks` more where preempted requests are swapped
    to. `site` names the place it is at: links within a site are short. `price_per_hour` is its price, 0 if unknown.
    With `lending` it lends KV memory to machines with the same blocks, and borrows theirs.
    """

    name: str
    peer: PeerId
    blocks: range
    costs: CostModel
    policy: SchedulingPolicy
    limits: StepLimits
    kv_blocks: int
    block_tokens: int = 16
    host_kv_blocks: int = 0
    site: str = ""
    price_per_hour: float = 0.0
    lending: LendingSpec | None = None


@dataclass(slots=True)
class WorkerTotals:
    """What a machine has done since the start; survives its crashes.

    `ideal_compute_s` and `ideal_memory_s`: what its steps would have taken at the device's peaks, 0 if not known.
    `useful_kv_fractions`: of the memory held by running requests, how much was filled, seen every few steps.
    """

    steps: int = 0
    step_tokens: int = 0
    step_sequences: int = 0
    busy_ns: int = 0
    energy_j: float = 0.0
    ideal_compute_s: float = 0.0
    ideal_memory_s: float = 0.0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    useful_kv_fraction_sum: float = 0.0
    held_kv_fraction_sum: float = 0.0
    usage_samples: int = 0
    crashes: int = 0


StepObserver = Callable[["SimulatedWorker", ScheduledStep, int], None]
"""Told of each step when it has run: the worker, the step, when it began."""


class SimulatedWorker:
    """Runs steps while there is something to run; tells `on_step` what each of them computed."""

    def __init__(self, spec: MachineSpec, heap: EventHeap, on_step: StepObserver) -> None:
        self.spec = spec
        self.name = spec.name
        self.peer = spec.peer
        self.totals = WorkerTotals()
        self.up = True
        self.slowness = 1.0
        self.step_s = 0.0
        """Smoothed duration of a step, as announced."""
        self.sessions = 0
        """Sessions that cross it, as announced."""
        self.queued_tokens = 0
        """Tokens of prompts that have arrived and did not run yet, as announced."""
        self.rounds: dict[RequestId, Round]
        """How the sessions that it has go round their chains."""
        self.asked_tokens: dict[RequestId, int]
        """How long those may become."""
        self.lender: SimulatedLender | None = None
        self.touched = True
        """Whether anything happened to it that its books should be walked after; whoever walks them takes it back."""
        self.scheduler: Scheduler
        self.pool: KvBlockPool
        self._heap = heap
        self._on_step = on_step
        self._life = 0
        self._paused_until_ns = 0
        self._step: ScheduledStep | None = None
        self._step_began_ns = 0
        self._small_step_s = 0.0  # of those of few tokens
        self._gathers_since_ns: int | None = None
        self._woken = False
        self._taken: list[list[int]] = []
        self._inbox: list[tuple[Callable[[Any], None], Any]] = []
        self._build()

    # What comes from outside.

    def submit(self, request: NewRequest, round: Round) -> None:
        """Queue a request that will go this round.

        Raises:
            BadRequest: it can never run here.
            NoCapacity: the queue is full.
        """
        self.scheduler.submit(request)
        self.rounds[request.id] = round
        self.asked_tokens[request.id] = request.max_sequence_tokens
        self.wake()

    def between_steps(self, action: Callable[[Any], None], what: Any, *, wakes: bool = True) -> None:
        """Do something that must not happen while a step runs: now, or when the step has run."""
        if self._step is None:
            self.touched = True
            action(what)
            if wakes:
                self.wake()
        else:
            self._inbox.append((action, what))

    def forget(self, request_id: RequestId) -> None:
        """Free all that a request holds here; an unknown one is fine."""
        self.scheduler.cancel(request_id)
        self.rounds.pop(request_id, None)
        self.asked_tokens.pop(request_id, None)
        self.wake()

    def finish(self, request_id: RequestId) -> None:
        """It has run to its end, between two steps."""
        self.scheduler.finish(request_id)
        del self.rounds[request_id], self.asked_tokens[request_id]

    def wake(self) -> None:
        """Something may have changed: decide on a step, once all that happens at this instant has happened."""
        self.touched = True
        if self._step is None and not self._woken and self.up:
            self._woken = True
            time_ns = max(self._heap.now_ns, self._paused_until_ns)
            self._heap.at(time_ns, EventKind.SCHEDULE, self.name, self._begin, self._life)

    # What befalls it.

    @property
    def silent_until_ns(self) -> int:
        """Until when it says nothing; in the past where it does not pause."""
        return self._paused_until_ns

    def crash(self) -> None:
        """Lose everything in memory, at once."""
        self.note_counts()
        if self.lender is not None:
            self.lender.die()
        self.up = False
        self.totals.crashes += 1
        self._life += 1
        self._step, self._woken, self._gathers_since_ns = None, False, None
        self.queued_tokens = 0
        self._inbox.clear()

    def restart(self) -> None:
        """Come back with empty memory."""
        assert not self.up
        self.touched = True
        self.up = True
        self._paused_until_ns = 0
        self._build()
        if self.lender is not None:
            self.lender.build()

    def pause(self, until_ns: int) -> None:
        """Stand still: what runs ends that much later, what arrives waits."""
        self._paused_until_ns = max(self._paused_until_ns, until_ns)

    def slow(self, factor: float) -> None:
        """Let later steps take `factor` times as long; its inverse takes that back."""
        self.slowness *= factor

    def squeeze(self, fraction: float) -> None:
        """Let something else have part of its KV memory, as far as that is free."""
        if self.up:
            blocks = min(int(fraction * self.pool.kv_blocks), self.pool.free_blocks)
            self._taken.append(self.pool.allocate(blocks))
            self.touched = True

    def relax(self) -> None:
        """The first of those who took memory gives it back; a crash took it from them."""
        if self._taken:
            self.pool.release(self._taken.pop(0))
            self.wake()

    # Steps.

    @property
    def computes(self) -> bool:
        """Whether a step runs."""
        return self._step is not None

    def undo_step(self) -> None:
        """The running step cannot be computed: a machine that it needed is gone. The same tokens are due again."""
        step, self._step = self._step, None
        assert step is not None and self.lender is not None
        self._life += 1  # what was to end it is void
        self.scheduler.undo(step)
        self.lender.forget_step()
        self._read_inbox()
        self.wake()

    def _build(self) -> None:
        spec = self.spec
        host_pool = KvBlockPool(spec.host_kv_blocks, spec.block_tokens) if spec.host_kv_blocks else None
        self.pool = KvBlockPool(spec.kv_blocks, spec.block_tokens)
        self.scheduler = Scheduler(spec.policy, self.pool, host_pool, spec.limits)
        self.rounds, self.asked_tokens = {}, {}
        self._taken = []

    def _begin(self, life: int) -> None:
        if life != self._life or self._step is not None:
            return
        self.touched = True
        if self._paused_until_ns > self._heap.now_ns:
            self._heap.at(self._paused_until_ns, EventKind.SCHEDULE, self.name, self._begin, life)
            return
        self._woken = False
        if self._gathers():
            return
        lender = self.lender
        if lender is not None:
            lender.before_step()
        step = self.scheduler.schedule()
        while not step.chunks and (step.admitted or step.preempted):
            self.scheduler.complete(step)
            step = self.scheduler.schedule()
        if not step.chunks:
            self.scheduler.complete(step)
            if lender is not None:
                lender.after_step(None)
            return
        self._step, self._step_began_ns = step, self._heap.now_ns
        sampled = 0
        new_tokens: list[int] = []
        context_tokens: list[int] = []
        for _, _, start, tokens, samples, _ in step.chunks:
            new_tokens.append(tokens)
            context_tokens.append(start)
            sampled += samples
        work = StepWork(tuple(new_tokens), tuple(context_tokens), sampled)
        costs, totals = self.spec.costs, self.totals
        if lender is None:
            step_s = (costs.step_s(work) + costs.host_s(work)) * self.slowness
        else:
            lent_step_s = lender.step_s(step, work)
            if lent_step_s is None:
                return  # until it is known that a machine that it needs is gone
            step_s = lent_step_s
        self.step_s += (step_s - self.step_s) * (_SMOOTHING if self.step_s else 1.0)
        if work.features.tokens <= SHARED_TOKENS:
            smoothing = _SMOOTHING if self._small_step_s else 1.0
            self._small_step_s += (step_s - self._small_step_s) * smoothing
        totals.steps += 1
        totals.step_tokens += work.features.tokens
        totals.step_sequences += len(new_tokens)
        totals.energy_j += costs.energy_j(work)
        ideal = costs.ideal(work)
        if ideal is not None:
            totals.ideal_compute_s += ideal.compute_s
            totals.ideal_memory_s += ideal.memory_s
        if totals.steps % _USAGE_EVERY_STEPS == 0:
            self._sample_usage()
        self._heap.after(step_s, EventKind.DONE, self.name, self._done, life)

    def _gathers(self) -> bool:
        """Whether a step waits for sessions that are about to be here, as `SpanWorker` does."""
        heap, rounds = self._heap, self.rounds.values()
        until_s = None
        # A request on one machine never leaves it.
        if self.queued_tokens and len(rounds) > 1 and len(next(iter(rounds)).chain) > 1:
            if self._gathers_since_ns is None:
                self._gathers_since_ns = heap.now_ns
            since_s = self._gathers_since_ns / NS_PER_S
            until_s = gather_until_s(rounds, now_s=heap.now_s, since_s=since_s, step_s=self._small_step_s)
        if until_s is None:
            self._gathers_since_ns = None
            return False
        at_ns = max(ns_of(until_s), heap.now_ns + 1)
        heap.at(at_ns, EventKind.SCHEDULE, self.name, self._begin, self._life)
        return True

    def _done(self, life: int) -> None:
        if life != self._life:
            return
        self.touched = True
        now_ns = self._heap.now_ns
        if self._paused_until_ns > now_ns:
            self._heap.at(self._paused_until_ns, EventKind.DONE, self.name, self._done, life)
            return
        lender = self.lender
        if lender is not None:
            if lender.resumes_ns() > now_ns:
                self._heap.at(lender.resumes_ns(), EventKind.DONE, self.name, self._done, life)
                return
            if lender.refused():
                self.undo_step()
                return
        step, self._step = self._step, None
        assert step is not None
        self.totals.busy_ns += now_ns - self._step_began_ns
        self.scheduler.complete(step)
        self._on_step(self, step, self._step_began_ns)
        if lender is not None:
            lender.after_step(step)
        self._read_inbox()
        self.wake()

    def _read_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        for action, what in inbox:
            action(what)

    # What it says of itself.

    @property
    def free_tokens(self) -> int:
        """Context that still fits in its cache, and in what it may still borrow."""
        return (self.pool.free_blocks + self._borrowable_blocks) * self.pool.block_tokens

    @property
    def total_tokens(self) -> int:
        """Context that fits in its empty cache, and in what it may still borrow."""
        return (self.pool.kv_blocks + self._borrowable_blocks) * self.pool.block_tokens

    @property
    def _borrowable_blocks(self) -> int:
        return self.lender.borrowable_blocks if self.lender is not None else 0

    def check(self, *, empty: bool) -> None:
        """Assert all invariants of its books; with `empty`, that nothing holds memory any more."""
        if not self.up:
            return
        lent = self.lender.holders() if self.lender is not None else []
        self.scheduler.check([*self._taken, *lent])
        if empty:
            assert not self.scheduler.has_requests, f"{self.name} still has requests"
            assert not self.rounds, f"{self.name} still has sessions"
            left = self.pool.used_blocks - sum(map(len, self._taken))
            assert left == 0, f"{self.name} leaked {left} KV blocks"

    def _sample_usage(self) -> None:
        usage = self.scheduler.kv_usage()
        totals = self.totals
        totals.usage_samples += 1
        totals.useful_kv_fraction_sum += usage.useful_fraction
        totals.held_kv_fraction_sum += usage.held_tokens / (self.pool.kv_blocks * self.pool.block_tokens)

    def note_counts(self) -> None:
        """Add what the present scheduler has counted to the totals: before its memory is lost, and at the end."""
        if not self.up:
            return
        if self.lender is not None:
            self.lender.note_counts()
        counts = self.scheduler.counts()
        self.totals.preemptions += counts.preemptions_total
        self.totals.prefix_query_tokens += counts.prefix_query_tokens_total
        self.totals.prefix_hit_tokens += counts.prefix_hit_tokens_total
