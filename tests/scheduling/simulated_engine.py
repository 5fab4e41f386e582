"""An engine without tensors: it runs steps on blocks that hold, for every token, which prefix it belongs to.

What a real cache would hold at a position depends on all tokens up to it, so the stand-in is a hash of
these. Each chunk checks that its sequence reads exactly its own history, through every share, copy, swap
and prefix hit, and that it writes nothing that anybody else holds.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from plait.ids import RequestId
from plait.kvcache import KvBlockPool
from plait.scheduling import NewRequest, ScheduledStep, Scheduler, StepLimits, policy_named


@dataclass
class Submitted:
    """What a test knows of a request; the scheduler's own books are not asked."""

    order: tuple[int, int]
    namespace: bytes
    token_ids: dict[int, list[int]]
    fan_out: int
    max_sequence_tokens: int
    computed: dict[int, int] = field(default_factory=dict)
    running: bool = False
    forked: bool = False
    iterations: int = 0
    fed: bool = False
    seen: int = 0
    asks: bool = True
    """Whether it has something new to compute; False between the pieces of what a fed request is given."""


class SimulatedEngine:
    """A scheduler, the blocks it manages, and rules that every step must keep."""

    def __init__(
        self,
        policy: str = "paged",
        *,
        kv_blocks: int = 64,
        block_tokens: int = 4,
        host_blocks: int = 0,
        **limits: object,
    ) -> None:
        self.policy = policy
        self.block_tokens = block_tokens
        self.pool = KvBlockPool(kv_blocks, block_tokens)
        self.host_pool = KvBlockPool(host_blocks, block_tokens) if host_blocks else None
        self.limits = StepLimits(**limits)  # pyright: ignore[reportArgumentType]  tests pass any limit
        self.scheduler = Scheduler(policy_named(policy), self.pool, self.host_pool, self.limits)
        self.device: list[list[int | None]] = [[None] * block_tokens for _ in range(kv_blocks)]
        self.host: list[list[int | None]] = [[None] * block_tokens for _ in range(host_blocks)]
        self.requests: dict[RequestId, Submitted] = {}
        self.arrivals = 0

    def submit(
        self,
        prompt: list[int],
        *,
        new_tokens: int = 8,
        fan_out: int = 1,
        priority: int = 0,
        namespace: bytes = b"",
        reuse_prefix: bool = True,
        fed: bool = False,
    ) -> RequestId:
        """Submit under the next free id."""
        request_id = RequestId(f"r{self.arrivals}")
        self.scheduler.submit(
            NewRequest(
                id=request_id,
                token_ids=prompt,
                max_sequence_tokens=len(prompt) + new_tokens,
                fan_out=fan_out,
                priority=priority,
                namespace=namespace,
                reuse_prefix=reuse_prefix,
                fed=fed,
            )
        )
        self.requests[request_id] = Submitted(
            order=(priority, self.arrivals),
            namespace=namespace,
            token_ids={0: list(prompt)},
            fan_out=fan_out,
            max_sequence_tokens=len(prompt) + new_tokens,
            fed=fed,
            asks=bool(prompt),
        )
        self.arrivals += 1
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Cancel; cancelling twice is fine."""
        self.scheduler.cancel(request_id)
        self.requests.pop(request_id, None)

    def append(self, request_id: RequestId, sequence: int, token_id: int) -> None:
        """Add a token here and there."""
        self.scheduler.append(request_id, sequence, token_id)
        self.requests[request_id].token_ids[sequence].append(token_id)

    def feed(self, request_id: RequestId, start: int, token_ids: list[int]) -> None:
        """Extend here and there."""
        self.scheduler.extend(request_id, start, token_ids)
        request = self.requests[request_id]
        request.token_ids[0][start:] = token_ids
        request.computed[0] = min(request.computed.get(0, 0), start)
        request.seen = min(request.seen, start)
        request.asks = len(request.token_ids[0]) > request.seen

    def fork(self, request_id: RequestId, parents: tuple[int, ...]) -> None:
        """Fork here and there."""
        self.scheduler.fork(request_id, parents)
        request = self.requests[request_id]
        old = request.token_ids
        request.token_ids = {index: list(old[parent]) for index, parent in enumerate(parents)}
        computed = request.computed
        request.computed = {index: computed[parent] for index, parent in enumerate(parents)}
        request.forked = True

    def finish_sequence(self, request_id: RequestId, sequence: int) -> None:
        """Finish here and there."""
        self.scheduler.finish_sequence(request_id, sequence)
        del self.requests[request_id].token_ids[sequence]
        if not self.requests[request_id].token_ids:
            del self.requests[request_id]

    def begin_step(self) -> ScheduledStep:
        """Schedule, check what a step must keep, and run it."""
        before = {request_id for request_id, request in self.requests.items() if request.running}
        step = self.scheduler.schedule()
        self.scheduler.check(self.other_holders())
        for request_id in step.preempted:
            self.requests[request_id].running = False
        for request_id in step.admitted:
            self.requests[request_id].running = True
        self._check_order(step, before)
        self._check_budget(step)
        self._check_gangs(step)
        self._run(step)
        return step

    def end_step(self, step: ScheduledStep) -> list[tuple[RequestId, int]]:
        """Complete; returns the (request, sequence) pairs that sample."""
        self.scheduler.complete(step)
        self.scheduler.check(self.other_holders())
        alive = [chunk for chunk in step.chunks if chunk.request_id in self.requests]
        for chunk in alive:
            request = self.requests[chunk.request_id]
            if request.fed:
                request.seen = max(request.seen, chunk.start + chunk.tokens)
                request.asks = len(request.token_ids[0]) > request.seen
        for request_id in {chunk.request_id for chunk in alive}:
            self.requests[request_id].iterations += 1
        return [
            (chunk.request_id, chunk.sequence)
            for chunk in alive
            if chunk.samples
            and chunk.sequence in self.requests[chunk.request_id].token_ids
            and not self.requests[chunk.request_id].fed
        ]

    def step(self) -> ScheduledStep:
        """Run a step and sample token 7 wherever one is due; requests fork once and end at their maximum."""
        step = self.begin_step()
        for request_id, sequence in self.end_step(step):
            request = self.requests[request_id]
            if request.fan_out > 1 and not request.forked:
                self.fork(request_id, (0,) * request.fan_out)
                for child in range(request.fan_out):
                    self.append(request_id, child, child)
            else:
                self.append(request_id, sequence, 7)
            self.end_the_long(request_id)
        self.scheduler.check(self.other_holders())
        return step

    def end_the_long(self, request_id: RequestId) -> None:
        """Finish the sequences of a request that have reached their maximum."""
        request = self.requests[request_id]
        for sequence, token_ids in list(request.token_ids.items()):
            if len(token_ids) == request.max_sequence_tokens:
                self.finish_sequence(request_id, sequence)

    def step_until(self, done: Callable[[ScheduledStep], object], max_steps: int = 200) -> ScheduledStep:
        """Step until a step is as wanted; fails if none comes."""
        for _ in range(max_steps):
            step = self.step()
            if done(step):
                return step
        raise AssertionError(f"no such step in {max_steps}")

    def run_until_idle(self, max_steps: int = 2000) -> list[ScheduledStep]:
        """Step until nothing is left; fails if that does not come."""
        steps: list[ScheduledStep] = []
        while self.requests:
            steps.append(self.step())
            assert len(steps) < max_steps, f"{len(self.requests)} requests never ended"
        self.check_nothing_is_left()
        return steps

    def check_nothing_is_left(self) -> None:
        """All blocks are free or cached-free."""
        assert not self.scheduler.has_requests
        assert self.pool.used_blocks == 0
        assert self.host_pool is None or self.host_pool.used_blocks == 0
        self.scheduler.check(self.other_holders())

    def other_holders(self) -> list[list[int]]:
        """Who holds blocks besides the scheduler."""
        return []

    def _check_order(self, step: ScheduledStep, before: set[RequestId]) -> None:
        gave_way = [id for id in step.preempted if not self.requests[id].asks]
        if not gave_way:
            assert not (step.admitted and step.preempted), "somebody was admitted in a step with preemption"
        waiting = [each.order for each in self.requests.values() if not each.running and each.asks]
        running = [request.order for request in self.requests.values() if request.running]
        for request_id in step.admitted:
            order = self.requests[request_id].order
            assert all(order < other for other in waiting), f"{request_id} overtook somebody"
        if step.admitted and gave_way:
            first = min(self.requests[id].order for id in step.admitted)
            assert all(first < self.requests[id].order for id in gave_way), "who is earlier gave way"
            running = [each.order for each in self.requests.values() if each.running and not each.asks]
            running = [order for order in running if order > first]
        for request_id in step.preempted:
            order = self.requests[request_id].order
            assert all(order > other for other in running), f"{request_id} was not the last"
        if self.policy != "paged":
            assert not step.preempted
        if self.policy == "static" and step.admitted:
            assert not before, "somebody joined a batch"

    def _check_budget(self, step: ScheduledStep) -> None:
        prompts = [chunk for chunk in step.chunks if chunk.tokens > 1]
        if self.policy == "paged" or len(prompts) != 1:
            assert step.tokens <= self.limits.step_tokens
        running = [request.fan_out for request in self.requests.values() if request.running]
        assert sum(running) <= self.limits.max_running_sequences

    def _check_gangs(self, step: ScheduledStep) -> None:
        samples = {(chunk.request_id, chunk.sequence) for chunk in step.chunks if chunk.samples}
        stepping = {chunk.request_id for chunk in step.chunks}
        assert all(self.requests[request_id].running for request_id in stepping)
        for request_id, request in self.requests.items():
            sampling = {index for owner, index in samples if owner == request_id}
            assert sampling in (set(), set(request.token_ids)), f"{request_id} did not step together"
            decoding = all(
                len(token_ids) - request.computed.get(index, 0) == 1
                for index, token_ids in request.token_ids.items()
            )
            if request.running and decoding and request_id not in step.admitted:
                assert sampling, f"{request_id} was decoding and got no token"

    def _run(self, step: ScheduledStep) -> None:
        for source, target in step.swap_out:
            self.host[target] = list(self.device[source])
        for source, target in step.swap_in:
            self.device[target] = list(self.host[source])
        for source, target in step.copies:
            self.device[target] = list(self.device[source])
        writes: Counter[int] = Counter()
        for chunk in step.chunks:
            contents = self._contents(chunk.request_id, chunk.sequence)
            assert len(chunk.kv_blocks) == self.pool.blocks_for(chunk.start + chunk.tokens)
            for position in range(chunk.start):
                assert self._read(chunk.kv_blocks, position) == contents[position], (
                    f"{chunk.request_id}[{chunk.sequence}] would read a stranger's token at {position}"
                )
            for place in range(chunk.start // self.block_tokens, len(chunk.kv_blocks)):
                writes[chunk.kv_blocks[place]] += 1
                assert self.pool.references(chunk.kv_blocks[place]) == 1, "a shared block would be written"
        assert not writes or max(writes.values()) == 1, "two chunks would write one block"
        for chunk in step.chunks:
            contents = self._contents(chunk.request_id, chunk.sequence)
            for position in range(chunk.start, chunk.start + chunk.tokens):
                block = self.device[chunk.kv_blocks[position // self.block_tokens]]
                block[position % self.block_tokens] = contents[position]
        for request in self.requests.values():
            if not request.running:
                request.computed = {}
        for chunk in step.chunks:
            self.requests[chunk.request_id].computed[chunk.sequence] = chunk.start + chunk.tokens

    def _read(self, kv_blocks: object, position: int) -> int | None:
        assert isinstance(kv_blocks, list)
        return self.device[kv_blocks[position // self.block_tokens]][position % self.block_tokens]

    def _contents(self, request_id: RequestId, sequence: int) -> list[int]:
        request = self.requests[request_id]
        token_ids = request.token_ids[sequence]
        assert list(self.scheduler.token_ids(request_id, sequence)) == token_ids
        contents: list[int] = []
        parent = hash(request.namespace)
        for token_id in token_ids:
            parent = hash((parent, token_id))
            contents.append(parent)
        return contents
