"""What becomes of a swarm's requests under faults drawn from a seed, on a virtual clock: many schedules, one each seed.

A schedule is a swarm of 1 to 13 machines in memory (the live gateway, workers, sessions and links; a model of hashes in
which any wrong input changes every later token), one to five requests, and one to five faults. After every event the
machine that it happened to is checked; every answer is compared with that of a single engine. What is checked, and what
the faults are: src/plait/simulator/trial.py, fault_schedule.py. All seconds are virtual, but those of a trial's work.

    python bench/faults.py                          60 seeds, about 30 s
    python bench/faults.py --seeds 0:1000 --jobs 2  1,000 seeds, about 4 minutes on two cores
    python bench/faults.py --seed 518               one again, with all that happens in it, line by line

A seed that shows something wrong is named with the command that replays it, and the exit code is 1. Ctrl-C ends the run
early; what was tried by then is written.
"""

import argparse
import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from results import Figure, write_result

from plait.simulator.fault_schedule import draw_schedule
from plait.simulator.trial import run_trial
from plait.simulator.trial_report import Recovery, TrialReport

FEWEST_RECOVERIES = 5
"""Of fewer no spread is shown."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One trial, and how long it kept a core."""

    report: TrialReport
    cpu_s: float


def run_seed(seed: int) -> Ran:
    """Run the trial of a seed."""
    began_s = time.process_time()
    return Ran(run_trial(draw_schedule(seed)), time.process_time() - began_s)


def run_seeds(seeds: range, jobs: int) -> Iterator[Ran]:
    """All of them, in order."""
    if jobs == 1:
        yield from map(run_seed, seeds)
        return
    # Forked before anything runs: the imports cost more than ten trials.
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        yield from pool.map(run_seed, seeds, chunksize=4)


def replay(seed: int) -> list[str]:
    """Run one with its events on the terminal; what was wrong."""
    print(draw_schedule(seed))
    report = run_trial(draw_schedule(seed), trace=print)
    print(f"digest {report.digest}, {report.events} events")
    return report.violations


def by_cause(reports: Sequence[TrialReport]) -> dict[str, list[Recovery]]:
    """Recoveries of sessions, by the fault that struck in the seconds before, where it was only one."""
    causes: dict[str, list[Recovery]] = {}
    for report in reports:
        for recovery in report.recoveries:
            if len(recovery.after) == 1:
                causes.setdefault(recovery.after[0], []).append(recovery)
    return {cause: found for cause, found in sorted(causes.items()) if len(found) >= FEWEST_RECOVERIES}


def spread(values_s: Sequence[float]) -> dict[str, float]:
    deciles = statistics.quantiles(values_s, n=10, method="inclusive")
    return {
        "median": round(statistics.median(values_s), 3),
        "p90": round(deciles[-1], 3),
        "most": round(max(values_s), 3),
    }


def summary_of(trials: Sequence[Ran]) -> dict[str, Any]:
    reports = [trial.report for trial in trials]
    digest = hashlib.sha256("".join(report.digest for report in reports).encode())
    recoveries = [recovery for report in reports for recovery in report.recoveries]
    return {
        "trials": len(reports),
        "trials_with_violations": [report.seed for report in reports if report.violations],
        "requests": dict(Counter(request.ending for report in reports for request in report.requests)),
        "errors": dict(
            Counter(
                request.error.partition(":")[0]
                for report in reports
                for request in report.requests
                if request.error
            )
        ),
        "faults": dict(sum((report.struck for report in reports), Counter[str]()).most_common()),
        "events": sum(report.events for report in reports),
        "checks": sum(report.checks for report in reports),
        "virtual_s": round(sum(report.virtual_s for report in reports)),
        "recoveries": len(recoveries),
        "replayed_tokens": sum(report.replayed_tokens for report in reports),
        "computed_block_tokens": sum(report.computed_block_tokens for report in reports),
        "needed_block_tokens": sum(report.needed_block_tokens for report in reports),
        "by_cause": {
            cause: {
                "recoveries": len(found),
                "noticed_s": spread([each.noticed_s for each in found]),
                "gathered_s": spread([each.gathered_s for each in found]),
                "stalled_s": spread([each.stalled_s for each in found]),
            }
            for cause, found in by_cause(reports).items()
        },
        "cpu_s_of_a_trial": spread([trial.cpu_s for trial in trials]),
        "digest": digest.hexdigest(),
    }


def figures_of(trials: Sequence[Ran]) -> list[Figure]:
    causes = by_cause([trial.report for trial in trials])

    def figure(title: str, value_s: Callable[[Recovery], float]) -> Figure:
        figure = Figure(title, "virtual seconds", "fraction of recoveries", log_x=True)
        for cause, found in causes.items():
            figure.add_line(
                f"{cause} ({len(found)})", *cumulative([max(value_s(each), 1e-3) for each in found])
            )
        return figure

    work = Figure("work of a trial", "seconds of one core", "fraction of trials", log_x=True)
    work.add_line("trials", *cumulative([trial.cpu_s for trial in trials]))
    return [
        figure("from a fault to its notice", lambda each: each.noticed_s),
        figure("pause of an answer", lambda each: each.stalled_s),
        work,
    ]


def cumulative(values: Sequence[float]) -> tuple[list[float], list[float]]:
    return sorted(values), [(place + 1) / len(values) for place in range(len(values))]


def line_of(trial: Ran) -> str:
    report = trial.report
    endings = Counter(request.ending for request in report.requests)
    return f"seed {report.seed}: {dict(report.struck)} {dict(endings)}, {report.events} events, {trial.cpu_s:.2f} s"


def sample_of(trial: Ran) -> dict[str, Any]:
    report = trial.report
    return {
        "seed": report.seed,
        "digest": report.digest[:16],
        "events": report.events,
        "virtual_s": round(report.virtual_s, 3),
        "cpu_s": round(trial.cpu_s, 3),
        "struck": dict(report.struck),
        "requests": [request.ending for request in report.requests],
        "recoveries": [
            [list(each.after), *(round(s, 4) for s in (each.noticed_s, each.gathered_s, each.stalled_s))]
            for each in report.recoveries
        ],
        "violations": report.violations,
    }


def seeds_of(text: str) -> range:
    first, colon, end = text.partition(":")
    return range(int(first), int(end)) if colon else range(int(first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=range(60), help="how many, or FIRST:END")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--name", default="faults", help="of the result")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        wrong = replay(arguments.seed)
        raise SystemExit("\n".join(wrong) or 0)
    trials: list[Ran] = []
    try:
        for trial in run_seeds(arguments.seeds, arguments.jobs):
            trials.append(trial)
            print(line_of(trial), *trial.report.violations, sep="\n    ", flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(trials)} trials", flush=True)
    write_result(
        arguments.name,
        settings={
            "seeds": [arguments.seeds.start, arguments.seeds.start + len(trials)],
            "jobs": arguments.jobs,
        },
        samples=[sample_of(trial) for trial in trials],
        summary=summary_of(trials),
        figures=figures_of(trials),
    )
    wrong = [trial.report.seed for trial in trials if trial.report.violations]
    if wrong:
        lines = [f"    python bench/faults.py --seed {seed}" for seed in wrong]
        raise SystemExit(
            "\n".join([f"{len(wrong)} of {len(trials)} seeds show something wrong; replay:", *lines])
        )


if __name__ == "__main__":
    main()
