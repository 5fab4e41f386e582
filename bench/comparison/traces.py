"""Requests that no named mix of lengths describes: common beginnings; lengths over orders of magnitude."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from plait.workload import LogNormal, TraceRequest, arrival_times_s, format_trace

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]


def _examples_then_a_sentence(example_tokens: int) -> Callable[[int, Generator], Lengths]:
    """Translation after examples that all prompts share: Kwon et al. 2023, section 6.4, with answers of 30 tokens."""

    def draw(count: int, rng: Generator) -> Lengths:
        answers = np.clip(LogNormal(median_tokens=27.0, spread=0.45).draw(count, rng), 1, 200)
        return np.full(count, example_tokens + 16), answers

    return draw


def _log_uniform(longest_tokens: int, long_fraction: float = 1.0) -> Callable[[int, Generator], Lengths]:
    """Totals over orders of magnitude, from 256 tokens up to `longest_tokens`, half of it the answer.

    All but `long_fraction` of the requests end at a thousand tokens.
    """

    def draw(count: int, rng: Generator) -> Lengths:
        least, short, most = (math.log(tokens) for tokens in (256, min(1024, longest_tokens), longest_tokens))
        is_long = rng.random(count) < long_fraction
        totals = np.exp(rng.uniform(least, np.where(is_long, most, short))).astype(np.int64)
        return totals - totals // 2, totals // 2

    return draw


TRACES: Mapping[str, Callable[[int, Generator], Lengths]] = {
    "1 example": _examples_then_a_sentence(80),
    "5 examples": _examples_then_a_sentence(336),
    "all alike": _log_uniform(257),
    "up to half a pool": _log_uniform(6_000),
    "up to two pools": _log_uniform(24_000),
    "1 in 30 up to four pools": _log_uniform(48_000, long_fraction=1 / 30),
}
"""Prompt and output tokens by name. Those with examples share their first block; pools are those of LLaMA2-13B on an
A100 of 40 GB (12,000 tokens)."""


def write_trace(file: Path, name: str, requests: int, rate_per_s: float, seed: int) -> None:
    """Write requests with Poisson arrivals; rate 0 sends everything at once."""
    rng = np.random.default_rng([seed, len(name)])
    arrivals_s = arrival_times_s(requests, rate_per_s or math.inf, 1.0, rng)
    prompts, answers = TRACES[name](requests, np.random.default_rng([seed, 1]))
    shared = (1,) if "example" in name else ()
    trace = (
        TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=answer, prompt_blocks=shared)
        for arrival_s, prompt, answer in zip(
            arrivals_s.tolist(), prompts.tolist(), answers.tolist(), strict=True
        )
    )
    file.write_text("\n".join(format_trace(trace)) + "\n")
