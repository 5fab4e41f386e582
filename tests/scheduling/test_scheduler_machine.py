"""Random lives of random requests under every policy; the simulated engine checks each step."""

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated_engine import SimulatedEngine

from plait.errors import BadRequest, NoCapacity
from plait.ids import RequestId

# Two tokens and prompts grown from a common one: prefixes are often shared, often not.
prompts = st.builds(
    lambda shared, own: [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1][:shared] + own,
    st.integers(0, 12),
    st.lists(st.integers(0, 1), min_size=1, max_size=10),
)
Choice = TypeVar("Choice")
decisions = st.integers(0, 2**32 - 1)


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, step, cancel (also while a step is in flight), until everything has ended."""

    policy = ""
    engine: SimulatedEngine

    @initialize(
        kv_blocks=st.integers(6, 40),
        block_tokens=st.sampled_from([1, 3, 4]),
        host_blocks=st.sampled_from([0, 4, 30]),
        step_tokens=st.integers(3, 40),
        max_running_sequences=st.integers(3, 12),
        long_prefill_tokens=st.sampled_from([None, 1, 5]),
        watermark_fraction=st.sampled_from([0.0, 0.1]),
        preemption=st.sampled_from(["recompute", "swap", "auto"]),
    )
    def start(self, **sizes: object) -> None:
        self.engine = SimulatedEngine(self.policy, max_waiting=6, **sizes)  # pyright: ignore[reportArgumentType]
        self.beams: set[RequestId] = set()

    @rule(
        prompt=prompts,
        new_tokens=st.integers(1, 8),
        fan_out=st.sampled_from([1, 1, 2, 3]),
        beam=st.booleans(),
        priority=st.sampled_from([0, 0, 1]),
        namespace=st.sampled_from([b"one", b"one", b"two"]),
        reuse_prefix=st.sampled_from([True, True, False]),
    )
    def submit(self, prompt: list[int], beam: bool, **asked: object) -> None:
        self.submit_one(prompt, beam=beam, **asked)

    def submit_one(self, prompt: list[int], *, beam: bool, **asked: object) -> None:
        try:
            request_id = self.engine.submit(prompt, **asked)  # pyright: ignore[reportArgumentType]
        except (BadRequest, NoCapacity):
            return
        if beam:
            self.beams.add(request_id)

    @rule(prompt_list=st.lists(prompts, min_size=3, max_size=6), new_tokens=st.integers(4, 12))
    def submit_a_burst(self, prompt_list: list[list[int]], new_tokens: int) -> None:
        for prompt in prompt_list:
            fan_out = 2 if len(prompt) % 3 == 0 else 1
            self.submit_one(prompt, beam=len(prompt) % 2 == 0, new_tokens=new_tokens, fan_out=fan_out)

    @precondition(lambda self: len(self.engine.requests) > 2)
    @rule(decision=decisions)
    def cancel(self, decision: int) -> None:
        self.engine.cancel(self.pick(sorted(self.engine.requests), decision))
        self.engine.scheduler.check()

    @precondition(lambda self: self.engine.requests)
    @rule(decisions=st.lists(decisions, min_size=1, max_size=6), cancel_in_flight=st.integers(0, 9))
    def step(self, decisions: list[int], cancel_in_flight: int) -> None:
        step = self.engine.begin_step()
        if cancel_in_flight == 0 and self.engine.requests:
            self.engine.cancel(self.pick(sorted(self.engine.requests), decisions[0]))
            self.engine.scheduler.check()
        due: dict[RequestId, list[int]] = {}
        for request_id, sequence in self.engine.end_step(step):
            due.setdefault(request_id, []).append(sequence)
        for place, (request_id, sequences) in enumerate(due.items()):
            self.sample(request_id, sequences, decisions[place % len(decisions)])
        self.engine.scheduler.check()

    def sample(self, request_id: RequestId, sequences: Sequence[int], decision: int) -> None:
        """Fork the first time, at every step for beams; append; sometimes end a sequence early."""
        request = self.engine.requests[request_id]
        if request.fan_out > 1 and (request_id in self.beams or not request.forked):
            parents = [self.pick(sequences, decision >> (3 * child)) for child in range(request.fan_out)]
            self.engine.fork(request_id, tuple(parents))
        for sequence in list(request.token_ids):
            self.engine.append(request_id, sequence, (decision >> sequence) & 1)
        if request.forked and request_id not in self.beams and decision % 5 == 0:
            self.engine.finish_sequence(request_id, self.pick(list(request.token_ids), decision >> 4))
        if request_id in self.engine.requests:
            self.engine.end_the_long(request_id)

    @staticmethod
    def pick(choices: Sequence[Choice], decision: int) -> Choice:
        return choices[decision % len(choices)]

    def teardown(self) -> None:
        """Everything that was submitted ends, in bounded steps, and leaves nothing behind."""
        if hasattr(self, "engine"):
            self.engine.run_until_idle(max_steps=600)


class StaticMachine(SchedulerMachine):
    policy = "static"


class OrcaMachine(SchedulerMachine):
    policy = "orca"


class PagedMachine(SchedulerMachine):
    policy = "paged"


StaticMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
OrcaMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
PagedMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestStatic = StaticMachine.TestCase
TestOrca = OrcaMachine.TestCase
TestPaged = PagedMachine.TestCase
