"""What is asked of the engine: traces by seed, the models, and the configurations that are ranked."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lending.model import Shape, make_model

import plait.model
from plait.engine import EngineOptions
from plait.scheduling import StepLimits
from plait.workload import (
    PROMPT_BLOCK_TOKENS,
    LengthMix,
    LogNormal,
    TraceRequest,
    poisson_arrivals_s,
    synthesize_trace,
)

CHAT = LengthMix(
    prompt=LogNormal(median_tokens=120, spread=0.8),
    output=LogNormal(median_tokens=32, spread=0.6),
    least_tokens=2,
)
LONGEST_TOKENS = 1000
STEP_TOKENS = 256
SEQUENCES = 32
CALIBRATION_SEED = 1000
"""Seeds of traces that calibrate begin here; those that are judged begin at 0."""
MEDIUM = Shape(
    blocks=6, hidden=1024, heads=16, kv_heads=4, head_dim=64, intermediate=2816, context_tokens=2048
)


def chat_trace(seed: int, requests: int, rate_per_s: float | None) -> tuple[TraceRequest, ...]:
    """Independent requests with Poisson arrivals; None: all at once."""
    rng = np.random.default_rng(seed)
    arrivals_s = [0.0] * requests
    if rate_per_s is not None:
        arrivals_s = poisson_arrivals_s(requests, rate_per_s, rng).tolist()
    return synthesize_trace(arrivals_s, CHAT, rng, most_total_tokens=LONGEST_TOKENS)


def shared_trace(seed: int, requests: int, rate_per_s: float) -> tuple[TraceRequest, ...]:
    """Requests whose prompts begin with one of four instructions."""
    rng = np.random.default_rng(seed)
    arrivals_s = poisson_arrivals_s(requests, rate_per_s, rng)
    return tuple(
        TraceRequest(
            arrival_s=float(arrival_s),
            prompt_tokens=PROMPT_BLOCK_TOKENS + int(rng.integers(8, 120)),
            output_tokens=int(rng.integers(2, 60)),
            prompt_blocks=(int(rng.integers(4)), 1000 + number),
        )
        for number, arrival_s in enumerate(arrivals_s)
    )


def model_folder(model: str, scratch: Path) -> Path:
    """`tiny` (embedded), `medium` (28 M random parameters, written to `scratch`), or a checkpoint's folder."""
    if model == "tiny":
        return Path(plait.model.__file__).parent / "tiny"
    if model == "medium":
        make_model(scratch / "medium", MEDIUM)
        return scratch / "medium"
    return Path(model).expanduser()


def options_of(folder: Path, kv_tokens: int, kv_bytes_per_token: int) -> EngineOptions:
    """The engine that is calibrated, and judged at the level of requests."""
    return EngineOptions(
        folder=folder,
        dtype="bfloat16",
        threads=1,
        kv_cache_bytes=kv_tokens * kv_bytes_per_token,
        limits=StepLimits(step_tokens=STEP_TOKENS, max_running_sequences=SEQUENCES, max_waiting=10**6),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """How an engine is set up; `kv_tokens` fit its cache."""

    name: str
    policy: str = "paged"
    sequences: int = SEQUENCES
    step_tokens: int = STEP_TOKENS
    long_prefill_tokens: int | None = None
    kv_tokens: int = 32768

    def options(self, base: EngineOptions, kv_bytes_per_token: int) -> EngineOptions:
        """`base` set up so."""
        limits = replace(
            base.limits,
            step_tokens=self.step_tokens,
            max_running_sequences=self.sequences,
            long_prefill_tokens=self.long_prefill_tokens,
        )
        return replace(
            base, policy=self.policy, limits=limits, kv_cache_bytes=self.kv_tokens * kv_bytes_per_token
        )


CONFIGURATIONS = (
    Configuration(name="paged"),
    Configuration(name="paged, 4 sequences", sequences=4),
    Configuration(name="paged, 1 sequence", sequences=1),
    Configuration(name="static, 2 sequences", policy="static", sequences=2),
    Configuration(name="orca, 4,096 tokens of KV", policy="orca", kv_tokens=4096),
    Configuration(name="paged, steps of 48 tokens", step_tokens=48),
    Configuration(name="paged, 1,200 tokens of KV", kv_tokens=1200),
    Configuration(name="paged, chunks of 32 tokens", long_prefill_tokens=32),
    Configuration(name="static, 8 sequences", policy="static", sequences=8),
    Configuration(name="paged, steps of 512 tokens", step_tokens=512),
)
"""Of `tiny` at the load that is ranked, most differ by more than what repeats do: those that do not rank by chance."""
