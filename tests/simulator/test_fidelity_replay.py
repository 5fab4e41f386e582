"""A run on the serving path (engine thread, event loop, clients that come when they are due) is recorded and simulated
again with the times that its steps took: step for step, the same is decided."""

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clusters import LinearCosts, machine

import plait.model
from plait.engine import Engine, EngineOptions, EngineStatus
from plait.ids import RequestId
from plait.scheduling import ScheduledStep, StepLimits, policy_named
from plait.session import GenerationRequest, SamplingParams
from plait.simulator import MachineSpec, RecordedRequest, RecordedStep, decision_of, replay
from plait.worker import AsyncEngine
from plait.workload import PROMPT_BLOCK_TOKENS, TraceRequest

TINY = Path(plait.model.__file__).parent / "tiny"
LIMITS = StepLimits(step_tokens=96, max_running_sequences=6)


class RecordedEngine(AsyncEngine):
    def __init__(self, options: EngineOptions) -> None:
        super().__init__(lambda on_progress: options, names=("recorded",))
        self.steps: list[RecordedStep] = []

    def _load(self, ranks: ExitStack) -> Engine:
        engine = super()._load(ranks)
        engine.on_step = self._note
        return engine

    def _note(self, step: ScheduledStep, began_s: float) -> None:
        self.steps.append(RecordedStep(decision=decision_of(step), began_s=began_s))


def prompt_ids(number: int, request: TraceRequest) -> tuple[int, ...]:
    blocks = request.prompt_blocks or (1000 + number,)
    parts = [np.random.default_rng(block).integers(10, 2000, PROMPT_BLOCK_TOKENS) for block in blocks]
    return tuple(np.concatenate(parts)[: request.prompt_tokens].tolist())


def recorded(
    options: EngineOptions, trace: list[TraceRequest]
) -> tuple[list[RecordedStep], list[RecordedRequest], EngineStatus]:
    async def client(engine: RecordedEngine, number: int) -> RecordedRequest:
        request = trace[number]
        await asyncio.sleep(request.arrival_s)
        asked = GenerationRequest(
            id=RequestId(f"client-{number}"),
            prompt_token_ids=prompt_ids(number, request),
            sampling=SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True),
        )
        added_s = 0.0
        async for delta in engine.generate(asked):
            if delta.timing is not None:
                added_s = delta.timing.arrived_s
        return RecordedRequest(id=asked.id, added_s=added_s, request=request)

    async def serve() -> tuple[list[RecordedStep], list[RecordedRequest], EngineStatus]:
        async with RecordedEngine(options) as engine:
            assert await engine.wait_settled() == "ready"
            requests = await asyncio.gather(*(client(engine, number) for number in range(len(trace))))
            return engine.steps, list(requests), engine.status()

    return asyncio.run(serve())


def like(options: EngineOptions, status: EngineStatus) -> MachineSpec:
    """A simulated machine that is as the engine was."""
    built = machine("one", policy=options.policy, limits=options.limits, kv_blocks=status.kv_blocks_total)
    return replace(built, block_tokens=status.block_tokens, costs=LinearCosts())


@pytest.mark.parametrize("policy", ["static", "orca", "paged"])
def test_a_recorded_run_replays_step_for_step(policy: str) -> None:
    rng = np.random.default_rng(3)
    trace = [
        TraceRequest(
            arrival_s=float(rng.uniform(0, 0.2)),
            prompt_tokens=int(rng.integers(1, 120)),
            output_tokens=int(rng.integers(1, 40)),
        )
        for _ in range(24)
    ]
    options = EngineOptions(folder=TINY, policy=policy, limits=LIMITS, kv_cache_bytes=3 * 2**20, threads=1)
    steps, requests, status = recorded(options, trace)
    replayed = replay(like(options, status), steps, requests)
    assert replayed.first_difference is None
    assert len(replayed.live) > 40
    assert replayed.preemptions == status.preemptions_total
    assert policy != "paged" or replayed.preemptions > 0  # the memory is small enough to tell


def test_prefix_hits_replay() -> None:
    trace = [
        TraceRequest(
            arrival_s=0.02 * number,
            prompt_tokens=PROMPT_BLOCK_TOKENS + 20 + number,
            output_tokens=4,
            prompt_blocks=(number % 2, 100 + number),
        )
        for number in range(8)
    ]
    options = EngineOptions(folder=TINY, limits=LIMITS, kv_cache_bytes=12 * 2**20, threads=1)
    steps, requests, status = recorded(options, trace)
    replayed = replay(like(options, status), steps, requests)
    assert replayed.first_difference is None
    assert replayed.prefix_hit_tokens == status.prefix_hit_tokens_total > PROMPT_BLOCK_TOKENS


def test_a_simulator_with_other_memory_is_found_out() -> None:
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=60, output_tokens=40) for _ in range(12)]
    options = EngineOptions(folder=TINY, limits=LIMITS, kv_cache_bytes=3 * 2**20, threads=1)
    steps, requests, status = recorded(options, trace)
    wrong = replace(like(options, status), kv_blocks=2 * status.kv_blocks_total)
    assert replay(wrong, steps, requests).first_difference is not None
    other = replace(like(options, status), policy=policy_named("orca"))
    assert replay(other, steps, requests).first_difference is not None
