"""Requests to a server, all at once, and what came of them."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from peers.workloads import Request
from plait.bench.client import OpenAiServer, RequestOutcome

_TIMEOUT_S = 1800.0


def send_all(origin: str, requests: Sequence[Request]) -> dict[str, Any]:
    """Send every request now and read every answer: tokens a second, and waits as the clients saw them, in seconds."""
    return asyncio.run(_send_all(origin, requests))


async def _send_all(origin: str, requests: Sequence[Request]) -> dict[str, Any]:
    async with OpenAiServer(origin, None) as server:
        model, _ = await server.model(None)
        began_s = time.perf_counter()
        outcomes = await asyncio.gather(*(_send(server, model, request, began_s) for request in requests))
    errors = [outcome.error for outcome in outcomes if not outcome.succeeded]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(requests)} requests to {origin} failed: {errors[0]}")
    seconds = max(outcome.start_s + outcome.latency_s for outcome in outcomes)
    tokens = sum(outcome.output_tokens for outcome in outcomes)
    gaps_s = [gap_s for outcome in outcomes for gap_s in outcome.itls_s]
    first_s = [outcome.start_s + outcome.ttft_s for outcome in outcomes]
    return {
        "seconds": seconds,
        "output_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "first_token_median_s": float(np.median(first_s)),
        "first_token_worst_s": max(first_s),
        "gap_median_s": float(np.median(gaps_s)),
        "gap_p99_s": float(np.percentile(gaps_s, 99)),
    }


async def _send(server: OpenAiServer, model: str, request: Request, began_s: float) -> RequestOutcome:
    payload = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return await server.stream(
        payload,
        "completions",
        prompt_tokens=len(request.prompt),
        timeout_s=_TIMEOUT_S,
        began_s=began_s,
        queue_s=0.0,
    )
