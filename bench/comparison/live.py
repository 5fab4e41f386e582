"""Policies live with the small model, and simulated with its measured costs: do they agree in sign, and in size?

The live side is that of bench/serving_policies.py: the real engine on one thread in bfloat16, as the shipped table of
costs was measured. The simulated side gets the same requests at the same times, the same limits and as many KV blocks;
steps take what the table says, which was measured apart from these runs, with tokens drawn at the same temperature.
Load is a part of what `paged` serves live when everything arrives at once.
"""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import serving_policies as live_runs
from results import Figure

import plait.profiler
from comparison.curves import Sample, curve, names, of
from plait.profiler import read_profile
from plait.simulator import latency_samples, parse_scenario, run_of_scenario
from plait.workload import TraceRequest, format_trace

LOADS = (0.4, 0.8, 1.2)
MEASURED = Path(plait.profiler.__file__).parent / "shipped" / "tiny-zen4.json"
SCENARIO = """
model: {model}
machines:
  - name: engine
    profile: {profile}
    force_profile: true
    extrapolate: true
    kv_memory: {kv_bytes}
    scheduling: {policy}
    limits: {{step_tokens: {step_tokens}, max_running_sequences: {sequences}}}
network: {{within: {{one_way_s: 0, bandwidth_bytes_per_s: 1.0e+12}}}}
workload: {{trace: trace.jsonl}}
run: {{check: end, patience_s: 1.0e+9}}
"""
KV_BYTES = live_runs.KV_CACHE_BYTES // 2  # in bfloat16


def live_and_simulated(seeds: int, requests: int) -> list[dict[str, Any]]:
    """All samples: for each trace, load and policy a live run and a simulated one."""
    engines = {  # a trace runs several times: prompts must not be found in the cache
        policy: live_runs.make_engine(policy, 1, dtype="bfloat16", prefix_caching=False)
        for policy in live_runs.POLICIES
    }
    # What the host has to do depends on it.
    serve = partial(live_runs.run_trace, temperature=read_profile(MEASURED).temperature)
    samples: list[dict[str, Any]] = []
    for mix in live_runs.MIXES:
        for seed in range(seeds):
            trace = live_runs.make_trace(mix, seed, requests)
            serve(engines["paged"], trace, None, f"{mix}-{seed}-warm")
            full = serve(engines["paged"], trace, None, f"{mix}-{seed}-full")
            for load in LOADS:
                rate_per_s = load * full["requests_per_s"]
                for policy, engine in engines.items():
                    at = {"mix": mix, "seed": seed, "load": load, "policy": policy}
                    tag = f"{mix}-{seed}-{load}-{policy}"
                    found = serve(engine, trace, rate_per_s, tag)
                    found = {key: found[key] for key in KEYS}
                    samples.append({**at, "way": "live", "rate_per_s": rate_per_s, **found})
                    found = _simulated(policy, trace, rate_per_s)
                    samples.append({**at, "way": "simulated", "rate_per_s": rate_per_s, **found})
                    for sample in samples[-2:]:
                        print({key: sample[key] for key in ("way", *at, "median_s_per_token")}, flush=True)
    return samples


KEYS = (
    "output_tokens_per_s",
    "median_s_per_token",
    "p99_s_per_token",
    "median_first_token_s",
    "mean_running",
)


def _simulated(policy: str, trace: Sequence[live_runs.Asked], rate_per_s: float) -> dict[str, float]:
    requests = [
        TraceRequest(
            arrival_s=asked.unit_arrival_s / rate_per_s,
            prompt_tokens=len(asked.prompt),
            output_tokens=asked.output_tokens,
        )
        for asked in trace
    ]
    text = SCENARIO.format(
        model=live_runs.TINY,
        profile=MEASURED,
        kv_bytes=KV_BYTES,
        policy=policy,
        step_tokens=live_runs.STEP_TOKENS,
        sequences=live_runs.MAX_SEQUENCES,
    )
    with TemporaryDirectory() as folder:
        (Path(folder) / "trace.jsonl").write_text("\n".join(format_trace(requests)) + "\n")
        run = run_of_scenario(parse_scenario(text, "live"), Path(folder))
    run.run()
    latencies = latency_samples(run.outcomes)
    totals = next(iter(run.workers.values())).totals
    outcomes = run.outcomes
    last_s = max(arrival + end for arrival, end in zip(outcomes.arrival_s, outcomes.end_s, strict=True))
    return {
        "output_tokens_per_s": sum(outcomes.output_tokens) / last_s,
        "median_s_per_token": float(np.median(latencies["normalised"])),
        "p99_s_per_token": float(np.percentile(latencies["normalised"], 99)),
        "median_first_token_s": float(np.median(latencies["ttft"])),
        "mean_running": totals.step_sequences / totals.steps,
    }


def summarised(samples: Sequence[Sample]) -> dict[str, Any]:
    """For each mix and load: medians of both ways, and how often both put two policies in the same order.

    Only pairs that differ by more than a tenth live are counted.
    """
    summary: dict[str, Any] = {}
    same = pairs = 0
    for mix in names(samples, "mix"):
        for load in names(samples, "load"):
            row: dict[str, Any] = {}
            for policy in names(samples, "policy"):
                row[policy] = {
                    key: {
                        way: round(
                            statistics.median(
                                sample[key]
                                for sample in of(samples, mix=mix, load=load, policy=policy, way=way)
                            ),
                            5,
                        )
                        for way in ("live", "simulated")
                    }
                    for key in KEYS
                }
            for key in ("median_s_per_token", "p99_s_per_token", "output_tokens_per_s"):
                for one, other in (("static", "orca"), ("static", "paged"), ("orca", "paged")):
                    live, simulated = (
                        row[one][key][way] / row[other][key][way] for way in ("live", "simulated")
                    )
                    if not 1 / 1.1 < live < 1.1:
                        pairs += 1
                        same += (live > 1) == (simulated > 1)
            summary[f"{mix}, load {load}"] = row
    ratios = [
        cell[key]["simulated"] / cell[key]["live"]
        for row in summary.values()
        for cell in row.values()
        for key in ("median_s_per_token", "output_tokens_per_s")
    ]
    return {
        "pairs of policies in the same order": [same, pairs],
        "simulated over live: median, least, most": [
            round(each, 3) for each in (statistics.median(ratios), min(ratios), max(ratios))
        ],
        "medians": summary,
    }


def figures(samples: Sequence[Sample]) -> Iterator[Figure]:
    """Latency against throughput, live and simulated, a figure for each mix."""
    for mix in names(samples, "mix"):
        figure = Figure(f"{mix} lengths", "output tokens/s", "median latency per token (s)", log_y=True)
        for policy in names(samples, "policy"):
            for way in ("live", "simulated"):
                mine = of(samples, mix=mix, policy=policy, way=way)
                figure.add_line(f"{policy}, {way}", *curve(mine, "output_tokens_per_s", "median_s_per_token"))
        yield figure
