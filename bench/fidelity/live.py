"""Runs on the real serving path: open-loop clients on an event loop, the `AsyncEngine` and its thread, and a record.

A client counts from when its request was due, not from when the event loop got round to sending it, and to when it
received a token. The engine's thread notes what each step computed and when, and how often it lost its core in it.
"""

import asyncio
import gc
import os
import selectors
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plait.engine import Engine, EngineOptions
from plait.ids import RequestId
from plait.metrics import tpot_s
from plait.scheduling import ScheduledStep
from plait.session import GenerationRequest, SamplingParams
from plait.simulator import RecordedRequest, RecordedStep, decision_of
from plait.worker import AsyncEngine
from plait.workload import PROMPT_BLOCK_TOKENS, TraceRequest

_FIRST_TOKEN_ID = 10  # below are special ones
_LEAD_S = 0.05
_CALM_FRACTION = 0.02
_LOST_S = 0.0005
_LOST_FRACTION = 0.01


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step of the engine's thread, by the clock of the run: when it began and ended, and seconds in the kernels.

    `lost_s`: how long the thread did not run since the end of the step before (it waited for a core or for the
    interpreter). `seconds` is until the next step began; None where the engine was idle in between.
    """

    began_s: float
    ended_s: float
    device_s: float
    lost_s: float
    seconds: float | None = None

    @property
    def interrupted(self) -> bool:
        """Whether something else than this process took its time; waiting for the interpreter takes less."""
        return self.lost_s > _LOST_S + _LOST_FRACTION * (self.ended_s - self.began_s)


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request as its client saw it, in seconds from when it was due."""

    first_s: float
    end_s: float
    tokens: int
    prompt_tokens: int
    arrival_s: float
    sent_s: float = 0.0
    added_s: float = 0.0
    """When the client sent it, and when the engine had it; 0 where it is simulated."""

    @property
    def tpot_s(self) -> float | None:
        return tpot_s(self.first_s, self.end_s, self.tokens)


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Seconds in which threads of the run were ready and did not run, as fractions of its length: those of the engine
    and of the event loop waited for a core, and what the hypervisor kept."""

    engine_fraction: float
    loop_fraction: float
    steal_fraction: float

    @property
    def worst(self) -> float:
        return max(self.engine_fraction, self.loop_fraction, self.steal_fraction)

    @property
    def calm(self) -> bool:
        """Whether the run may be judged, or judge."""
        return self.worst <= _CALM_FRACTION


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """All that a run left; the clock of its steps is 0 when its trace begins."""

    steps: tuple[RecordedStep, ...]
    step_times: tuple[StepTimes, ...]
    requests: tuple[RequestTimes, ...]
    record: tuple[RecordedRequest, ...]
    disturbance: Disturbance
    preemptions: int
    prefix_hit_tokens: int


_Noted = tuple[ScheduledStep, float, float, float, float]
"""A step, when it began and ended, and seconds of the kernels and of the thread's processor time since the start."""


class RecordedEngine(AsyncEngine):
    """The engine as it serves, with a record of its steps."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(lambda on_progress: options, names=("fidelity",))
        self.noted: list[_Noted] = []
        self.thread_id = 0

    def _load(self, ranks: ExitStack) -> Engine:
        engine = super()._load(ranks)
        decoder: Any = engine._decoder  # its kernels' seconds are no part of the engine's interface
        self.thread_id = threading.get_native_id()
        monotonic, thread_time, noted = time.monotonic, time.thread_time, self.noted

        def on_step(step: ScheduledStep, began_s: float) -> None:
            noted.append((step, began_s, monotonic(), decoder.kernel_s, thread_time()))

        engine.on_step = on_step
        return engine


@asynccontextmanager
async def serving(options: EngineOptions) -> AsyncGenerator[RecordedEngine]:
    """An engine that is ready and warm."""
    async with RecordedEngine(options) as engine:
        if await engine.wait_settled() != "ready":
            raise engine.failure or RuntimeError("the engine did not load")
        warm = [TraceRequest(arrival_s=0.0, prompt_tokens=100, output_tokens=20)] * 4
        await run_live(engine, warm)
        gc.collect()
        gc.freeze()  # a collection of all that was imported stops every thread for a tenth of a second
        yield engine


def prompt_ids(number: int, request: TraceRequest, vocabulary: int) -> tuple[int, ...]:
    """Tokens of a prompt: equal up to the end of equal blocks, and of no other prompt."""
    seeds = [(7, block) for block in request.prompt_blocks]
    if not seeds:
        seeds = [(11, number)]
    lengths = [PROMPT_BLOCK_TOKENS] * len(seeds) if request.prompt_blocks else [request.prompt_tokens]
    parts = [
        np.random.default_rng(seed).integers(_FIRST_TOKEN_ID, vocabulary, length)
        for seed, length in zip(seeds, lengths, strict=True)
    ]
    return tuple(np.concatenate(parts)[: request.prompt_tokens].tolist())


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop that wakes within some microseconds: the timeouts of epoll are whole milliseconds."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def run_live(engine: RecordedEngine, trace: Sequence[TraceRequest]) -> LiveRun:
    """Send every request when it is due, and wait for all; the engine is idle before and after."""
    before = engine.status()
    vocabulary = engine.model.tokenizer.vocab_tokens
    salt = f"run at {time.monotonic_ns()}"  # no prefix is left of the run before
    asked = [
        GenerationRequest(
            id=RequestId(f"r{number}"),
            prompt_token_ids=prompt_ids(number, request, vocabulary),
            sampling=SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True),
            cache_salt=salt,
        )
        for number, request in enumerate(trace)
    ]
    engine.noted.clear()
    gc.collect()
    watch = _Watch(engine.thread_id)
    start_s = time.monotonic() + _LEAD_S

    async def client(number: int) -> RequestTimes:
        due_s = start_s + trace[number].arrival_s
        sent_s = time.monotonic() - due_s
        first_s = end_s = added_s = 0.0
        tokens = 0
        async for delta in engine.generate(asked[number]):
            end_s = time.monotonic() - due_s
            first_s = first_s or end_s
            tokens += sum(len(sequence.token_ids) for sequence in delta.sequences)
            if delta.timing is not None:
                added_s = delta.timing.arrived_s - due_s
        request = trace[number]
        return RequestTimes(first_s, end_s, tokens, request.prompt_tokens, request.arrival_s, sent_s, added_s)

    tasks: list[asyncio.Task[RequestTimes]] = []
    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(trace):
            early_s = start_s + request.arrival_s - time.monotonic()
            if early_s > 0:
                await asyncio.sleep(early_s)
            tasks.append(group.create_task(client(number)))
    requests = tuple(task.result() for task in tasks)
    disturbance = watch.read()
    after = engine.status()
    times = _step_times(engine.noted, start_s, requests)
    return LiveRun(
        steps=tuple(
            RecordedStep(decision=decision_of(noted[0]), began_s=at.began_s)
            for noted, at in zip(engine.noted, times, strict=True)
        ),
        step_times=times,
        requests=requests,
        record=tuple(
            RecordedRequest(id=one.id, added_s=came.arrival_s + came.added_s, request=request)
            for one, request, came in zip(asked, trace, requests, strict=True)
        ),
        disturbance=disturbance,
        preemptions=after.preemptions_total - before.preemptions_total,
        prefix_hit_tokens=after.prefix_hit_tokens_total - before.prefix_hit_tokens_total,
    )


def _step_times(
    noted: Sequence[_Noted], start_s: float, requests: Sequence[RequestTimes]
) -> tuple[StepTimes, ...]:
    """The first step has no known seconds of its kernels: it counts as interrupted."""
    # When the engine was idle: between the end of all that had come and the next that came.
    idle: list[float] = []
    reach_s = -np.inf
    for request in sorted(requests, key=lambda one: one.added_s + one.arrival_s):
        if request.arrival_s + request.added_s > reach_s:
            idle.append(request.arrival_s + request.added_s)
        reach_s = max(reach_s, request.arrival_s + request.end_s)
    times: list[StepTimes] = []
    for place, (_, began_s, ended_s, kernels_s, thread_s) in enumerate(noted):
        began_s, ended_s = began_s - start_s, ended_s - start_s
        seconds = None
        if place + 1 < len(noted):
            next_s = noted[place + 1][1] - start_s
            if not any(began_s < came_s <= next_s for came_s in idle):
                seconds = next_s - began_s
        device_s, lost_s = 0.0, float("inf")
        if place:
            before = noted[place - 1]
            device_s = kernels_s - before[3]
            # What it did before a step that followed idleness is in its processor's time, but not in the wall's.
            since_s = began_s if times[-1].seconds is None else times[-1].ended_s
            lost_s = (ended_s - since_s) - (thread_s - before[4])
        times.append(StepTimes(began_s, ended_s, device_s, lost_s, seconds))
    return tuple(times)


class _Watch:
    """Time that threads of a run waited for a core, from the kernel's own books."""

    def __init__(self, engine_thread: int) -> None:
        self._threads = (engine_thread, threading.get_native_id())
        self._begin = self._now()
        self._begin_s = time.monotonic()

    def read(self) -> Disturbance:
        length_s = time.monotonic() - self._begin_s
        engine, loop, steal = (
            (now - before) / length_s for now, before in zip(self._now(), self._begin, strict=True)
        )
        return Disturbance(engine, loop, steal)

    def _now(self) -> tuple[float, float, float]:
        waits = [
            int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1]) / 1e9
            for thread in self._threads
        ]
        steal = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
        return waits[0], waits[1], steal / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
