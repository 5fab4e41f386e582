"""The owner of queues, block tables and pools: applies what the policy decides.

A request is waiting or running, and moves only in `schedule`:

    submit ──▶ waiting ──admitted──▶ running ──finish, cancel──▶ gone
                  ▲                     │
                  └──────preempted──────┘   blocks dropped (recompute) or copied to the host (swap)

A fed request (`NewRequest.fed`) of which nothing new is known rests instead of waiting: before its first tokens, and
when it was preempted after its last. `extend` gives it tokens, or others for the last of those it had.

The engine's loop is `schedule`, run the step, `complete`, then `append` (after `fork`, where sequences
multiply) for each chunk that `samples`, and `finish` for those that are done. Steps do not overlap.
`submit`, `cancel`, `finish` and `finish_sequence` are allowed at any time: what leaves while its step is
in flight is skipped by `complete`, and the blocks it frees are handed out by the next `schedule` at the
earliest, when nobody writes them any more.

Invariants, asserted by `check`: a block is free or has as many references as tables (and reserves) hold
it; tables cover exactly the computed tokens; both queues are sorted; only fed requests rest; a block with several
references is never written; nothing is published before it was computed.
"""

from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain

from plait.errors import BadRequest, NoCapacity
from plait.ids import RequestId
from plait.kvcache import KvBlockPool, LendingFacts, PlacedRequest
from plait.scheduling.gang import split_tokens, worst_case_blocks
from plait.scheduling.idle import idle_victim
from plait.scheduling.limits import StepLimits
from plait.scheduling.plan import Admission, Grant, SchedulerView, SchedulingPolicy, Victim
from plait.scheduling.request import NewRequest, ScheduledRequest, ScheduledSequence
from plait.scheduling.step import ScheduledChunk, ScheduledStep
from plait.scheduling.usage import KvUsage, SchedulerCounts, kv_usage

# Placements that are told of each machine: those of its longest requests.
_TOLD_REQUESTS = 16


class Scheduler:
    """Decides and keeps the books of every step of one engine."""

    def __init__(
        self, policy: SchedulingPolicy, pool: KvBlockPool, host_pool: KvBlockPool | None, limits: StepLimits
    ) -> None:
        self._policy = policy
        self._pool = pool
        self._host_pool = host_pool
        self._limits = limits
        self._requests: dict[RequestId, ScheduledRequest] = {}
        self._running: list[ScheduledRequest] = []
        self._waiting: list[ScheduledRequest] = []
        self._resting: dict[RequestId, ScheduledRequest] = {}
        self._running_sequences = 0
        self._rebuilding: list[ScheduledRequest] = []
        self._step: ScheduledStep | None = None
        self._starving: RequestId | None = None
        self._in_flight: list[ScheduledSequence] = []
        self._arrivals = 0
        self._preemptions_total = 0
        self._swaps_total = 0
        self._prefix_query_tokens_total = 0
        self._prefix_hit_tokens_total = 0

    # Requests come and go.

    def submit(self, request: NewRequest) -> None:
        """Queue a request.

        Raises:
            BadRequest: it could never run within this pool and these limits.
            NoCapacity: the queue is full.
        """
        self._refuse_impossible(request)
        queued = len(self._waiting) + len(self._resting)
        if queued >= self._limits.max_waiting:
            raise NoCapacity(
                f"{queued} requests are waiting already, the most this server queues "
                "(--max-waiting); retry later"
            )
        scheduled = ScheduledRequest(request, self._arrivals)
        self._arrivals += 1
        self._requests[request.id] = scheduled
        self._wait_or_rest(scheduled)

    def cancel(self, request_id: RequestId) -> None:
        """Forget a request and free all it holds; an unknown id is fine."""
        self.finish(request_id)

    def finish(self, request_id: RequestId) -> None:
        """Like `cancel`: nothing of a request outlives it but its cached full blocks."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._leave_queue(request)
        for sequence in request.live:
            self._release(request, sequence)
            sequence.finished = True
        self._pool.release(request.reserve)
        request.reserve = []

    def finish_sequence(self, request_id: RequestId, sequence: int) -> None:
        """End one sequence; the others keep their indices. With its last sequence the request ends."""
        request = self._requests[request_id]
        ended = request.sequences[sequence]
        if ended.finished:
            return
        if request.sole is ended:
            self.finish(request_id)
            return
        self._release(request, ended)
        ended.finished = True
        request.set_sequences(request.sequences)

    def append(self, request_id: RequestId, sequence: int, token_id: int) -> None:
        """Add a sampled token to a sequence."""
        request = self._requests[request_id]
        token_ids = request.sequences[sequence].token_ids
        assert len(token_ids) < request.max_sequence_tokens, f"{request_id!r} outgrew max_sequence_tokens"
        token_ids.append(token_id)

    def extend(self, request_id: RequestId, start: int, token_ids: Sequence[int]) -> None:
        """Feed a request: its tokens from position `start` on are these and no others.

        What it had from there on is forgotten, and the blocks that only held such tokens are free. Call it between
        steps.
        """
        request = self._requests[request_id]
        sequence = request.sole
        assert request.fed and sequence is not None and self._step is None
        known = sequence.token_ids
        assert 0 <= start <= len(known), f"{request_id!r}: fed at {start}, {len(known)} tokens are known"
        assert start + len(token_ids) <= request.max_sequence_tokens, f"{request_id!r} outgrew its maximum"
        known[start:] = token_ids
        sequence.seen_tokens = min(sequence.seen_tokens, start)
        if start < sequence.computed_tokens:
            kept = self._pool.blocks_for(start)
            sequence.computed_tokens = start
            if start % self._pool.block_tokens and not self._pool.is_own(sequence.kv_blocks[kept - 1]):
                kept -= 1  # nobody writes to a borrowed block: what is left of it is computed again
                sequence.computed_tokens = kept * self._pool.block_tokens
            self._give_back(request, sequence.kv_blocks[kept:])
            del sequence.kv_blocks[kept:]
        if not request.running and request.resting == request.has_news:
            self._leave_queue(request)
            self._wait_or_rest(request)

    def fork(self, request_id: RequestId, parents: Sequence[int]) -> None:
        """Replace the sequences of a running request: the new i-th one continues the old `parents[i]`-th.

        Blocks are shared, not copied; whoever writes a shared block first gets a copy of its own then.
        Call it when a step has completed, before `append`.
        """
        request = self._requests[request_id]
        assert request.running and not request.stem_tokens and self._step is None
        assert 1 <= len(parents) <= request.fan_out, (
            f"{request_id!r}: {len(parents)} sequences, {request.fan_out} asked"
        )
        old = request.sequences
        children: list[ScheduledSequence] = []
        for index, parent in enumerate(parents):
            assert not old[parent].finished, f"{request_id!r}: sequence {parent} has finished"
            child = old[parent].fork(index)
            child.kv_blocks = self._pool.fork(old[parent].kv_blocks)
            children.append(child)
        for sequence in request.live:
            self._release(request, sequence)
            sequence.finished = True
        request.set_sequences(children)

    # Steps.

    def schedule(self) -> ScheduledStep:
        """Let the policy decide the next step, and do its bookkeeping."""
        assert self._step is None, "the previous step has not been completed"
        gave_way: list[RequestId] = []
        plan = self._policy.plan_step(view := self._view())
        while (idle := idle_victim(view, plan)) is not None:
            self._preempt(Victim(idle, swap=False))
            gave_way.append(idle.id)
            plan = self._policy.plan_step(view := self._view())
        swap_out = [pair for victim in plan.victims for pair in self._preempt(victim)]
        swap_in = self._admit(plan.admissions) if plan.admissions else []
        chunks, copies = self._place(plan.grants)
        self._starving = self._unserved(chunks)
        self._step = ScheduledStep(
            chunks=chunks,
            copies=tuple(copies),
            swap_out=tuple(swap_out),
            swap_in=tuple(swap_in),
            admitted=tuple([admission.request.id for admission in plan.admissions]),
            preempted=(*gave_way, *[victim.request.id for victim in plan.victims]),
        )
        return self._step

    def complete(self, step: ScheduledStep) -> None:
        """Note that a step was run: its tokens are computed and its full blocks can be found by others.

        If the runner failed, cancel the step's requests first (all of them, if its copies may not have
        been made).
        """
        assert step is self._step, "complete takes the step that schedule returned last"
        block_tokens = self._pool.block_tokens
        publishes = not self._policy.reserves
        for sequence, chunk in zip(self._in_flight, step.chunks, strict=True):
            if sequence.finished:
                continue
            sequence.computed_tokens = computed = chunk.start + chunk.tokens
            sequence.seen_tokens = max(sequence.seen_tokens, computed)
            if (
                publishes
                and not sequence.private
                and computed >= (sequence.published_blocks + 1) * block_tokens
            ):
                self._publish(sequence)
        self._step = None
        self._in_flight = []
        if self._rebuilding:
            self._rebuilding = [request for request in self._rebuilding if not self._share_stem(request)]

    def undo(self, step: ScheduledStep) -> None:
        """Note that a step could not be computed, though its copies were made: the same tokens are due again."""
        assert step is self._step, "undo takes the step that schedule returned last"
        for sequence, chunk in zip(self._in_flight, step.chunks, strict=True):
            if not sequence.finished:
                kept = self._pool.blocks_for(sequence.computed_tokens)
                self._give_back(self._requests[chunk.request_id], sequence.kv_blocks[kept:])
                del sequence.kv_blocks[kept:]
        self._step = None
        self._in_flight = []

    # Blocks that move to other machines, all between steps.

    def movable(self, kv_blocks: int, staying: Container[int]) -> list[int]:
        """Up to so many full blocks that could move out: the oldest of the longest running sequence first."""
        tables = [
            (sequence.computed_tokens, request.order, sequence)
            for request in self._running
            for sequence in request.live
        ]
        found: dict[int, None] = {}
        for computed, _, sequence in sorted(tables, key=lambda each: (-each[0], each[1], each[2].index)):
            for kv_block in sequence.kv_blocks[: computed // self._pool.block_tokens]:
                if len(found) == kv_blocks:
                    return list(found)
                if self._pool.is_own(kv_block) and kv_block not in staying:
                    found[kv_block] = None
        return list(found)

    def relocate(self, source: int, target: int) -> bool:
        """The content of `source` is in `target`, held once by the caller, too: all tables name that from now on.

        False, and nothing is changed, if nobody holds `source` any more.
        """
        assert self._step is None
        if not self._pool.references(source):
            return False
        self._pool.move(source, target)
        for request in self._running:
            for sequence in request.live:
                if source in sequence.kv_blocks:
                    sequence.kv_blocks[sequence.kv_blocks.index(source)] = target
        return True

    def lose(self, kv_blocks: Iterable[int]) -> list[RequestId]:
        """The content of these borrowed blocks is lost: requests that held any of them begin anew."""
        assert self._step is None
        lost = set(kv_blocks)
        victims = [
            request
            for request in self._running
            if any(not lost.isdisjoint(sequence.kv_blocks) for sequence in request.live)
        ]
        for request in victims:
            self._preempt(Victim(request, swap=False))
        return [request.id for request in victims]

    def give_way(self) -> RequestId | None:
        """Take its blocks from the request that starves, if one does and has any."""
        assert self._step is None
        request = self._requests.get(self._starving) if self._starving is not None else None
        if request is None or not request.running:
            return None
        self._preempt(Victim(request, swap=False))
        return request.id

    @property
    def borrowable_blocks(self) -> int:
        """Most blocks that may be borrowed at once."""
        return self._limits.borrowable_blocks

    def wanted_blocks(self) -> int:
        """Blocks that are short, beyond those promised; see `lending_facts`."""
        return max(0, self.short_blocks() - self._pool.promised_blocks)

    def lending_facts(self) -> LendingFacts:
        """What lending decides on; walks the running requests."""
        computed = [sum(each.computed_tokens for each in request.live) for request in self._running]
        order = sorted(range(len(computed)), key=lambda place: -computed[place])[:_TOLD_REQUESTS]
        counted = [*self._running, *self._waiting[:1]]
        starving = self.starving
        known_tokens = sum(len(each.token_ids) for request in counted for each in request.live)
        return LendingFacts(
            running=len(self._running),
            waiting=len(self._waiting),
            short_blocks=self.short_blocks(),
            computed_tokens=sum(computed),
            mean_request_tokens=known_tokens / max(1, len(counted)),
            starving_order=self._requests[starving].order[0] if starving is not None else None,
            requests=tuple(
                PlacedRequest(
                    self._running[place].id,
                    computed[place],
                    _distinct_blocks(self._running[place]),
                )
                for place in order
            ),
        )

    @property
    def starving(self) -> RequestId | None:
        """The first request, if the latest step gave it nothing for want of blocks."""
        return self._starving if self._starving in self._requests else None

    def short_blocks(self) -> int:
        """As in `lending_facts`."""
        blocks_for = self._pool.blocks_for
        wanted = 0
        for request in [*self._running, *self._waiting[:1]]:
            for sequence in request.live:
                wanted += blocks_for(len(sequence.token_ids)) - len(sequence.kv_blocks) + 1
        return wanted - self._pool.free_blocks

    # What is known about requests and the whole.

    def token_ids(self, request_id: RequestId, sequence: int) -> Sequence[int]:
        """All tokens known of a sequence, prompt included."""
        return self._requests[request_id].sequences[sequence].token_ids

    def cached_tokens(self, request_id: RequestId) -> int:
        """Prompt tokens that a request found in the prefix cache when it was first admitted."""
        return self._requests[request_id].cached_tokens

    @property
    def has_requests(self) -> bool:
        """Whether anything is waiting or running."""
        return bool(self._requests)

    def counts(self) -> SchedulerCounts:
        """What is going on and what has been."""
        return SchedulerCounts(
            running_requests=len(self._running),
            running_sequences=self._running_sequences,
            waiting_requests=len(self._waiting),
            resting_requests=len(self._resting),
            swapped_requests=sum(request.swapped for request in self._off_device()),
            kv_blocks=self._pool.kv_blocks,
            used_kv_blocks=self._pool.used_blocks,
            free_kv_blocks=self._pool.free_blocks,
            cached_kv_blocks=self._pool.cached_blocks,
            host_kv_blocks=self._host_pool.kv_blocks if self._host_pool else 0,
            used_host_kv_blocks=self._host_pool.used_blocks if self._host_pool else 0,
            preemptions_total=self._preemptions_total,
            swaps_total=self._swaps_total,
            prefix_query_tokens_total=self._prefix_query_tokens_total,
            prefix_hit_tokens_total=self._prefix_hit_tokens_total,
        )

    def kv_usage(self) -> KvUsage:
        """How much of the memory held by running requests is filled; walks every block table."""
        return kv_usage(self._running, self._pool.block_tokens)

    def check(self, others: Sequence[Sequence[int]] = ()) -> None:
        """Assert every invariant, given who else holds blocks; walks everything."""
        for queue, running in ((self._running, True), (self._waiting, False)):
            orders = [request.order for request in queue]
            assert orders == sorted(set(orders)), "a queue is out of order"
            for request in queue:
                assert request.running == running and self._requests[request.id] is request
                assert not request.resting and (running or not request.fed or request.has_news)
                self._check_request(request)
        for id, request in self._resting.items():
            assert request.fed and request.resting and self._requests[id] is request and not request.running
            assert not request.has_news
            self._check_request(request)
        assert len(self._requests) == len(self._running) + len(self._waiting) + len(self._resting)
        assert self._running_sequences == sum(request.fan_out for request in self._running)
        assert self._running_sequences <= self._limits.admissible_sequences
        on_host = [sequence.kv_blocks for request in self._off_device() for sequence in request.live]
        tables = [sequence.kv_blocks for request in self._running for sequence in request.live]
        self._pool.check([*tables, *(request.reserve for request in self._running), *others])
        if self._host_pool is not None:
            self._host_pool.check(on_host)
        else:
            assert not any(on_host), "a waiting request holds blocks without a host pool"

    # Parts of the above.

    def _unserved(self, chunks: Sequence[ScheduledChunk]) -> RequestId | None:
        """The first request, if it lacks blocks to go on with."""
        for request in self._running[:1] or self._waiting[:1]:
            if not request.idle and all(chunk.request_id != request.id for chunk in chunks):
                return request.id if self.short_blocks() > 0 else None
        return None

    def _view(self) -> SchedulerView:
        return SchedulerView(
            running=self._running,
            waiting=self._waiting,
            running_sequences=self._running_sequences,
            pool=self._pool,
            host_pool=self._host_pool,
            limits=self._limits,
        )

    def _off_device(self) -> Iterator[ScheduledRequest]:
        return chain(self._waiting, self._resting.values())

    def _refuse_impossible(self, request: NewRequest) -> None:
        assert request.id not in self._requests, f"request id {request.id!r} is in use"
        assert request.fan_out >= 1 and request.max_sequence_tokens > len(request.token_ids)
        assert not request.fed or (request.fan_out == 1 and not self._policy.reserves)
        if not request.token_ids and not request.fed:
            raise BadRequest("the prompt is empty; send at least one token", param="prompt")
        pool = self._pool
        needed = worst_case_blocks(request, pool.block_tokens, sharing=not self._policy.reserves)
        held = pool.kv_blocks + self._limits.borrowable_blocks
        if needed > held:
            raise BadRequest(
                f"{request.fan_out} sequence(s) of up to {request.max_sequence_tokens} tokens need {needed} "
                f"KV blocks of {pool.block_tokens} tokens, and the whole cache has {held}; "
                "ask for fewer tokens or sequences, or start the server with a larger --kv-cache-memory",
                param="max_tokens",
            )
        if request.fan_out > self._limits.admissible_sequences:
            raise BadRequest(
                f"{request.fan_out} sequences side by side were asked, this server runs at most "
                f"{self._limits.admissible_sequences}; ask for fewer, or start it with a larger "
                "--max-num-seqs and --max-num-batched-tokens",
                param="n",
            )

    def _leave_queue(self, request: ScheduledRequest) -> None:
        if request.resting:
            del self._resting[request.id]
            request.resting = False
            return
        queue = self._running if request.running else self._waiting
        place = bisect_left(queue, request.order, key=_order)
        assert queue[place] is request
        del queue[place]
        if request.running:
            self._running_sequences -= request.fan_out

    def _join_queue(self, request: ScheduledRequest, *, running: bool) -> None:
        request.running = running
        insort(self._running if running else self._waiting, request, key=_order)
        if running:
            self._running_sequences += request.fan_out

    def _wait_or_rest(self, request: ScheduledRequest) -> None:
        """Put a request that does not run where it belongs; it waits only if that can bring something new."""
        if request.fed and not request.has_news:
            request.running, request.resting = False, True
            self._resting[request.id] = request
        else:
            self._join_queue(request, running=False)

    def _release(self, request: ScheduledRequest, sequence: ScheduledSequence) -> None:
        """Empty a block table."""
        kv_blocks, sequence.kv_blocks = sequence.kv_blocks, []
        self._give_back(request, kv_blocks)

    def _give_back(self, request: ScheduledRequest, kv_blocks: Sequence[int]) -> None:
        """Let go of blocks of a table; what was reserved for the request goes back to its reserve."""
        if request.swapped:
            assert self._host_pool is not None
            self._host_pool.release(kv_blocks)
        elif self._policy.reserves:
            last_held = [block for block in kv_blocks if self._pool.references(block) == 1]
            request.reserve += last_held
            self._pool.share(last_held)
            self._pool.release(kv_blocks)
        else:
            self._pool.release(kv_blocks)

    def _take(self, request: ScheduledRequest, kv_blocks: int) -> list[int]:
        if not self._policy.reserves:
            return self._pool.allocate(kv_blocks)
        kept = len(request.reserve) - kv_blocks
        assert kept >= 0, f"{request.id!r} outgrew its reserve"
        taken = request.reserve[kept:]
        del request.reserve[kept:]
        return taken

    def _preempt(self, victim: Victim) -> list[tuple[int, int]]:
        """Take the blocks of a request back; returns (device, host) pairs to copy."""
        request = victim.request
        self._leave_queue(request)
        self._wait_or_rest(request)
        self._preemptions_total += 1
        if not victim.swap:
            request.stem_tokens = 0
            for sequence in request.live:
                self._release(request, sequence)
                sequence.computed_tokens = 0
                sequence.published_blocks = 0
            return []
        assert self._host_pool is not None
        self._swaps_total += 1
        pairs = _move(request, self._pool, self._host_pool)
        request.swapped = True
        return pairs

    def _admit(self, admissions: Sequence[Admission]) -> list[tuple[int, int]]:
        """Start or resume requests; returns (host, device) pairs to copy."""
        # Cached blocks are taken back before anything is allocated, which could overwrite them.
        for admission in admissions:
            request = admission.request
            self._leave_queue(request)
            self._join_queue(request, running=True)
            request.stem_tokens = admission.stem_tokens
            if request.stem_tokens:
                self._rebuilding.append(request)
            for sequence, prefix in zip(request.live, admission.prefixes, strict=bool(admission.prefixes)):
                sequence.kv_blocks = self._pool.fork(prefix)
                sequence.published_blocks = len(prefix)
                sequence.computed_tokens = len(prefix) * self._pool.block_tokens
            if not request.started:
                request.started = True
                request.cached_tokens = request.live[0].computed_tokens
                if request.reuse_prefix and not self._policy.reserves:
                    self._prefix_query_tokens_total += request.prompt_tokens
                    self._prefix_hit_tokens_total += request.cached_tokens
        swap_in: list[tuple[int, int]] = []
        for admission in admissions:
            request = admission.request
            if request.swapped:
                assert self._host_pool is not None
                swap_in += _move(request, self._host_pool, self._pool)
                request.swapped = False
                for sequence in request.live:
                    sequence.published_blocks = 0
            elif admission.reserved_blocks:
                request.reserve = self._pool.allocate(admission.reserved_blocks)
        return swap_in

    def _place(self, grants: Sequence[Grant]) -> tuple[list[ScheduledChunk], list[tuple[int, int]]]:
        """Turn granted tokens into chunks with room in their block tables."""
        block_tokens = self._pool.block_tokens
        chunks: list[ScheduledChunk] = []
        copies: list[tuple[int, int]] = []
        in_flight = self._in_flight
        for request, tokens in grants:
            sole = request.sole
            if sole is not None:
                start = sole.computed_tokens
                end = start + tokens
                kv_blocks = sole.kv_blocks
                if end > len(kv_blocks) * block_tokens:
                    kv_blocks.extend(self._take(request, self._pool.blocks_for(end) - len(kv_blocks)))
                samples = end == len(sole.token_ids)
                chunks.append(ScheduledChunk(request.id, sole.index, start, tokens, samples, kv_blocks))
                in_flight.append(sole)
                continue
            starts = [sequence.computed_tokens for sequence in request.live]
            parts = split_tokens(request, starts, request.stem_tokens, tokens)
            for sequence, start, part in zip(request.live, starts, parts, strict=True):
                if part:
                    self._make_room(request, sequence, start + part, copies)
                    samples = start + part == len(sequence.token_ids)
                    chunks.append(
                        ScheduledChunk(request.id, sequence.index, start, part, samples, sequence.kv_blocks)
                    )
                    in_flight.append(sequence)
        return chunks, copies

    def _make_room(
        self,
        request: ScheduledRequest,
        sequence: ScheduledSequence,
        tokens: int,
        copies: list[tuple[int, int]],
    ) -> None:
        """Let a sequence of a group write up to `tokens`, in blocks that nobody else holds."""
        kv_blocks = sequence.kv_blocks
        if sequence.computed_tokens % self._pool.block_tokens:
            shared = kv_blocks[-1]
            if self._pool.references(shared) > 1:
                kv_blocks[-1:] = self._take(request, 1)
                self._pool.release([shared])
                copies.append((shared, kv_blocks[-1]))
        kv_blocks.extend(self._take(request, self._pool.blocks_for(tokens) - len(kv_blocks)))

    def _publish(self, sequence: ScheduledSequence) -> None:
        full_blocks = sequence.computed_tokens // self._pool.block_tokens
        keys = sequence.block_keys(full_blocks, self._pool.block_tokens)
        for place in range(sequence.published_blocks, full_blocks):
            self._pool.publish(sequence.kv_blocks[place], keys[place])
        sequence.published_blocks = full_blocks

    def _share_stem(self, request: ScheduledRequest) -> bool:
        """Give a resumed group its stem once its first sequence has computed it; True if that is settled."""
        if not (request.running and request.stem_tokens):
            return True
        first, *others = request.live
        if first.computed_tokens < request.stem_tokens:
            return False
        blocks = request.stem_tokens // self._pool.block_tokens
        for sequence in others:
            sequence.kv_blocks = self._pool.fork(first.kv_blocks[:blocks])
            sequence.computed_tokens = request.stem_tokens
            sequence.published_blocks = blocks
        request.stem_tokens = 0
        return True

    def _check_request(self, request: ScheduledRequest) -> None:
        pool = self._pool
        assert request.live, f"{request.id!r} has no live sequence"
        assert request.live == [sequence for sequence in request.sequences if not sequence.finished]
        assert request.sole is (request.live[0] if len(request.live) == 1 else None)
        assert len(request.live) <= request.fan_out
        assert request.running or not request.reserve
        assert not (request.running and request.swapped)
        for sequence in request.live:
            assert 0 <= sequence.computed_tokens <= len(sequence.token_ids) <= request.max_sequence_tokens
            assert sequence.published_blocks <= sequence.computed_tokens // pool.block_tokens
            assert request.sequences[sequence.index] is sequence
            covered = pool.blocks_for(sequence.computed_tokens)
            if self._step is None or sequence not in self._in_flight:
                assert len(sequence.kv_blocks) == covered, (
                    f"{request.id!r} holds blocks that it does not fill"
                )
            else:
                assert len(sequence.kv_blocks) >= covered
            if not request.running and not request.swapped:
                assert not sequence.kv_blocks


def _distinct_blocks(request: ScheduledRequest) -> Sequence[int]:
    """Blocks of the tables of a request, each once: of one sequence, its table itself."""
    if request.sole is not None:
        return request.sole.kv_blocks
    return list(dict.fromkeys(block for each in request.live for block in each.kv_blocks))


def _order(request: ScheduledRequest) -> tuple[int, int]:
    return request.order


def _move(request: ScheduledRequest, source: KvBlockPool, target: KvBlockPool) -> list[tuple[int, int]]:
    """Move the tables of a request to another pool, shared as before; returns (source, target) pairs."""
    tables = [sequence.kv_blocks for sequence in request.live]
    distinct = list(dict.fromkeys(block for table in tables for block in table))
    moved = dict(zip(distinct, target.allocate(len(distinct)), strict=True))
    unclaimed = set(distinct)
    for sequence, table in zip(request.live, tables, strict=True):
        sequence.kv_blocks = [moved[block] for block in table]
        target.share(moved[block] for block in table if block not in unclaimed)
        unclaimed.difference_update(table)
        source.release(table)
    return list(moved.items())
