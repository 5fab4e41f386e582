# pyright: standard
"""How fast this machine runs one block of a model: what a peer announces and routes are chosen by.

The forward passes are those that will serve: the loaded span on its own KV memory, before the first session. Times are
of the whole span, divided by its blocks; the head is not in them, because only one peer of a chain has it. What was
measured is kept on the disk for the same machine, model, formats, device and threads.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

from plait.cluster import PeerRates
from plait.engine import KvExtents, SequenceChunk, SpanDecoder, usable_cores, user_cache_folder

log = logging.getLogger(__name__)

BUDGET_S = 3.0
"""For all measurements of one span together."""
# Keys that a measured decode step attends to.
CONTEXT_TOKENS = 128
DECODE_STEPS = 30
SATURATING_SEQUENCES = (8, 32, 128)
PREFILL_TOKENS = (64, 256, 1024)
# A larger batch is tried while it is expected to take at most this part of the budget.
LARGEST_STEP_FRACTION = 0.2
RATES_FILE = "rates.json"
_MAX_FILE_BYTES = 1 << 20
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredOn:
    """What rates depend on, besides the code: they hold for as long as all of it is the same."""

    model: str
    weight_format: str
    kv_format: str
    device: str
    threads: int

    @property
    def key(self) -> str:
        """A name for this and the machine."""
        words = (_VERSION, platform.node(), _processor(), usable_cores(), *asdict(self).values())
        return hashlib.sha256(repr(words).encode()).hexdigest()[:32]


def measure_rates(
    decoder: SpanDecoder,
    store: KvExtents,
    *,
    budget_s: float = BUDGET_S,
    step_tokens: int = 1024,
    clock: Callable[[], float] = perf_counter,
) -> PeerRates:
    """Time forward passes of a span on KV memory that nobody uses yet; leaves garbage in it.

    `step_tokens`: no pass has more. Small passes come first and a larger one is tried only if it is expected to fit
    the budget, so that the slowest machine takes about as long as the fastest. The network's rate stays unknown.
    """
    bench = _Bench(decoder, store, step_tokens, clock(), budget_s, clock)
    bench.step(1, 1)  # what is allocated or compiled once
    decode_s = bench.median_step_s(1, 1, DECODE_STEPS, 0.3)
    blocks = len(decoder.blocks)
    saturated = 1 / decode_s
    for sequences in SATURATING_SEQUENCES:
        if not bench.fits(sequences, 1) or bench.left_s < 0.4 * budget_s:
            break
        rate = sequences / bench.median_step_s(sequences, 1, 5, 0.1)
        if rate < 1.05 * saturated:
            saturated = max(saturated, rate)
            break
        saturated = rate
    prefill, step_s = saturated, 0.0
    for tokens in PREFILL_TOKENS:
        expected_s = step_s * 4 if step_s else tokens / saturated
        if not bench.fits(1, tokens) or expected_s > min(bench.left_s, LARGEST_STEP_FRACTION * budget_s):
            break
        step_s = bench.median_step_s(1, tokens, 3, 0.15)
        prefill = max(prefill, tokens / step_s)
    return PeerRates(
        decode_tokens_per_s=blocks / decode_s,
        saturated_decode_tokens_per_s=blocks * saturated,
        prefill_tokens_per_s=blocks * prefill,
    )


class KeptRates:
    """Measurements of this user's machines, in one small file."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or user_cache_folder().parent) / RATES_FILE

    def find(self, measured_on: MeasuredOn) -> PeerRates | None:
        """What was measured earlier, if it was."""
        kept = self._load().get(measured_on.key)
        try:
            return None if kept is None else PeerRates(**cast(Mapping[str, Any], kept))
        except (TypeError, ValueError):
            return None

    def keep(self, measured_on: MeasuredOn, rates: PeerRates) -> None:
        """Remember; a disk that does not let us is no reason to stop."""
        kept = {**self._load(), measured_on.key: asdict(replace(rates, network_tokens_per_s=0.0))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".rates-")
            with os.fdopen(handle, "w") as file:
                json.dump(kept, file)
            os.replace(temporary, self.path)
        except OSError as error:
            log.warning("measured rates are not kept in %r: %s", str(self.path), error.strerror)

    def _load(self) -> dict[str, object]:
        try:
            if self.path.stat().st_size > _MAX_FILE_BYTES:
                return {}
            kept: object = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return cast(dict[str, object], kept) if isinstance(kept, dict) else {}


class _Bench:
    """Forward passes of made-up sequences, timed."""

    def __init__(
        self,
        decoder: SpanDecoder,
        store: KvExtents,
        step_tokens: int,
        began_s: float,
        budget_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._decoder = decoder
        self._store = store
        self._step_tokens = step_tokens
        self._end_s = began_s + budget_s
        self._budget_s = budget_s
        self._clock = clock
        self._context = CONTEXT_TOKENS
        while self._context and self._kv_blocks_for(self._context + 1) > store.kv_blocks:
            self._context //= 2

    @property
    def left_s(self) -> float:
        return self._end_s - self._clock()

    def fits(self, sequences: int, tokens: int) -> bool:
        """Whether step and KV memory have room."""
        kv_blocks = sequences * self._kv_blocks_for(self._start(tokens) + tokens)
        return sequences * tokens <= self._step_tokens and kv_blocks <= self._store.kv_blocks

    def step(self, sequences: int, tokens: int) -> float:
        """Seconds of one pass."""
        start = self._start(tokens)
        each = self._kv_blocks_for(start + tokens)
        chunks = [
            SequenceChunk(
                start=start,
                token_ids=[1] * tokens,
                kv_blocks=range(number * each, (number + 1) * each),
                rope_tokens=start + tokens,
                logit_rows=0,
            )
            for number in range(sequences)
        ]
        hidden = None
        if self._decoder.blocks.start > 0:
            hidden = torch.randn(
                sequences * tokens, self._decoder.spec.hidden, generator=torch.Generator().manual_seed(0)
            ).to(self._store.extents.device)
        before_s = self._clock()
        self._decoder.forward(chunks, self._store, hidden)
        if self._store.extents.is_cuda:
            torch.cuda.synchronize(self._store.extents.device)
        return self._clock() - before_s

    def median_step_s(self, sequences: int, tokens: int, steps: int, budget_fraction: float) -> float:
        """Of at most so many passes, at least one, within a part of the budget."""
        end_s = min(self._clock() + budget_fraction * self._budget_s, self._end_s)
        taken: list[float] = []
        while not taken or (len(taken) < steps and self._clock() < end_s):
            taken.append(self.step(sequences, tokens))
        taken.sort()
        return max(taken[len(taken) // 2], 1e-9)

    def _start(self, tokens: int) -> int:
        return self._context if tokens == 1 else 0

    def _kv_blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._store.block_tokens)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
