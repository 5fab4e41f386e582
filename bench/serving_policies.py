"""Latency against throughput of the policies static, orca and paged on the same traces.

The question of ORCA's evaluation (OSDI 2022, section 6): what does deciding anew at every iteration gain over
deciding per batch? All three share the decoder, the kernels and the KV memory; only the policy differs. Three
mixes of lengths, three seeds; arrivals are Poisson at fractions of the throughput that `paged` reaches when
everything arrives at once. Answers run to their full length.

`static` answers each request as soon as it has ended, and finished rows compute nothing: a stronger baseline than
the paper's. `static, answered per batch` is the same run with each request's latency counted to the end of its batch,
as request-level serving answers. `python bench/comparison.py --live` runs the same beside its simulation.

    python bench/serving_policies.py            about 15 minutes on two cores
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from results import Figure, write_result

import plait.model
from plait.engine import Engine, EngineOptions, load_engine
from plait.ids import RequestId
from plait.scheduling import StepLimits
from plait.session import GenerationRequest, SamplingParams
from plait.workload import length_mix_named, poisson_arrivals_s

TINY = Path(plait.model.__file__).parent / "tiny"
POLICIES = ("static", "orca", "paged")
MIXES = ("uniform", "equal", "long-tail")
LOADS = (0.3, 0.6, 0.9, 1.2)
KV_CACHE_BYTES = 48 * 2**20  # 8,192 tokens of tiny in float32: memory binds before the batch limit does
MAX_SEQUENCES = 32
STEP_TOKENS = 512


@dataclass(frozen=True)
class Asked:
    """One request of a trace: when it comes at a rate of one per second, its prompt, its answer's length."""

    unit_arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int


def make_trace(mix: str, seed: int, requests: int) -> list[Asked]:
    rng = np.random.default_rng(seed)
    prompts, outputs = length_mix_named(mix).draw(requests, rng, most_total_tokens=1024)
    arrivals = poisson_arrivals_s(requests, 1.0, rng)
    return [
        Asked(float(arrival), tuple(rng.integers(10, 2000, prompt).tolist()), int(output))
        for arrival, prompt, output in zip(arrivals, prompts, outputs, strict=True)
    ]


def make_engine(policy: str, threads: int, *, dtype: str = "float32", prefix_caching: bool = True) -> Engine:
    limits = replace(StepLimits(), max_running_sequences=MAX_SEQUENCES, step_tokens=STEP_TOKENS)
    kv_cache_bytes = KV_CACHE_BYTES if dtype == "float32" else KV_CACHE_BYTES // 2
    return load_engine(
        EngineOptions(
            folder=TINY,
            kv_cache_bytes=kv_cache_bytes,
            policy=policy,
            limits=limits,
            threads=threads,
            dtype=dtype,
            prefix_caching=prefix_caching,
        )
    )


def run_trace(
    engine: Engine, trace: Sequence[Asked], rate_per_s: float | None, tag: str, *, temperature: float = 0.0
) -> dict[str, Any]:
    """Serve a trace in real time (`rate_per_s` None: everything at once); latencies are per generated token."""
    due = [asked.unit_arrival_s / rate_per_s if rate_per_s else 0.0 for asked in trace]
    finished_s, batch_end_s = [0.0] * len(trace), [0.0] * len(trace)
    first_s, token_gaps_s = [0.0] * len(trace), []
    last_token_s = [0.0] * len(trace)
    unanswered: list[int] = []
    batch_sizes: list[int] = []
    usage: list[float] = []
    start_s = time.perf_counter()
    sent = ended = 0
    while ended < len(trace):
        now_s = time.perf_counter() - start_s
        while sent < len(trace) and due[sent] <= now_s:
            asked = trace[sent]
            sampling = SamplingParams(
                max_tokens=asked.output_tokens, temperature=temperature, ignore_eos=True
            )
            engine.add(
                GenerationRequest(
                    id=RequestId(f"{tag}-{sent}"), prompt_token_ids=asked.prompt, sampling=sampling
                )
            )
            sent += 1
        if not engine.has_work:
            time.sleep(max(0.0, due[sent] - (time.perf_counter() - start_s)))
            continue
        deltas = engine.step()
        now_s = time.perf_counter() - start_s
        status = engine.status()
        batch_sizes.append(status.running)
        if len(batch_sizes) % 8 == 0:
            usage.append(engine.kv_usage().useful_fraction)
        for delta in deltas:
            index = int(delta.request_id.rsplit("-", 1)[1])
            if not first_s[index]:
                first_s[index] = now_s
            else:
                token_gaps_s.append(now_s - last_token_s[index])
            last_token_s[index] = now_s
            if delta.finished:
                finished_s[index] = now_s
                unanswered.append(index)
                ended += 1
        if status.running == 0:
            for index in unanswered:
                batch_end_s[index] = now_s
            unanswered = []
    output_tokens = sum(asked.output_tokens for asked in trace)

    def normalised(ends_s: Sequence[float]) -> list[float]:
        pairs = zip(trace, due, ends_s, strict=True)
        return [(end - begin) / asked.output_tokens for asked, begin, end in pairs]

    own = normalised(finished_s)
    summary: dict[str, Any] = {
        "requests_per_s": len(trace) / max(finished_s),
        "output_tokens_per_s": output_tokens / max(finished_s),
        "median_s_per_token": statistics.median(own),
        "p99_s_per_token": float(np.percentile(own, 99)),
        "median_first_token_s": statistics.median(a - b for a, b in zip(first_s, due, strict=True)),
        "p99_token_gap_s": float(np.percentile(token_gaps_s, 99)),
        "mean_running": statistics.mean(batch_sizes),
        "mean_useful_kv_fraction": statistics.mean(usage) if usage else None,
    }
    per_batch = normalised(batch_end_s)
    summary["per_batch_median_s_per_token"] = statistics.median(per_batch)
    summary["per_batch_p99_s_per_token"] = float(np.percentile(per_batch, 99))
    return summary


def curve(
    points: Sequence[dict[str, Any]], policy: str, mix: str, latency: str
) -> tuple[list[float], list[float]]:
    """Median over the seeds of throughput and latency, one point a load."""
    chosen = [point for point in points if point["policy"] == policy and point["mix"] == mix]
    loads = sorted({point["load"] for point in chosen})
    at = [[point for point in chosen if point["load"] == load] for load in loads]
    return (
        [statistics.median(point["output_tokens_per_s"] for point in same) for same in at],
        [statistics.median(point[latency] for point in same) for same in at],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    engines = {policy: make_engine(policy, arguments.threads) for policy in POLICIES}
    points: list[dict[str, Any]] = []
    for mix in MIXES:
        for seed in range(arguments.seeds):
            trace = make_trace(mix, seed, arguments.requests)
            saturated = run_trace(engines["paged"], trace, None, f"{mix}-{seed}-warm")
            saturated = run_trace(engines["paged"], trace, None, f"{mix}-{seed}-full")
            for load in LOADS:
                rate = load * saturated["requests_per_s"]
                # Interleaved, so that a change of the machine's speed meets all policies alike.
                for policy, engine in engines.items():
                    point = run_trace(engine, trace, rate, f"{mix}-{seed}-{load}-{policy}")
                    points.append(
                        {
                            "policy": policy,
                            "mix": mix,
                            "seed": seed,
                            "load": load,
                            "rate_per_s": rate,
                            **point,
                        }
                    )
                    print(mix, seed, load, policy, {key: round(value, 4) for key, value in point.items()})
    summary: dict[str, Any] = {}
    figures: list[Figure] = []
    for mix in MIXES:
        figure = Figure(
            title=f"{mix} lengths",
            x_label="output tokens/s",
            y_label="median latency per token (s)",
            log_y=True,
        )
        for policy in POLICIES:
            figure.add_line(policy, *curve(points, policy, mix, "median_s_per_token"))
        figure.add_line(
            "static, answered per batch", *curve(points, "static", mix, "per_batch_median_s_per_token")
        )
        figures.append(figure)
        at_top = {
            policy: [p for p in points if (p["policy"], p["mix"], p["load"]) == (policy, mix, LOADS[-1])]
            for policy in POLICIES
        }
        throughput = {
            policy: statistics.median(p["output_tokens_per_s"] for p in same)
            for policy, same in at_top.items()
        }
        latency = {
            policy: statistics.median(p["median_s_per_token"] for p in same)
            for policy, same in at_top.items()
        }
        summary[mix] = {
            "output_tokens_per_s at 1.2 x capacity": throughput,
            "orca / static throughput": throughput["orca"] / throughput["static"],
            "paged / static throughput": throughput["paged"] / throughput["static"],
            "paged / orca throughput": throughput["paged"] / throughput["orca"],
            "static / orca median latency": latency["static"] / latency["orca"],
            "static / paged median latency": latency["static"] / latency["paged"],
            "median over points of useful KV fraction": {
                policy: statistics.median(
                    p["mean_useful_kv_fraction"]
                    for p in points
                    if p["policy"] == policy and p["mix"] == mix and p["mean_useful_kv_fraction"]
                )
                for policy in POLICIES
            },
        }
    settings = {
        "model": "tiny, float32",
        "requests": arguments.requests,
        "seeds": arguments.seeds,
        "loads": LOADS,
        "kv_cache_bytes": KV_CACHE_BYTES,
        "max_running_sequences": MAX_SEQUENCES,
        "step_tokens": STEP_TOKENS,
    }
    write_result("serving_policies", settings=settings, samples=points, summary=summary, figures=figures)


if __name__ == "__main__":
    main()
