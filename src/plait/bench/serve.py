"""The run: send each request when it is due, whatever has come of the others, and collect the outcomes."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.random import Generator

from plait.bench.client import OpenAiServer, RequestOutcome, generation_payload
from plait.bench.options import ServeBenchmarkOptions
from plait.bench.prompts import CountTokens, estimate_tokens, write_prompt
from plait.bench.result import ServeBenchmarkResult
from plait.errors import BadSetup
from plait.workload import (
    LengthMix,
    TraceRequest,
    Uniform,
    arrival_times_s,
    length_mix_named,
    parse_trace,
    synthesize_trace,
)

OnProgress = Callable[[int, int], None]

# Prompts are written before the clock starts; this many at a time ask the server for counts.
_WRITERS = 16


@dataclass(frozen=True, slots=True)
class _Prompt:
    request: TraceRequest
    text: str


def run_serve_benchmark(
    options: ServeBenchmarkOptions, on_progress: OnProgress | None = None
) -> ServeBenchmarkResult:
    """Run a benchmark from synchronous code; see `serve_benchmark`."""
    return asyncio.run(serve_benchmark(options, on_progress))


async def serve_benchmark(
    options: ServeBenchmarkOptions, on_progress: OnProgress | None = None
) -> ServeBenchmarkResult:
    """Measure a server; `on_progress(done, total)` is called as requests end, well or not.

    Requests that fail are part of the result. The same options send the same requests; only the server's
    tokenizer, if it shows one, has a say in the prompts.

    Raises:
        BadSetup: no server, no model, a workload that does not fit the model, a bad trace, or the one short
            request that goes before the run failed.
    """
    async with OpenAiServer(options.base_url, options.api_key) as server:
        model, context_tokens = await server.model(options.model)
        rng = np.random.default_rng(options.seed)
        trace = _workload(options, context_tokens, rng)
        await _try_out(server, model, options)
        prompts = await _write_prompts(server, model, options, trace)
        began_s = time.perf_counter()
        outcomes = await _send_all(server, model, options, prompts, began_s, on_progress)
        duration_s = time.perf_counter() - began_s
    return ServeBenchmarkResult(
        options=options,
        model=model,
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        duration_s=duration_s,
        outcomes=outcomes,
    )


def _workload(
    options: ServeBenchmarkOptions, context_tokens: int | None, rng: Generator
) -> tuple[TraceRequest, ...]:
    arrivals_s = arrival_times_s(options.num_prompts, options.request_rate, options.burstiness, rng).tolist()
    if options.dataset == "trace":
        return _recorded(options, arrivals_s)
    mix = _random_mix(options) if options.dataset == "random" else length_mix_named(options.dataset)
    try:
        return synthesize_trace(arrivals_s, mix, rng, most_total_tokens=context_tokens or 2**31)
    except BadSetup as error:
        raise BadSetup(f"dataset {options.dataset!r} does not fit the model: {error.message}") from error


def _random_mix(options: ServeBenchmarkOptions) -> LengthMix:
    def around(tokens: int) -> Uniform:
        width = math.floor(tokens * options.random_range_ratio)
        return Uniform(range(max(tokens - width, 1), tokens + width + 1))

    return LengthMix(prompt=around(options.random_input_len), output=around(options.random_output_len))


def _recorded(options: ServeBenchmarkOptions, arrivals_s: list[float]) -> tuple[TraceRequest, ...]:
    assert options.dataset_path is not None
    try:
        with options.dataset_path.open(encoding="utf-8") as lines:
            trace = parse_trace(lines, where=str(options.dataset_path))
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"cannot read the trace {options.dataset_path}: {error}") from error
    trace = trace[: options.num_prompts]
    if math.isinf(options.request_rate):
        return trace
    return tuple(
        TraceRequest(
            arrival_s=arrival_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            prompt=request.prompt,
        )
        for arrival_s, request in zip(arrivals_s, trace, strict=False)
    )


async def _try_out(server: OpenAiServer, model: str, options: ServeBenchmarkOptions) -> None:
    """Send one short request: a wrong URL, key or model is one sentence, not a run of failures."""
    trial = _Prompt(TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=4), "Hello")
    outcome = await _send(server, model, options, trial, began_s=time.perf_counter(), queue_s=0.0)
    if not outcome.succeeded:
        raise BadSetup(f"{server.base_url} does not answer requests for {model!r}: {outcome.error}")


async def _write_prompts(
    server: OpenAiServer, model: str, options: ServeBenchmarkOptions, trace: tuple[TraceRequest, ...]
) -> list[_Prompt]:
    shows_tokenizer = await server.count_tokens("Hello", model, options.endpoint) is not None

    async def count_by_server(text: str) -> int:
        count = await server.count_tokens(text, model, options.endpoint)
        return await estimate_tokens(text) if count is None else count

    count_tokens: CountTokens = count_by_server if shows_tokenizer else estimate_tokens
    writers = asyncio.Semaphore(_WRITERS)

    async def write(number: int, request: TraceRequest) -> _Prompt:
        if request.prompt is not None:
            return _Prompt(request, request.prompt)
        async with writers:
            rng = np.random.default_rng((options.seed, number))
            return _Prompt(request, await write_prompt(request.prompt_tokens, count_tokens, rng))

    return list(await asyncio.gather(*(write(number, request) for number, request in enumerate(trace))))


async def _send_all(
    server: OpenAiServer,
    model: str,
    options: ServeBenchmarkOptions,
    prompts: list[_Prompt],
    began_s: float,
    on_progress: OnProgress | None,
) -> tuple[RequestOutcome, ...]:
    places = (
        asyncio.Semaphore(options.max_concurrency)
        if options.max_concurrency is not None
        else contextlib.nullcontext()
    )
    done = 0

    async def send(prompt: _Prompt) -> RequestOutcome:
        nonlocal done
        due_s = time.perf_counter()
        async with places:
            queue_s = time.perf_counter() - due_s
            outcome = await _send(server, model, options, prompt, began_s=began_s, queue_s=queue_s)
        done += 1
        if on_progress is not None:
            on_progress(done, len(prompts))
        return outcome

    tasks: list[asyncio.Task[RequestOutcome]] = []
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            early_s = began_s + prompt.request.arrival_s - time.perf_counter()
            if early_s > 0:
                await asyncio.sleep(early_s)
            tasks.append(group.create_task(send(prompt)))
    return tuple(task.result() for task in tasks)


async def _send(
    server: OpenAiServer,
    model: str,
    options: ServeBenchmarkOptions,
    prompt: _Prompt,
    *,
    began_s: float,
    queue_s: float,
) -> RequestOutcome:
    payload = generation_payload(
        prompt.text,
        prompt.request.output_tokens,
        model=model,
        endpoint=options.endpoint,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
    )
    return await server.stream(
        payload,
        options.endpoint,
        prompt_tokens=prompt.request.prompt_tokens,
        timeout_s=options.request_timeout_s,
        began_s=began_s,
        queue_s=queue_s,
    )
