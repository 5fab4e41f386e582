"""All runs of one command: profile, calibration, and the live and simulated runs of each level."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fidelity.levels import Figure, operation_figures, ranking_figures, request_figures, step_figures
from fidelity.live import LiveRun, RequestTimes, new_loop, run_live, serving
from fidelity.simulated import Calibration, calibrate, machine_like, simulate
from fidelity.workloads import (
    CALIBRATION_SEED,
    CONFIGURATIONS,
    SEQUENCES,
    Configuration,
    chat_trace,
    options_of,
    shared_trace,
)
from plait.costs import Profile
from plait.engine import EngineOptions
from plait.profiler import ProfileWish, profile_model
from plait.simulator import MachineSpec, replay
from plait.workload import TraceRequest

PROFILE_KV_BYTES = 512 << 20
PROFILE_ROWS = 512
PROFILE_CONTEXT = 1000
KV_TOKENS = 32768
MORE_PASSES = 2
"""Runs that were disturbed are run again in so many more passes over all."""
CALIBRATION_LOADS = (None, 0.85, 0.5, 0.25)
RANKED_LOAD = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What to run: `repeats` of `seeds` traces of `requests` at each of `loads`, and so many configurations ranked."""

    folder: Path
    name: str
    loads: tuple[float, ...]
    seeds: int
    repeats: int
    requests: int
    configurations: int
    profile_repeats: int
    live_steps: int
    clock: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is known of the machine before anything is judged."""

    profile: Profile
    calibration: Calibration
    capacity_per_s: float
    options: EngineOptions
    machine: MachineSpec


def take_profile(wish: Wish) -> Profile:
    """Measure the model on this machine, as `plait profile` does."""
    options = EngineOptions(folder=wish.folder, dtype="bfloat16", threads=1, kv_cache_bytes=PROFILE_KV_BYTES)
    return profile_model(
        options,
        ProfileWish(
            name=wish.name,
            step_tokens=PROFILE_ROWS,
            context_tokens=PROFILE_CONTEXT,
            sequences=SEQUENCES,
            repeats=wish.profile_repeats,
            live_steps=wish.live_steps,
            temperature=0.0,
            clock=wish.clock,
        ),
    )


def lives(options: EngineOptions, traces: Sequence[Sequence[TraceRequest]]) -> tuple[list[LiveRun], int]:
    """Serve traces one after another on one engine; the runs, and the KV blocks that it had."""

    async def serve() -> tuple[list[LiveRun], int]:
        async with serving(options) as engine:
            runs = [await run_live(engine, trace) for trace in traces]
            return runs, engine.status().kv_blocks_total

    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(serve())


def set_up(wish: Wish, profile: Profile) -> tuple[Setup, dict[str, Any]]:
    """Find the capacity, and fit what surrounds the kernels, on traces of their own."""
    options = options_of(wish.folder, KV_TOKENS, profile.facts.kv_bytes_per_token)
    at_once = chat_trace(CALIBRATION_SEED, wish.requests, None)
    (first, second), kv_blocks = lives(options, [at_once, at_once])
    capacity_per_s = max(_per_s(first), _per_s(second))  # what was disturbed is slower
    traces = [
        chat_trace(CALIBRATION_SEED + place, wish.requests, None if load is None else load * capacity_per_s)
        for place, load in enumerate(CALIBRATION_LOADS)
    ]
    runs, _ = lives(options, traces)
    calibration = calibrate(profile, runs)
    machine = machine_like(options, kv_blocks, calibration.profile)
    simulated_per_s = _requests_per_s(simulate(machine, at_once, calibration.one_way_s).requests)
    setup = Setup(
        profile=profile,
        calibration=calibration,
        capacity_per_s=capacity_per_s,
        options=options,
        machine=machine,
    )
    return setup, {
        "capacity_requests_per_s": capacity_per_s,
        "simulated_capacity_requests_per_s": simulated_per_s,
        "calibration": {
            "host": asdict(calibration.profile.host),
            "factors": asdict(calibration.factors),
            "one_way_s": calibration.one_way_s,
            "steps": calibration.steps,
        },
        "profile_errors": {name: asdict(errors) for name, errors in profile.errors.items()},
        "disturbance": [asdict(run.disturbance) for run in runs],
    }


def judge_decisions(wish: Wish, setup: Setup) -> tuple[list[Figure], dict[str, Any]]:
    """L0: records of live runs, under every policy, replayed."""
    small = {
        "static": ("static", 8192),
        "orca": ("orca", 8192),
        "paged, little memory": ("paged", 2048),
        "paged, prefixes": ("paged", 4096),
    }
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for name, (policy, kv_tokens) in small.items():
        given = Configuration(name=name, policy=policy, kv_tokens=kv_tokens)
        options = given.options(setup.options, setup.profile.facts.kv_bytes_per_token)
        make = shared_trace if "prefixes" in name else chat_trace
        (run,), kv_blocks = lives(options, [make(0, wish.requests, setup.capacity_per_s)])
        figure, details[name] = _replayed(name, run, options, kv_blocks, setup)
        figures.append(figure)
    return figures, details


def judge_requests(wish: Wish, setup: Setup) -> tuple[list[Figure], dict[str, Any], dict[str, Any]]:
    """L2 and L3: figures, details, and samples for plots."""
    traces = {
        (load, seed): chat_trace(seed, wish.requests, load * setup.capacity_per_s)
        for load in wish.loads
        for seed in range(wish.seeds)
    }
    found = _repeated(setup.options, traces, wish.repeats)
    figures, details = step_figures(
        [found[key] for key in traces], setup.calibration.profile.table_costs(extrapolates=True)
    )
    details = {"steps": details, "disturbed": _disturbed(found.values()), "loads": {}}
    key = (wish.loads[-1], 0)
    kv_blocks = setup.machine.kv_blocks
    figure, details["replayed"] = _replayed("all of a run", found[key][0], setup.options, kv_blocks, setup)
    figures.append(figure)
    samples: dict[str, Any] = {}
    for load in wish.loads:
        simulated: list[RequestTimes] = []
        for seed in range(wish.seeds):
            run = simulate(setup.machine, traces[load, seed], setup.calibration.one_way_s)
            simulated.extend(run.requests)
        repeats = [
            [one for seed in range(wish.seeds) for one in found[load, seed][repeat].requests]
            for repeat in range(wish.repeats)
        ]
        new, details["loads"][f"{load:g}"] = request_figures(load, repeats, simulated)
        figures.extend(new)
        samples[f"{load:g}"] = {
            "live": [[_sample(one) for one in repeat] for repeat in repeats],
            "simulated": [_sample(one) for one in simulated],
        }
    return figures, details, samples


def judge_ranking(wish: Wish, setup: Setup) -> tuple[list[Figure], dict[str, Any]]:
    """L4: configurations in an order, live and simulated."""
    chosen = CONFIGURATIONS[: wish.configurations]
    trace = chat_trace(0, wish.requests, RANKED_LOAD * setup.capacity_per_s)
    live: list[list[LiveRun]] = []
    simulated: list[tuple[RequestTimes, ...]] = []
    preemptions: dict[str, Any] = {}
    for given in chosen:
        options = given.options(setup.options, setup.profile.facts.kv_bytes_per_token)
        runs, kv_blocks = lives(options, [trace] * wish.repeats)
        machine = machine_like(options, kv_blocks, setup.calibration.profile)
        run = simulate(machine, trace, setup.calibration.one_way_s)
        live.append(runs)
        simulated.append(run.requests)
        preemptions[given.name] = {
            "live": [one.preemptions for one in runs],
            "simulated": run.preemptions,
        }
    figures, details = ranking_figures(
        [given.name for given in chosen],
        [[run.requests for run in runs] for runs in live],
        simulated,
    )
    return figures, {**details, "preemptions": preemptions, "disturbed": _disturbed(live)}


def all_levels(wish: Wish, profile: Profile | None) -> tuple[list[Figure], dict[str, Any], dict[str, Any]]:
    """Everything, in order; figures, details and samples."""
    began_s = time.monotonic()
    say = _Progress(began_s)
    known = profile or take_profile(wish)
    say("profiled")
    setup, before = set_up(wish, known)
    say(f"calibrated: {setup.capacity_per_s:.1f} requests/s, {before['calibration']}")
    decisions, replayed = judge_decisions(wish, setup)
    say("L0")
    figures = [*decisions, *operation_figures(known)]
    judged, details, samples = judge_requests(wish, setup)
    say("L2 and L3")
    ranked: list[Figure] = []
    ranking: dict[str, Any] = {}
    if wish.configurations > 1:
        ranked, ranking = judge_ranking(wish, setup)
        say("L4")
    figures = sorted([*figures, *judged, *ranked], key=lambda figure: figure.level)
    details = {"before": before, "L0": replayed, "L2 and L3": details, "L4": ranking}
    details["duration_s"] = time.monotonic() - began_s
    return figures, details, samples


class _Progress:
    """A line for each stage."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.0f} s  {what}", flush=True)


def _repeated(
    options: EngineOptions, traces: dict[tuple[float, int], tuple[TraceRequest, ...]], repeats: int
) -> dict[tuple[float, int], list[LiveRun]]:
    """Passes over all traces until each has so many calm runs; the calmest ones are kept where there are too few."""
    found: dict[tuple[float, int], list[LiveRun]] = {key: [] for key in traces}

    async def serve() -> None:
        async with serving(options) as engine:
            for number in range(repeats + MORE_PASSES):
                for key, trace in traces.items():
                    if number < repeats or sum(run.disturbance.calm for run in found[key]) < repeats:
                        found[key].append(await run_live(engine, trace))

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())
    return {
        key: sorted(runs, key=lambda run: (not run.disturbance.calm, run.disturbance.worst))[:repeats]
        if not all(run.disturbance.calm for run in runs)
        else runs[:repeats]
        for key, runs in found.items()
    }


def _replayed(
    name: str, run: LiveRun, options: EngineOptions, kv_blocks: int, setup: Setup
) -> tuple[Figure, dict[str, Any]]:
    machine = machine_like(options, kv_blocks, setup.calibration.profile)
    again = replay(machine, run.steps, run.record)
    different = 0 if again.first_difference is None else len(again.live) - again.first_difference
    figure = Figure(
        level="L0", what=f"{name}: steps decided otherwise", value=different, goal=0.0, unit="steps"
    )
    return figure, {
        "steps": len(again.live),
        "preemptions": again.preemptions,
        "preemptions_live": run.preemptions,
        "prefix_hit_tokens": again.prefix_hit_tokens,
        "prefix_hit_tokens_live": run.prefix_hit_tokens,
        "first_difference": again.first_difference,
    }


def _disturbed(runs: Any) -> dict[str, Any]:
    kept = [run for repeats in runs for run in repeats]
    return {
        "runs": len(kept),
        "not_calm": sum(not run.disturbance.calm for run in kept),
        "worst_fraction": max(run.disturbance.worst for run in kept),
    }


def _sample(one: RequestTimes) -> list[float]:
    return [round(value, 6) for value in (one.arrival_s, one.first_s, one.end_s, one.tokens)]


def _per_s(run: LiveRun) -> float:
    return _requests_per_s(run.requests)


def _requests_per_s(requests: Sequence[RequestTimes]) -> float:
    return len(requests) / max(one.arrival_s + one.end_s for one in requests)
