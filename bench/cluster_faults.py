"""Clusters on the event heap under faults drawn from a seed: many trials of 200 requests, one each seed.

A trial is a cluster of 1 to 15 machines (the live schedulers, pools, prefix indices and router; steps and links are
estimated) whose machines crash, pause, slow down, lose links and memory. After every event the books of the machines
that it concerned are walked; in the end nothing may be held, and every request must be over. What is drawn and checked:
src/plait/simulator/cluster_trial.py. All seconds are virtual, but those of a trial's work.

    python bench/cluster_faults.py                            40 seeds, about half a minute
    python bench/cluster_faults.py --seeds 0:1000 --jobs 2    1,000 seeds, about 7 minutes on two cores
    python bench/cluster_faults.py --plants --jobs 2          bugs put in one by one: which seed finds each, and where
    python bench/cluster_faults.py --seed 9                   one again: what it is, and what it comes to
    python bench/cluster_faults.py --seed 9 --until-event 300 what happened last by then, and where every request is
    python bench/cluster_faults.py --seed 9 --shrink          which of its faults and requests its violation takes

A seed that shows something wrong is named with the command that replays it, and the exit code is 1. Ctrl-C ends the run
early; what was tried by then is written (a shell starts what runs in the background deaf to it).
"""

import argparse
import hashlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from results import Figure, write_result

from plait.simulator.cluster_trial import (
    ClusterTrial,
    ClusterTrialReport,
    draw_cluster_trial,
    run_cluster_trial,
    run_of_trial,
    shrink_trial,
)

PLANTED = Path(__file__).parent.parent / "tests" / "simulator"
FOUND_WITHIN = 500


@dataclass(frozen=True, slots=True)
class Ran:
    """One trial: what it was, what became of it, and how long it kept a core."""

    report: ClusterTrialReport
    machines: int
    faults: dict[str, int]
    cpu_s: float


def run_seed(seed: int) -> Ran:
    """Run the trial of a seed."""
    began_s = time.process_time()
    trial = draw_cluster_trial(seed)
    report = run_cluster_trial(trial)
    kinds = dict(Counter(fault.kind for fault in trial.faults))
    return Ran(report, len(trial.machines), kinds, time.process_time() - began_s)


def run_plant(name: str) -> dict[str, Any]:
    """Put a bug in, look for a seed that finds it, run that again, and shrink it."""
    import pytest

    plants = planted()
    for seed in range(FOUND_WITHIN):
        trial = draw_cluster_trial(seed)
        with pytest.MonkeyPatch.context() as patch:
            plants[name](patch)
            report = run_cluster_trial(trial)
        if report.violation:
            break
    else:
        return {"bug": name, "seed": None}
    with pytest.MonkeyPatch.context() as patch:
        plants[name](patch)
        again = run_cluster_trial(trial)
    with pytest.MonkeyPatch.context() as patch:
        plants[name](patch)
        small = shrink_trial(trial)
    return {
        "bug": name,
        "seed": seed,
        "event": report.events,
        "replays": again == report,
        "faults": [len(trial.faults), len(small.faults)],
        "requests": [len(trial.requests), len(small.requests)],
        "violation": report.violation.splitlines()[0],
    }


def planted() -> dict[str, Callable[[Any], None]]:
    """The bugs by name."""
    sys.path.insert(0, str(PLANTED))
    plants: Any = import_module("planted_cluster_bugs").PLANTS
    return {plant.__name__: plant for plant in plants}


def each_of(work: Callable[[Any], Any], of: Sequence[Any], jobs: int) -> Iterator[Any]:
    """All results, in order."""
    if jobs == 1:
        yield from map(work, of)
        return
    # Forked before anything runs: the imports cost more than a trial.
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        yield from pool.map(work, of, chunksize=1)


def replay(seed: int, until_event: int | None, shrinks: bool) -> str:
    """Run one again and say what it is; what was wrong."""
    trial = draw_cluster_trial(seed)
    if until_event is not None:
        run = run_of_trial(trial)
        run.run(until_event=until_event)
        print(run.heap.recent(), *[flight.standing() for flight in run.path.flights.values()], sep="\n")
        return ""
    if shrinks:
        trial = shrink_trial(trial)
    print_trial(trial)
    report = run_cluster_trial(trial)
    print(report)
    return report.violation


def print_trial(trial: ClusterTrial) -> None:
    print(trial.options, trial.network, sep="\n")
    print(*trial.machines, *trial.faults, *trial.requests, sep="\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": round(statistics.median(values), 3),
        "p90": round(deciles[-1], 3),
        "most": round(max(values), 3),
    }


def summary_of(trials: Sequence[Ran]) -> dict[str, Any]:
    reports = [trial.report for trial in trials]
    digest = hashlib.sha256("".join(report.digest for report in reports).encode())
    return {
        "trials": len(reports),
        "trials_with_violations": [report.seed for report in reports if report.violation],
        "requests": {
            name: sum(getattr(report, name) for report in reports)
            for name in ("finished", "refused", "failed")
        },
        "moves": sum(report.moves for report in reports),
        "preemptions": sum(report.preemptions for report in reports),
        "faults": dict(sum((Counter(trial.faults) for trial in trials), Counter[str]()).most_common()),
        "events": sum(report.events for report in reports),
        "steps": sum(report.steps for report in reports),
        "virtual_s": round(sum(report.virtual_s for report in reports)),
        "cpu_s_of_a_trial": spread([trial.cpu_s for trial in trials]),
        "digest": digest.hexdigest(),
    }


def sample_of(trial: Ran) -> dict[str, Any]:
    report = trial.report
    return {
        "seed": report.seed,
        "digest": report.digest[:16],
        "events": report.events,
        "virtual_s": round(report.virtual_s, 3),
        "machines": trial.machines,
        "faults": trial.faults,
        "ended": [report.finished, report.refused, report.failed],
        "moves": report.moves,
        "preemptions": report.preemptions,
        "violation": report.violation,
    }


def figures_of(trials: Sequence[Ran]) -> list[Figure]:
    events = Figure("size of a trial", "events", "fraction of trials", log_x=True)
    counts = sorted(trial.report.events for trial in trials)
    events.add_line("events", counts, [(place + 1) / len(counts) for place in range(len(counts))])
    moves = Figure("requests that moved", "moves in a trial", "fraction of trials")
    counts = sorted(trial.report.moves for trial in trials)
    moves.add_line("moves", counts, [(place + 1) / len(counts) for place in range(len(counts))])
    return [events, moves]


def seeds_of(text: str) -> range:
    first, colon, end = text.partition(":")
    return range(int(first), int(end)) if colon else range(int(first))


def look_for_plants(jobs: int) -> None:
    """Look for every bug, and write where it was found."""
    found: list[dict[str, Any]] = []
    for each in each_of(run_plant, list(planted()), jobs):
        found.append(each)
        print(each, flush=True)
    lost = [each["bug"] for each in found if each["seed"] is None or not each["replays"]]
    summary = {
        "bugs": len(found),
        "found_and_replayed": len(found) - len(lost),
        "not_found": lost,
        "latest_seed": max((each["seed"] for each in found if each["seed"] is not None), default=None),
    }
    write_result("cluster_faults_planted", settings={"within": FOUND_WITHIN}, samples=found, summary=summary)
    if lost:
        raise SystemExit(f"not found within {FOUND_WITHIN} seeds: {', '.join(lost)}")


def look_for_violations(seeds: range, jobs: int, name: str) -> None:
    """Run the seeds and write what became of them."""
    trials: list[Ran] = []
    try:
        for trial in each_of(run_seed, seeds, jobs):
            trials.append(trial)
            if trial.report.violation or trial.report.seed % 50 == 49:
                print(f"seed {trial.report.seed}: {trial.report.violation or 'well so far'}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(trials)} trials", flush=True)
    write_result(
        name,
        settings={"seeds": [seeds.start, seeds.start + len(trials)], "jobs": jobs},
        samples=[sample_of(trial) for trial in trials],
        summary=summary_of(trials),
        figures=figures_of(trials),
    )
    wrong = [trial.report.seed for trial in trials if trial.report.violation]
    if wrong:
        lines = [f"    python bench/cluster_faults.py --seed {seed}" for seed in wrong]
        raise SystemExit(
            "\n".join([f"{len(wrong)} of {len(trials)} seeds show something wrong; replay:", *lines])
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=range(40), help="how many, or FIRST:END")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--until-event", type=int, help="stop its replay there")
    parser.add_argument("--shrink", action="store_true", help="leave out what its violation does not take")
    parser.add_argument("--plants", action="store_true", help="look for the planted bugs")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--name", default="cluster_faults", help="of the result")
    arguments = parser.parse_args()
    if arguments.plants:
        look_for_plants(arguments.jobs)
    elif arguments.seed is not None:
        raise SystemExit(replay(arguments.seed, arguments.until_event, arguments.shrink) or 0)
    else:
        look_for_violations(arguments.seeds, arguments.jobs, arguments.name)


if __name__ == "__main__":
    main()
