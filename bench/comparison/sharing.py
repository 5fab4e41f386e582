"""Memory that samples and beams share, swapping against recomputing, and sizes of blocks: Kwon et al. 2023, 6.3 and 7.

Sharing is counted on the live scheduler and pool, with no engine: which beam continues which is drawn as beam search
would choose from token probabilities of a made-up model.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from plait.costs import ASSUMED, Formats, HostOverhead, RooflineCosts, SpanShape, StepWork, device_named
from plait.ids import RequestId
from plait.kvcache import KvBlockPool
from plait.model import published_spec
from plait.scheduling import NewRequest, Scheduler, StepLimits, policy_named
from plait.workload import length_mix_named

BLOCK_TOKENS = 16
_SIDE_BY_SIDE = 24
PCIE_BYTES_PER_S = 25e9  # PCIe 4.0 with 16 lanes, as copies reach it
COPY_S = 8e-6  # to launch a copy between host and device
_TOP_TOKENS = 12
_GAP = 1.5  # mean distance of the log probabilities of a model's likeliest tokens


def saved_fraction(lengths: str, width: int, *, beams: bool, seed: int = 0, requests: int = 150) -> float:
    """Blocks that sharing saves, as a part of those that tables name, over all steps of decoding."""
    rng = np.random.default_rng(seed)
    prompts, answers = length_mix_named(lengths).draw(requests, rng)
    limits = StepLimits(max_running_sequences=width * _SIDE_BY_SIDE, max_waiting=requests, step_tokens=4096)
    pool = KvBlockPool(width * _SIDE_BY_SIDE * 2048 // BLOCK_TOKENS, BLOCK_TOKENS)
    scheduler = Scheduler(policy_named("paged"), pool, None, limits)
    for number, (prompt, answer) in enumerate(zip(prompts.tolist(), answers.tolist(), strict=True)):
        scheduler.submit(
            NewRequest(
                id=RequestId(str(number)),
                token_ids=[number + 2**31] + [0] * (prompt - 1),
                max_sequence_tokens=prompt + answer,
                fan_out=width,
                reuse_prefix=False,
            )
        )
    produced = [0] * requests
    scores = np.zeros((requests, width))
    named = distinct = 0
    while scheduler.has_requests:
        step = scheduler.schedule()
        scheduler.complete(step)
        tables = [
            chunk.kv_blocks for chunk in step.chunks if chunk.samples and produced[int(chunk.request_id)]
        ]
        named += sum(map(len, tables))
        distinct += len({block for table in tables for block in table})
        for number in {int(chunk.request_id) for chunk in step.chunks if chunk.samples}:
            request_id = RequestId(str(number))
            if not produced[number]:
                scheduler.fork(request_id, [0] * width)
            elif beams:
                parents, scores[number] = _beams_continued(scores[number], rng)
                scheduler.fork(request_id, parents)
            produced[number] += 1
            if produced[number] == answers[number]:
                scheduler.finish(request_id)
                continue
            for index in range(width):
                scheduler.append(request_id, index, 0)
    return 1.0 - distinct / named


def _beams_continued(scores: np.ndarray, rng: Generator) -> tuple[list[int], np.ndarray]:
    """Parents of the next beams and their scores: the best of all beams' likeliest tokens."""
    width = len(scores)
    likely = -np.cumsum(rng.exponential(_GAP, (width, _TOP_TOKENS)), axis=1)
    likely -= np.log(np.exp(likely).sum(axis=1, keepdims=True))
    totals = (scores[:, None] + likely).ravel()
    best = np.argsort(-totals, kind="stable")[:width]
    return (best // _TOP_TOKENS).tolist(), totals[best]


def swapping_against_recomputing(context_tokens: int = 512) -> list[dict[str, Any]]:
    """Milliseconds to bring a preempted sequence of OPT-13B on an A100 back, by block size: estimated, not simulated.

    Swapped out and in over PCIe: a copy for each block; or one for each block, layer, and of keys and values, where
    every layer has a pool of its own, as vLLM's has. Recomputed: its tokens as one prompt.
    """
    spec = published_spec("opt-13b")
    shape = SpanShape(spec, range(len(spec.blocks)), Formats())
    costs = RooflineCosts(
        shape=shape, device=device_named("a100-40gb"), efficiency=ASSUMED, host=HostOverhead(per_step_s=0.002)
    )
    recomputed_s = costs.step_s(StepWork.of([(context_tokens, 0)], sampled=1))
    moved_s = 2 * context_tokens * costs.kv_bytes_per_token / PCIE_BYTES_PER_S
    rows: list[dict[str, Any]] = []
    for block_tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        blocks = -(-context_tokens // block_tokens)
        rows.append(
            {
                "block_tokens": block_tokens,
                "recomputed_ms": round(1e3 * recomputed_s, 2),
                "swapped_ms": round(1e3 * (moved_s + 2 * blocks * COPY_S), 2),
                "swapped_layer_by_layer_ms": round(
                    1e3 * (moved_s + 2 * blocks * 2 * len(spec.blocks) * COPY_S), 2
                ),
            }
        )
    return rows


def sharing_summary(progress: Callable[[str], None]) -> dict[str, Any]:
    """All of it."""
    saved: dict[str, dict[str, float]] = {}
    for way, beams in (("samples", False), ("beams", True)):
        for lengths in ("alpaca-like", "sharegpt-like"):
            fractions = {
                str(width): round(saved_fraction(lengths, width, beams=beams), 3) for width in (2, 4, 6)
            }
            saved[f"{way}, {lengths}"] = fractions
            progress(f"saved by {way} of {lengths}: {fractions}")
    return {"saved_fraction": saved, "swapping": swapping_against_recomputing()}
