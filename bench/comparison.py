"""Policies on the same traces: what ORCA, vLLM and DistKV-LLM claim, simulated at the scale of their papers.

Only the policies differ: scheduler, pool, router and loans are the code that serves, steps are those of a roofline.

    one server      OPT-13B, 66B and 175B on 1, 4 and 8 A100s; lengths short (Alpaca's), mixed (ShareGPT's) and of a
                    long tail; ORCA's synthetic trace and equal lengths; common beginnings of prompts; sizes of blocks
    unequal         the same policies on A100, L4 and T4 together, and on two gaming GPUs with two Macs
    lending         pages, DistKV-LLM's loans in both versions, and one allocator that does it all (hybrid), with long
                    requests on equal and on unequal machines; nine traces of the paper: bench/distkv_simulated.py

Latency is per generated token, from arrival to the last one (normalised latency). Load is a part of what `paged`
serves when everything arrives at once. What a policy sustains is the rate at which its mean latency is twice, and five
times, the least one of an idle server, interpolated between measured rates, for each seed.

    python bench/comparison.py                  about 25 minutes of one core, half with --jobs 2
    python bench/comparison.py --only unequal
    python bench/comparison.py --live           live with the small model beside its simulation, about 8 minutes
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comparison.cases import (
    COMMON_LOAD,
    LIMITS_TIMES_IDLE,
    LONG,
    ONE_SERVER,
    ORCAS_OWN,
    TRANSLATING,
    UNEQUAL,
    Case,
)
from comparison.claims import batching_claims
from comparison.curves import Sample, at_load, curve, names, of, sustained, times_as_much
from comparison.point import capacity_per_s
from comparison.policies import PAGED
from comparison.series import kept, run_all
from comparison.sharing import sharing_summary
from results import Figure, write_result

AT_COMMON_LOAD = (
    "normalised_mean_s",
    "normalised_p50_s",
    "normalised_p90_s",
    "normalised_p99_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "output_tokens_per_s",
    "mean_batch",
    "preemptions",
    "useful_kv_fraction",
    "reserved_kv_fraction",
    "inside_kv_fraction",
    "jain_index",
    "max_slowdown",
    "finished_fraction",
)
AT_LOAD_WITH_LOANS = (
    *AT_COMMON_LOAD,
    "longest_context_tokens",
    "kv_blocks_moved",
    "prefix_hit_fraction",
)
BLOCK_SIZES = (1, 4, 8, 16, 32, 64, 128, 256)


def summarised(samples: Sequence[Sample]) -> dict[str, Any]:
    """For each case what policies sustain (median, least, most over the seeds) and how they are at the common load."""
    summary: dict[str, Any] = {}
    for case in names(samples, "case"):
        mine = of(samples, case=case)
        gains: dict[str, Any] = {}
        for policy in names(mine, "policy"):
            if policy != "paged":
                gains[policy] = {
                    f"{times:g} x idle": times_as_much(mine, "paged", policy, times_idle=times)
                    for times in LIMITS_TIMES_IDLE
                }
        summary[case] = {
            "sustained_requests_per_s": {
                f"{times:g} x idle": sustained(mine, times_idle=times) for times in LIMITS_TIMES_IDLE
            },
            "paged over": gains,
            f"at load {COMMON_LOAD}": dict(at_load(mine, COMMON_LOAD, AT_COMMON_LOAD)),
        }
    return summary


def figures(samples: Sequence[Sample]) -> Iterator[Figure]:
    """Latency against throughput, a figure for each case."""
    for case in names(samples, "case"):
        figure = Figure(case, "requests served/s", "mean latency per token (s)", log_x=True, log_y=True)
        mine = of(samples, case=case)
        for policy in names(mine, "policy"):
            figure.add_line(policy, *curve(of(mine, policy=policy), "served_per_s", "normalised_mean_s"))
        if any("per_batch_mean_s" in sample for sample in mine):
            static = of(mine, policy="static")
            figure.add_line("static, answered per batch", *curve(static, "served_per_s", "per_batch_mean_s"))
        yield figure


def block_sizes(seeds: int) -> dict[str, dict[str, float]]:
    """Requests per second by size of blocks, when everything arrives at once at OPT-13B on an A100."""
    found: dict[str, dict[str, float]] = {}
    for lengths, requests in (("alpaca-like", 500), ("sharegpt-like", 200)):
        found[lengths] = {}
        for size in BLOCK_SIZES:
            machine = f"{{name: server, device: a100-40gb, host_s: 0.002, block_tokens: {size}}}"
            case = Case(f"blocks of {size}", "opt-13b", (machine,), lengths, requests)
            rates = [capacity_per_s(case, PAGED, seed) for seed in range(seeds)]
            found[lengths][str(size)] = statistics.median(rates)
        print(lengths, found[lengths], flush=True)
    return found


def one_server(options: argparse.Namespace) -> None:
    """ORCA and vLLM at the scale of their papers."""
    samples = run_all((*ONE_SERVER, *ORCAS_OWN, *TRANSLATING), options.seeds, options.jobs, options.keep)
    sharing = kept(options.keep, "sharing", lambda: sharing_summary(print))
    sizes = kept(options.keep, "sizes of blocks", lambda: block_sizes(options.seeds))
    write_result(
        "comparison",
        settings={"seeds": options.seeds},
        samples=samples,
        summary={
            "claims": batching_claims(samples, sharing, sizes),
            "cases": summarised(samples),
            "sharing": sharing,
            "requests_per_s by block size": sizes,
        },
        figures=list(figures(samples)),
        columns=3,
    )


def unequal(options: argparse.Namespace) -> None:
    """The same policies on machines that differ."""
    samples = run_all(UNEQUAL, options.seeds, options.jobs, options.keep)
    write_result(
        "comparison_unequal",
        settings={"seeds": options.seeds},
        samples=samples,
        summary=summarised(samples),
        figures=list(figures(samples)),
        columns=3,
    )


def live(options: argparse.Namespace) -> None:
    """Static, ORCA and pages with a real engine, beside their simulation."""
    from comparison.live import figures, live_and_simulated, summarised

    samples = live_and_simulated(options.live_seeds, options.live_requests)
    write_result(
        "comparison_live",
        settings={"seeds": options.live_seeds, "requests": options.live_requests},
        samples=samples,
        summary=summarised(samples),
        figures=list(figures(samples)),
    )


def lending(options: argparse.Namespace) -> None:
    """Pages, loans, and both with shared beginnings, on several machines with long requests."""
    samples = run_all(LONG, options.seeds, options.jobs, options.keep)
    summary: dict[str, Any] = {}
    for case in names(samples, "case"):
        mine = of(samples, case=case)
        summary[case] = {
            f"load {load:g}": dict(at_load(mine, load, AT_LOAD_WITH_LOANS)) for load in names(mine, "load")
        }
    write_result(
        "comparison_lending",
        settings={"seeds": options.seeds},
        samples=samples,
        summary=summary,
        figures=list(figures(samples)),
        columns=4,
    )


PARTS = {"one-server": one_server, "unequal": unequal, "lending": lending}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=tuple(PARTS), default=None)
    parser.add_argument("--keep", type=Path, help="a folder for finished series, so that a run can go on")
    parser.add_argument("--live", action="store_true", help="run only the live part")
    parser.add_argument("--live-requests", type=int, default=48)
    parser.add_argument("--live-seeds", type=int, default=2)
    options = parser.parse_args()
    if options.live:
        live(options)
        return
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
