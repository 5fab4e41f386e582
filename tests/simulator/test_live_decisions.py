"""A live run and a simulated one of the same requests decide the same, step for step.

The live one is the real engine with the embedded model, where a step counts as a second whatever it takes; the
simulated one has a cost model that says a second.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import MODEL_BLOCKS, LinearCosts, machine

import plait.model
from plait.engine import EngineOptions, load_engine
from plait.ids import RequestId
from plait.scheduling import ScheduledStep, StepLimits
from plait.session import GenerationRequest, SamplingParams
from plait.simulator import ClusterRun, LinkSpec, NetworkSpec, RunOptions, Timeline
from plait.workload import TraceRequest

TINY = Path(plait.model.__file__).parent / "tiny"
LIMITS = StepLimits(step_tokens=96, max_running_sequences=6)
NO_WAY = LinkSpec(one_way_s=0.0, bandwidth_bytes_per_s=1e18)

Decision = tuple[tuple[tuple[str, int, int, bool], ...], tuple[str, ...], tuple[str, ...]]
"""Chunks (request, start, tokens, whether it samples), who was admitted, who was preempted."""


def decision(step: ScheduledStep) -> Decision:
    chunks = tuple((chunk.request_id, chunk.start, chunk.tokens, chunk.samples) for chunk in step.chunks)
    return chunks, step.admitted, step.preempted


def requests(seed: int) -> list[TraceRequest]:
    rng = np.random.default_rng(seed)
    arrivals = np.sort(rng.integers(0, 40, 24)).tolist()
    return [
        TraceRequest(
            arrival_s=float(at),
            prompt_tokens=int(rng.integers(1, 120)),
            output_tokens=int(rng.integers(1, 40)),
        )
        for at in arrivals
    ]


def live(policy: str, trace: list[TraceRequest]) -> tuple[list[Decision], int, int]:
    """Decisions, KV blocks, and preemptions."""
    options = EngineOptions(folder=TINY, policy=policy, limits=LIMITS, kv_cache_bytes=3 * 2**20, threads=1)
    engine: Any = load_engine(options)
    decisions: list[Decision] = []
    schedule = engine._scheduler.schedule

    def recorded() -> ScheduledStep:
        step = schedule()
        if step.chunks:
            decisions.append(decision(step))
        return step

    engine._scheduler.schedule = recorded
    now = added = 0
    while added < len(trace) or engine.has_work:
        while added < len(trace) and trace[added].arrival_s <= now:
            prompt = [10 + added] + [5] * (trace[added].prompt_tokens - 1)
            sampling = SamplingParams(max_tokens=trace[added].output_tokens, temperature=0.0, ignore_eos=True)
            engine.add(
                GenerationRequest(
                    id=RequestId(f"r{added}"), prompt_token_ids=tuple(prompt), sampling=sampling
                )
            )
            added += 1
        if engine.has_work:
            engine.step()
        now += 1
    return decisions, engine.status().kv_blocks_total, engine.status().preemptions_total


class Recorder(Timeline):
    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []

    def step(self, worker: Any, step: ScheduledStep, began_ns: int, ended_ns: int) -> None:
        self.decisions.append(decision(step))


@pytest.mark.parametrize("policy", ["static", "orca", "paged"])
def test_live_and_simulated_steps_are_the_same(policy: str) -> None:
    trace = requests(3)
    lived, kv_blocks, preemptions = live(policy, trace)
    recorder = Recorder()
    run = ClusterRun(
        [machine("one", costs=LinearCosts(1.0, 0.0), policy=policy, limits=LIMITS, kv_blocks=kv_blocks)],
        NetworkSpec(within=NO_WAY, between=NO_WAY),
        model_blocks=MODEL_BLOCKS,
        options=RunOptions(),
        requests=trace,
        timeline=recorder,
    )
    run.run()
    assert recorder.decisions == lived
    assert len(lived) > 50
    assert preemptions == sum(worker.totals.preemptions for worker in run.workers.values())
    assert policy != "paged" or preemptions > 0  # the memory is small enough to tell
