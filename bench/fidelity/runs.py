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
PROFILE_CONTEXT = 1000
KV_TOKENS = 32768
MORE_PASSES = 2
"""Runs that were disturbed are run again in so many more passes over all."""
CALIBRATION_LOADS = (None, 0.85, 0.5, 0.25)
RANKED_LOAD = 1.25
"""Of capacity: at less, configurations hardly differ."""
PUBLISHED = {
    "APEX": "10.7 % on average",
    "Vidur": "below 9 %",
    "LLMServingSim 2.0": "0.97 % on average",
    "Revati": "below 5 %",
}


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
    profile_rows: int
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
            step_tokens=wish.profile_rows,
            context_tokens=PROFILE_CONTEXT,
            sequences=SEQUENCES,
            repeats=wish.profile_repeats,
            live_steps=wish.live_steps,
            temperature=0.0,
            clock=wish.clock,
        ),
    )


def lives(
    options: EngineOptions, traces: Sequence[Sequence[TraceRequest]], repeats: int, *, more: int = MORE_PASSES
) -> tuple[list[list[LiveRun]], int]:
    """Serve traces on one engine, in passes over all of them, until each has so many calm runs or `more` passes than
    that are over; of each the calm runs, or the calmest where they are too few. And the KV blocks that it had."""
    found: list[list[LiveRun]] = [[] for _ in traces]

    async def serve() -> int:
        async with serving(options) as engine:
            for number in range(repeats + more):
                for trace, runs in zip(traces, found, strict=True):
                    if number < repeats or sum(run.disturbance.calm for run in runs) < repeats:
                        runs.append(await run_live(engine, trace))
            return engine.status().kv_blocks_total

    with asyncio.Runner(loop_factory=new_loop) as runner:
        kv_blocks = runner.run(serve())
    return [_calmest(runs, repeats) for runs in found], kv_blocks


def _calmest(runs: Sequence[LiveRun], count: int) -> list[LiveRun]:
    """Calm runs in the order in which they ran, then the others, the less disturbed before."""
    calm = [run for run in runs if run.disturbance.calm]
    others = sorted((run for run in runs if not run.disturbance.calm), key=lambda run: run.disturbance.worst)
    return [*calm, *others][:count]


def live_runs(
    wish: Wish, profile: Profile
) -> tuple[Setup, dict[str, Any], dict[tuple[float, int], list[LiveRun]]]:
    """Find the capacity, serve the traces that calibrate and those that are judged, in passes over all of them, so that
    both see the same minutes of the machine; and fit what the tables do not say to the former."""
    options = options_of(wish.folder, KV_TOKENS, profile.facts.kv_bytes_per_token)
    at_once = chat_trace(CALIBRATION_SEED, wish.requests, None)
    (full,), kv_blocks = lives(options, [at_once], 2)
    capacity_per_s = max(map(_per_s, full))  # what was disturbed is slower
    fitted = [
        chat_trace(CALIBRATION_SEED + place, wish.requests, None if load is None else load * capacity_per_s)
        for place, load in enumerate(CALIBRATION_LOADS)
    ]
    judged = judged_traces(wish, capacity_per_s)
    runs, _ = lives(options, [*fitted, *judged.values()], wish.repeats)
    calibrating = runs[: len(fitted)]
    calibration = calibrate(profile, [run for repeats in calibrating for run in repeats])
    machine = machine_like(options, kv_blocks, calibration.profile)
    simulated_per_s = _requests_per_s(simulate(machine, at_once, calibration.one_way_s).requests)
    setup = Setup(
        profile=profile,
        calibration=calibration,
        capacity_per_s=capacity_per_s,
        options=options,
        machine=machine,
    )
    details = {
        "capacity_requests_per_s": capacity_per_s,
        "simulated_capacity_requests_per_s": simulated_per_s,
        "calibration": {
            "host": asdict(calibration.profile.host),
            "factors": asdict(calibration.factors),
            "one_way_s": calibration.one_way_s,
            "steps": calibration.steps,
        },
        "profile_errors": {name: asdict(errors) for name, errors in profile.errors.items()},
        "disturbed": _disturbed(calibrating),
    }
    return setup, details, dict(zip(judged, runs[len(fitted) :], strict=True))


def judged_traces(wish: Wish, capacity_per_s: float) -> dict[tuple[float, int], tuple[TraceRequest, ...]]:
    """By load and seed."""
    return {
        (load, seed): chat_trace(seed, wish.requests, load * capacity_per_s)
        for load in wish.loads
        for seed in range(wish.seeds)
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
        ((run,),), kv_blocks = lives(options, [make(0, wish.requests, setup.capacity_per_s)], 1, more=0)
        figure, details[name] = _replayed(name, run, options, kv_blocks, setup)
        figures.append(figure)
    return figures, details


def judge_requests(
    wish: Wish, setup: Setup, found: dict[tuple[float, int], list[LiveRun]]
) -> tuple[list[Figure], dict[str, Any], dict[str, Any]]:
    """L2 and L3: figures, details, and samples for plots."""
    traces = judged_traces(wish, setup.capacity_per_s)
    runs = list(found.values())
    figures, details = step_figures(runs, setup.calibration.profile.table_costs(extrapolates=True))
    details = {"steps": details, "disturbed": _disturbed(runs), "loads": {}}
    figure, details["replayed"] = _replayed(
        "all of a run", found[wish.loads[-1], 0][0], setup.options, setup.machine.kv_blocks, setup
    )
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
    live: list[list[LiveRun]] = [[] for _ in chosen]
    simulated: list[tuple[RequestTimes, ...]] = []
    preemptions: list[int] = []
    for number in range(wish.repeats):
        for given, runs in zip(chosen, live, strict=True):
            options = given.options(setup.options, setup.profile.facts.kv_bytes_per_token)
            (once,), kv_blocks = lives(options, [trace], 1)
            runs.extend(once)
            if number == 0:
                machine = machine_like(options, kv_blocks, setup.calibration.profile)
                run = simulate(machine, trace, setup.calibration.one_way_s)
                simulated.append(run.requests)
                preemptions.append(run.preemptions)
    figures, details = ranking_figures(
        [given.name for given in chosen],
        [[run.requests for run in runs] for runs in live],
        simulated,
    )
    details["preemptions"] = {
        given.name: {"live": [run.preemptions for run in runs], "simulated": count}
        for given, runs, count in zip(chosen, live, preemptions, strict=True)
    }
    return figures, {**details, "disturbed": _disturbed(live)}


def all_levels(wish: Wish, profile: Profile | None) -> tuple[list[Figure], dict[str, Any], dict[str, Any]]:
    """Everything, in order; figures, details and samples."""
    began_s = time.monotonic()
    say = _Progress(began_s)
    known = profile or take_profile(wish)
    say("profiled")
    setup, before, found = live_runs(wish, known)
    say(f"served: {setup.capacity_per_s:.1f} requests/s, {before['calibration']}")
    judged, details, samples = judge_requests(wish, setup, found)
    say("simulated: L2 and L3")
    decisions, replayed = judge_decisions(wish, setup)
    say("L0")
    figures = [*decisions, *operation_figures(known)]
    ranked: list[Figure] = []
    ranking: dict[str, Any] = {}
    if wish.configurations > 1:
        ranked, ranking = judge_ranking(wish, setup)
        say("L4")
    figures = sorted([*figures, *judged, *ranked], key=lambda figure: figure.level)
    details: dict[str, Any] = {"before": before, "L0": replayed, "L2 and L3": details, "L4": ranking}
    details["compared"] = {"plait": compared(figures), "published": PUBLISHED}
    details["duration_s"] = time.monotonic() - began_s
    return figures, details, samples


def compared(figures: Sequence[Figure]) -> dict[str, float]:
    """One number, as others state one: means of absolute errors over all loads, and the same of live against live."""
    middle = [one for one in figures if one.level == "L3" and one.what.endswith(("throughput", "P50"))]
    tails = [one for one in figures if one.level == "L3" and one.what.endswith("P99")]
    return {
        f"{name}{side}": sum(abs(value(one)) for one in chosen) / len(chosen)
        for name, chosen in (("throughput and medians", middle), ("with P99", [*middle, *tails]))
        for side, value in ((", simulated", _value), (", live again", _floor))
    }


def _value(figure: Figure) -> float:
    return figure.value


def _floor(figure: Figure) -> float:
    return figure.floor or 0.0


class _Progress:
    """A line for each stage."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.0f} s  {what}", flush=True)


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


def _disturbed(runs: Sequence[Sequence[LiveRun]]) -> dict[str, Any]:
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
