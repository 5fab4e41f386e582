# pyright: standard
"""Seconds of one forward pass, by operation.

The CPU kernels say themselves how long each kind of work took on the wall; what other decoders do is one number. A
shared machine takes the processor away now and then. With one thread there is a clock that stops meanwhile (`cpu`).
With more there is none, and passes that were interrupted are recognised instead.
"""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from plait.costs import StepWork
from plait.engine import KvExtents, SequenceChunk, SpanDecoder

Clock = Literal["wall", "cpu"]
_DENSE = ("embed", "norm", "linear", "rotate", "experts", "collective")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """One pass. `parts` has `dense`, `attention` and `head` where the decoder tells them apart, on the wall.

    `device_s` is the decoder's own time by the chosen clock, `device_thread_s` the part of it in which the calling
    thread ran: what of a step is not that, is the host's. `interruptions`: how often a thread of this process had to
    give up its core.
    """

    device_s: float
    device_thread_s: float
    parts: dict[str, float]
    interruptions: int


class Stopwatch:
    """Times the passes of a decoder; a `SpanDecoder` itself, so that an engine can run on it.

    `latest` is the latest pass, `latest_work` what it computed.
    """

    def __init__(self, decoder: SpanDecoder, clock: Clock) -> None:
        self.spec = decoder.spec
        self.blocks = decoder.blocks
        self.finds_best = decoder.finds_best
        self.best = decoder.best
        self.latest = PassTimes(device_s=0.0, device_thread_s=0.0, parts={}, interruptions=0)
        self.latest_work = StepWork((), (), 0)
        self._decoder: Any = decoder
        self._clock = clock
        self._around_s = 0.0
        self.tells_operations = hasattr(decoder, "phase_seconds")

    def non_finite(self) -> str:
        return self._decoder.non_finite()

    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: KvExtents,
        hidden: torch.Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> torch.Tensor:
        """Run the pass of the decoder, and note how long it took."""
        kernels_s = getattr(self._decoder, "kernel_s", 0.0)
        interrupted = _interruptions()
        thread_s, wall_s = time.thread_time(), time.perf_counter()
        result = self._decoder.forward(chunks, store, hidden, blocks=blocks)
        if store.extents.is_cuda:
            torch.cuda.synchronize(store.extents.device)
        wall_s, thread_s = time.perf_counter() - wall_s, time.thread_time() - thread_s
        self.best = self._decoder.best
        interrupted = _interruptions() - interrupted
        device_s, parts = wall_s, dict[str, float]()
        if self.tells_operations:
            device_s = self._decoder.kernel_s - kernels_s
            if not interrupted:
                self._around_s = wall_s - device_s
            phases = self._decoder.phase_seconds()
            parts = {
                "dense": sum(phases.get(name, 0.0) for name in _DENSE),
                "attention": phases["attention"],
                "head": phases["head"],
            }
            # What no phase counts is starting and stopping the threads, once a pass.
            parts["dense"] += max(0.0, device_s - sum(parts.values()))
        self.latest_work = StepWork.of(
            ((len(chunk.token_ids), chunk.start) for chunk in chunks),
            sampled=sum(chunk.logit_rows for chunk in chunks),
        )
        # Where in the call the thread was interrupted is not known, but what surrounds the kernels hardly varies.
        device_thread_s = min(device_s, max(thread_s - self._around_s, 0.0)) if interrupted else device_s
        self.latest = PassTimes(
            device_s=device_thread_s if self._clock == "cpu" else device_s,
            device_thread_s=device_thread_s,
            parts=parts,
            interruptions=interrupted,
        )
        return result


class PassMaker:
    """Passes of made-up sequences over KV memory that nobody uses; leaves garbage in it."""

    def __init__(self, stopwatch: Stopwatch, store: KvExtents, rng: np.random.Generator) -> None:
        self._stopwatch = stopwatch
        self._store = store
        self._rng = rng
        self._rope_tokens = stopwatch.spec.max_model_tokens

    def run(self, sequences: Sequence[tuple[int, int]], sampled: int) -> PassTimes:
        """One pass of sequences with (new tokens, context); the first `sampled` of them reach the head."""
        first, chunks = 0, list[SequenceChunk]()
        vocabulary = self._stopwatch.spec.vocab_tokens
        for number, (new, context) in enumerate(sequences):
            held = -(-(new + context) // self._store.block_tokens)
            chunks.append(
                SequenceChunk(
                    start=context,
                    token_ids=self._rng.integers(0, vocabulary, new).tolist(),
                    kv_blocks=range(first, first + held),
                    rope_tokens=self._rope_tokens,
                    logit_rows=1 if number < sampled else 0,
                )
            )
            first += held
        hidden = None
        if self._stopwatch.blocks.start > 0:
            tokens = sum(new for new, _ in sequences)
            made = self._rng.standard_normal((tokens, self._stopwatch.spec.hidden), dtype=np.float32)
            hidden = torch.from_numpy(made).to(self._store.extents.device)
        with torch.inference_mode():
            self._stopwatch.forward(chunks, self._store, hidden)
        return self._stopwatch.latest


def _interruptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
