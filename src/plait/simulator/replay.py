"""A recorded live run, simulated again with the times that its steps took: both must decide the same.

The engine tells what each step computed and when it began. What was added since the step before counts as arrived when
the next one began, and a step lasts until then: so the simulated scheduler sees exactly what the live one saw, and
whatever it then does otherwise is an error of the simulator (or of the record), not of costs.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from plait.costs import CostModel, IdealSeconds, StepWork
from plait.ids import RequestId
from plait.scheduling import ScheduledStep
from plait.simulator.cluster_run import ClusterRun, RunOptions
from plait.simulator.event_heap import NS_PER_S, ns_of
from plait.simulator.flight import Flight
from plait.simulator.outcomes import Ending
from plait.simulator.simulated_network import LinkSpec, NetworkSpec
from plait.simulator.simulated_worker import MachineSpec, SimulatedWorker
from plait.simulator.timeline import Timeline
from plait.workload import TraceRequest

_NO_WAY = LinkSpec(one_way_s=0.0, bandwidth_bytes_per_s=1e18)


class Decision(NamedTuple):
    """What a scheduler decided for one step. Chunks are (request, first position, tokens, whether it samples): a first
    chunk that begins behind 0 is a prefix hit. Then who was admitted and who preempted, and KV blocks swapped out and
    in, and copied."""

    chunks: tuple[tuple[RequestId, int, int, bool], ...]
    admitted: tuple[RequestId, ...]
    preempted: tuple[RequestId, ...]
    moved_blocks: tuple[int, int, int]


def decision_of(step: ScheduledStep) -> Decision:
    """What of a step can be compared between runs."""
    return Decision(
        tuple((chunk.request_id, chunk.start, chunk.tokens, chunk.samples) for chunk in step.chunks),
        step.admitted,
        step.preempted,
        (len(step.swap_out), len(step.swap_in), len(step.copies)),
    )


def work_of(decision: Decision) -> StepWork:
    """What a step computed, as costs see it."""
    return StepWork(
        tuple(tokens for _, _, tokens, _ in decision.chunks),
        tuple(start for _, start, _, _ in decision.chunks),
        sum(samples for _, _, _, samples in decision.chunks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One step of a live engine; `began_s` by a clock that the whole record shares."""

    decision: Decision
    began_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """A request that a live engine took at `added_s`; `arrival_s` of `request` does not matter."""

    id: RequestId
    added_s: float
    request: TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What came of a replay: decisions of both, and the number of the first step that differs, if one does."""

    live: tuple[Decision, ...]
    simulated: tuple[Decision, ...]
    preemptions: int
    prefix_hit_tokens: int

    @property
    def first_difference(self) -> int | None:
        pairs = zip(self.live, self.simulated, strict=False)
        unequal = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
        if unequal is None and len(self.live) != len(self.simulated):
            return min(len(self.live), len(self.simulated))
        return unequal


class DecisionLog(Timeline):
    """Keeps what was decided, and nothing else; `began_ns` of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []
        self.began_ns: list[int] = []

    def step(self, worker: SimulatedWorker, step: ScheduledStep, began_ns: int, ended_ns: int) -> None:
        del worker, ended_ns
        self.decisions.append(decision_of(step))
        self.began_ns.append(began_ns)

    def request(self, flight: Flight, ending: Ending) -> None:
        del flight, ending


class RecordedCosts:
    """A `CostModel` whose steps take what those of a live run took, in their order; the rest is that of `model`."""

    def __init__(self, model: CostModel, steps_s: Iterable[float]) -> None:
        self._model = model
        self._steps_s = tuple(steps_s)
        self._next: int | None = None

    def begin(self) -> None:
        """From now on questions are about the steps of the run; those before (rates to announce) were not."""
        self._next = 0

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self._model.kv_bytes_per_token

    @property
    def hidden_bytes_per_token(self) -> int:
        return self._model.hidden_bytes_per_token

    @property
    def idle_watts(self) -> float:
        return self._model.idle_watts

    @property
    def extrapolated_steps(self) -> int:
        return 0

    def step_s(self, work: StepWork) -> float:
        if self._next is None:
            return self._model.step_s(work)
        # One that decides otherwise may need more steps than were recorded.
        step_s = self._steps_s[min(self._next, len(self._steps_s) - 1)]
        self._next += 1
        return step_s

    def attention_s(self, work: StepWork) -> float:
        return self._model.attention_s(work)

    def host_s(self, work: StepWork) -> float:
        return 0.0 if self._next is not None else self._model.host_s(work)

    def ideal(self, work: StepWork) -> IdealSeconds | None:
        return self._model.ideal(work)

    def energy_j(self, work: StepWork) -> float:
        return self._model.energy_j(work)


def replay(
    machine: MachineSpec, steps: Sequence[RecordedStep], requests: Sequence[RecordedRequest]
) -> Replayed:
    """Simulate a recorded run on one `machine` that is as the live one was, but for its costs.

    `requests` have all run to their end; `steps` are all of the run, which is not empty.
    """
    zero_ns = min(ns_of(steps[0].began_s), *(ns_of(each.added_s) for each in requests))
    began_ns = [ns_of(step.began_s) - zero_ns for step in steps]
    in_order = sorted(requests, key=lambda each: each.added_s)
    trace: list[TraceRequest] = []
    place = 0
    for each in in_order:
        while place < len(steps) - 1 and steps[place].began_s < each.added_s:
            place += 1
        trace.append(replace(each.request, arrival_s=began_ns[place] / NS_PER_S))
    lasted_s = [(end - begin) / NS_PER_S for begin, end in itertools.pairwise(began_ns)]
    costs = RecordedCosts(machine.costs, [*lasted_s, 1e-3])
    log = DecisionLog()
    run = ClusterRun(
        [replace(machine, costs=costs)],
        NetworkSpec(within=_NO_WAY, between=_NO_WAY),
        model_blocks=len(machine.blocks),
        options=RunOptions(check="end"),
        requests=trace,
        timeline=log,
    )
    costs.begin()
    run.run()
    totals = next(iter(run.workers.values())).totals
    return Replayed(
        live=_renamed(steps, {each.id: RequestId(f"r{number}") for number, each in enumerate(in_order)}),
        simulated=tuple(log.decisions),
        preemptions=totals.preemptions,
        prefix_hit_tokens=totals.prefix_hit_tokens,
    )


def _renamed(steps: Sequence[RecordedStep], names: dict[RequestId, RequestId]) -> tuple[Decision, ...]:
    """Decisions under the names that a run gives."""
    return tuple(
        Decision(
            tuple((names[id], start, tokens, samples) for id, start, tokens, samples in step.decision.chunks),
            tuple(names[id] for id in step.decision.admitted),
            tuple(names[id] for id in step.decision.preempted),
            step.decision.moved_blocks,
        )
        for step in steps
    )
