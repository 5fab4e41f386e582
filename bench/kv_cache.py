"""What paging, reservation and prefix sharing do to KV memory and time.

1. Waste: the part of held KV memory that holds nothing, for `orca` (room for the longest possible answer is set
   aside) and `paged`, under saturation; once when clients declare their answer's true length, once when they declare
   512 tokens as most clients do. vLLM's paper (SOSP 2023, section 2) reports 20.4-38.2 % useful for reservation
   at the maximum, and 96.3 % for paging.
2. Prefix cache: requests that share a system prompt, with the cache on and off; and requests that share nothing, to
   see what looking costs.

    python bench/kv_cache.py                    about 3 minutes on two cores
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from results import write_result

import plait.model
from plait.engine import Engine, EngineOptions, load_engine
from plait.ids import RequestId
from plait.scheduling import StepLimits
from plait.session import GenerationRequest, SamplingParams
from plait.workload import length_mix_named

TINY = Path(plait.model.__file__).parent / "tiny"
KV_CACHE_BYTES = 48 * 2**20
DECLARED_TOKENS = 512


def make_engine(policy: str, threads: int, *, prefix_caching: bool = True) -> Engine:
    limits = replace(StepLimits(), max_running_sequences=64, step_tokens=512)
    return load_engine(
        EngineOptions(
            folder=TINY,
            kv_cache_bytes=KV_CACHE_BYTES,
            policy=policy,
            limits=limits,
            prefix_caching=prefix_caching,
            threads=threads,
        )
    )


def measure_waste(policy: str, declared: str, threads: int, requests: int) -> dict[str, Any]:
    """Serve requests that all wait from the start; a client leaves when its answer has its true length."""
    engine = make_engine(policy, threads)
    rng = np.random.default_rng(0)
    prompts, outputs = length_mix_named("long-tail").draw(requests, rng, most_total_tokens=DECLARED_TOKENS)
    left: dict[RequestId, int] = {}
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        id = RequestId(f"r{number}")
        left[id] = int(output)
        most = int(output) if declared == "true length" else DECLARED_TOKENS
        sampling = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
        prompt_ids = tuple(rng.integers(10, 2000, int(prompt)).tolist())
        engine.add(GenerationRequest(id=id, prompt_token_ids=prompt_ids, sampling=sampling))
    useful: list[float] = []
    running: list[int] = []
    start_s = time.perf_counter()
    while engine.has_work:
        for delta in engine.step():
            left[delta.request_id] -= sum(len(part.token_ids) for part in delta.sequences)
            if left[delta.request_id] <= 0:
                engine.abort(delta.request_id)
        if engine.status().waiting:  # saturated: more would run if there were room
            useful.append(engine.kv_usage().useful_fraction)
            running.append(engine.status().running)
    return {
        "policy": policy,
        "declared": declared,
        "seconds": time.perf_counter() - start_s,
        "output_tokens_per_s": float(outputs.sum()) / (time.perf_counter() - start_s),
        "useful_kv_fraction": statistics.mean(useful),
        "mean_running": statistics.mean(running),
        "preemptions": engine.status().preemptions_total,
    }


def measure_prefix(shared_tokens: int, caching: bool, threads: int, requests: int) -> dict[str, Any]:
    """Answer requests one after another; all begin with the same tokens."""
    engine = make_engine("paged", threads, prefix_caching=caching)
    rng = np.random.default_rng(0)
    shared = tuple(rng.integers(10, 2000, shared_tokens).tolist())
    first_token_s: list[float] = []
    start_s = time.perf_counter()
    for number in range(requests):
        own = tuple(rng.integers(10, 2000, 512 + 32 - shared_tokens).tolist())
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        sent_s = time.perf_counter()
        engine.add(
            GenerationRequest(id=RequestId(f"r{number}"), prompt_token_ids=shared + own, sampling=sampling)
        )
        while engine.has_work:
            if engine.step() and len(first_token_s) == number:
                first_token_s.append(time.perf_counter() - sent_s)
    status = engine.status()
    return {
        "shared_tokens": shared_tokens,
        "prefix_caching": caching,
        "seconds": time.perf_counter() - start_s,
        "median_first_token_s": statistics.median(first_token_s),
        "hit_fraction": status.prefix_hit_tokens_total / max(1, status.prefix_query_tokens_total),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    waste = [
        measure_waste(policy, declared, arguments.threads, arguments.requests)
        for declared in ("true length", "maximum")
        for policy in ("orca", "paged")
    ]
    prefix = [
        {"repeat": repeat, **measure_prefix(shared, caching, arguments.threads, 24)}
        for repeat in range(arguments.repeats)
        for shared in (512, 0)
        for caching in (True, False)
    ]

    def seconds(shared: int, caching: bool, key: str) -> float:
        return statistics.median(
            point[key]
            for point in prefix
            if point["shared_tokens"] == shared and point["prefix_caching"] == caching
        )

    by_case = {(point["policy"], point["declared"]): point for point in waste}
    summary: dict[str, Any] = {
        "useful part of held KV memory": {
            f"{policy}, {declared} declared": point["useful_kv_fraction"]
            for (policy, declared), point in by_case.items()
        },
        "requests running": {
            f"{policy}, {declared} declared": point["mean_running"]
            for (policy, declared), point in by_case.items()
        },
        "paged / orca throughput": {
            declared: by_case["paged", declared]["output_tokens_per_s"]
            / by_case["orca", declared]["output_tokens_per_s"]
            for declared in ("true length", "maximum")
        },
        "prefix cache, 512 of 544 prompt tokens shared": {
            "first token, off / on": seconds(512, False, "median_first_token_s")
            / seconds(512, True, "median_first_token_s"),
            "whole run, off / on": seconds(512, False, "seconds") / seconds(512, True, "seconds"),
        },
        "prefix cache, nothing shared": {
            "whole run, on / off": seconds(0, True, "seconds") / seconds(0, False, "seconds")
        },
    }
    settings = {
        "model": "tiny, float32",
        "kv_cache_bytes": KV_CACHE_BYTES,
        "requests": arguments.requests,
        "declared maximum": DECLARED_TOKENS,
        "repeats": arguments.repeats,
    }
    write_result("kv_cache", settings=settings, samples={"waste": waste, "prefix": prefix}, summary=summary)


if __name__ == "__main__":
    main()
