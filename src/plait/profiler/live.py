# pyright: standard
"""The real engine under a load of made-up requests, step by step.

Every other step says by what factors an engine differs from a grid, and fits the host's part of a step. The steps
between them take part in no fit: they say how well tables and regression predict what the scheduler makes of requests.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from plait.costs import (
    CostModel,
    HostOverhead,
    LiveFactors,
    PredictionErrors,
    StepWork,
    TableCosts,
    fit_host,
    fit_live_factors,
    prediction_errors,
)
from plait.engine import Engine, SpanEngine, Tokenizer
from plait.ids import RequestId
from plait.kvcache import KvBlockPool
from plait.profiler.stopwatch import Stopwatch
from plait.scheduling import Scheduler, StepLimits, policy_named
from plait.session import GenerationRequest, SamplingParams
from plait.workload import LengthMix, LogNormal

_WARM_UP_STEPS = 8
_MOST_STEPS = 6
"""For each step that is wanted: on a busy machine many are disturbed."""
_LONG_S = 0.02
_CHAT = LengthMix(
    prompt=LogNormal(median_tokens=120, spread=1.0),
    output=LogNormal(median_tokens=24, spread=0.7),
    least_tokens=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStep:
    """One step of the engine, and how often the process was interrupted in it."""

    work: StepWork
    device_s: float
    host_s: float
    interruptions: int

    @property
    def clean(self) -> bool:
        """Whether its times are known well: it was not interrupted, or is long beside what surrounds the kernels."""
        return not self.interruptions or self.device_s >= _LONG_S


def run_live(
    span: SpanEngine,
    stopwatch: Stopwatch,
    tokenizer: Tokenizer,
    *,
    steps: int,
    step_tokens: int,
    sequences: int,
    temperature: float,
    rng: np.random.Generator,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[LiveStep, ...]:
    """Serve random prompts on a loaded whole model until so many clean steps have run; uses the KV memory of `span`.

    Steps that are not clean are left out, unless the machine is so busy that there are hardly others.

    Requests come in waves, so that steps with few and many sequences, with prompts and without, all occur. Tokens are
    drawn at `temperature` (greedy choices repeat themselves, which experts notice), and no answer ends early.
    """
    engine = Engine(
        decoder=stopwatch,
        store=span.store,
        host_store=None,
        scheduler=Scheduler(
            policy_named("paged"),
            KvBlockPool(span.store.kv_blocks, span.store.block_tokens),
            None,
            StepLimits(step_tokens=step_tokens, max_running_sequences=sequences, max_waiting=10**6),
        ),
        tokenizer=tokenizer,
        eos_token_ids=frozenset(),
        max_model_tokens=span.max_model_tokens,
        namespace_of=lambda request, longest: b"profile",
        prefix_caching=False,
        seed=0,
    )
    vocabulary, taken, added = tokenizer.vocab_tokens, list[LiveStep](), 0
    clean = 0
    while clean < steps + _WARM_UP_STEPS and len(taken) < _MOST_STEPS * steps:
        if not engine.has_work or rng.random() < 0.08:
            wave = 1 + int(rng.integers(sequences) * rng.random())
            prompts, outputs = _CHAT.draw(wave, rng, most_total_tokens=span.max_model_tokens - 1)
            for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True):
                ids = tuple(rng.integers(0, vocabulary, prompt).tolist())
                sampling = SamplingParams(max_tokens=output, ignore_eos=True, temperature=temperature)
                engine.add(
                    GenerationRequest(
                        id=RequestId(f"profile-{added}"), prompt_token_ids=ids, sampling=sampling
                    )
                )
                added += 1
        thread_s = time.thread_time()
        engine.step()
        thread_s = time.thread_time() - thread_s
        times = stopwatch.latest
        taken.append(
            LiveStep(
                work=stopwatch.latest_work,
                device_s=times.device_s,
                host_s=max(0.0, thread_s - times.device_thread_s),
                interruptions=times.interruptions,
            )
        )
        clean += taken[-1].clean
        if on_progress is not None:
            on_progress(clean, steps + _WARM_UP_STEPS)
    kept = [step for step in taken[_WARM_UP_STEPS:] if step.clean]
    return tuple(kept[:steps] if len(kept) >= steps // 2 else taken[_WARM_UP_STEPS:])


def fit(steps: Sequence[LiveStep], tables: TableCosts) -> tuple[LiveFactors, HostOverhead]:
    """What the even steps say of the tables of a grid and of the host."""
    even = steps[::2]
    works = [step.work for step in even]
    factors = fit_live_factors([tables.parts_s(work) for work in works], [step.device_s for step in even])
    return factors, fit_host(works, [step.host_s for step in even])


def judge(
    steps: Sequence[LiveStep], models: dict[str, CostModel], host: HostOverhead
) -> dict[str, PredictionErrors]:
    """Errors over the odd steps: of the device's time, and with the host's."""
    odd, errors = steps[1::2], dict[str, PredictionErrors]()
    for name, model in models.items():
        predicted_s = [model.step_s(step.work) for step in odd]
        errors[name] = prediction_errors(predicted_s, [step.device_s for step in odd])
        errors[f"{name}, with the host"] = prediction_errors(
            [seconds + host.of(step.work) for seconds, step in zip(predicted_s, odd, strict=True)],
            [step.device_s + step.host_s for step in odd],
        )
    return errors
