"""Requests that no named mix of lengths describes: common beginnings; lengths over orders of magnitude."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from plait.workload import PROMPT_BLOCK_TOKENS, LogNormal, TraceRequest, arrival_times_s, format_trace

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]


def _examples_then_a_sentence(example_tokens: int) -> Callable[[int, Generator], Lengths]:
    """Translation after examples that all prompts share: Kwon et al. 2023, section 6.4, with answers of 30 tokens."""

    def draw(count: int, rng: Generator) -> Lengths:
        answers = np.clip(LogNormal(median_tokens=27.0, spread=0.45).draw(count, rng), 1, 200)
        return np.full(count, example_tokens + 16), answers

    return draw


def _log_uniform(longest_tokens: int, long_fraction: float = 1.0) -> Callable[[int, Generator], Lengths]:
    """Totals over orders of magnitude, from 1,000 tokens up to `longest_tokens`; all but `long_fraction` end at 4,000.

    The answer is 5 to 50 % of it, 1,000 tokens at most.
    """

    def draw(count: int, rng: Generator) -> Lengths:
        least, short, most = (math.log(tokens) for tokens in (1_000, 4_000, longest_tokens))
        is_long = rng.random(count) < long_fraction
        totals = np.exp(rng.uniform(least, np.where(is_long, most, short))).astype(np.int64)
        answers = np.clip(totals * rng.uniform(0.05, 0.5, count), 1, 1000).astype(np.int64)
        return totals - answers, answers

    return draw


def _questions_about_documents(count: int, rng: Generator) -> Lengths:
    """A document and a question of up to 1,024 tokens about it."""
    prompts = DOCUMENT_TOKENS + rng.integers(16, 1025, count)
    return prompts, rng.integers(64, 513, count)


DOCUMENTS, DOCUMENT_TOKENS = 6, 16_384
TRACES: Mapping[str, Callable[[int, Generator], Lengths]] = {
    "1 example": _examples_then_a_sentence(80),
    "5 examples": _examples_then_a_sentence(336),
    "up to 4K": _log_uniform(4_000),
    "up to 60K": _log_uniform(60_000),
    "1 in 10 up to 300K": _log_uniform(300_000, long_fraction=0.1),
    "documents": _questions_about_documents,
}
"""Prompt and output tokens by name. Prompts with examples share their beginning, those on a document the document."""


def write_trace(
    file: Path, name: str, requests: int, rate_per_s: float, seed: int, *, shares: bool = True
) -> None:
    """Write requests with Poisson arrivals; rate 0 sends everything at once. Without `shares` no prompts are alike."""
    rng = np.random.default_rng([seed, len(name)])
    arrivals_s = arrival_times_s(requests, rate_per_s or math.inf, 1.0, rng).tolist()
    prompts, answers = (each.tolist() for each in TRACES[name](requests, np.random.default_rng([seed, 1])))
    documents = rng.integers(DOCUMENTS, size=requests).tolist()
    trace: list[TraceRequest] = []
    for number in range(requests):
        blocks: tuple[int, ...] = ()
        if shares and "example" in name:
            blocks = (1,)
        elif shares and name == "documents":
            first = 1000 * (documents[number] + 1)
            own = 10**6 + 100 * number
            of_document = DOCUMENT_TOKENS // PROMPT_BLOCK_TOKENS
            of_question = -(-prompts[number] // PROMPT_BLOCK_TOKENS) - of_document
            blocks = (*range(first, first + of_document), *range(own, own + of_question))
        trace.append(
            TraceRequest(
                arrival_s=arrivals_s[number],
                prompt_tokens=prompts[number],
                output_tokens=answers[number],
                prompt_blocks=blocks,
            )
        )
    file.write_text("\n".join(format_trace(trace)) + "\n")
