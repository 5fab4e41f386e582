"""Swarms live through faults drawn from seeds: nothing that should never be, every time the same; bugs are found."""

import os
import re
import subprocess
import sys

import pytest
from planted_bugs import (
    PLANTS,
    Plant,
    block_given_to_two,
    kv_release_forgotten,
    session_left_in_engine,
    tokens_told_twice,
)

from plait.simulator.fault_schedule import draw_schedule
from plait.simulator.trial import run_trial
from plait.simulator.trial_report import TrialReport

QUICK_SEEDS = 32
SEEDS = 1000
CHUNK = 50
FOUND_WITHIN = 500
"""Simulation landscape, section 10: each planted bug is found within so many seeds."""
DIGESTS = """
import sys
from plait.simulator.fault_schedule import draw_schedule
from plait.simulator.trial import run_trial
print(*(run_trial(draw_schedule(seed)).digest for seed in range(4)))
"""


def trial(seed: int) -> TrialReport:
    return run_trial(draw_schedule(seed))


def violations(seeds: range) -> dict[int, list[str]]:
    """What was wrong, by seed; `python bench/faults.py --seed SEED` replays one."""
    reports = map(trial, seeds)
    return {report.seed: report.violations for report in reports if report.violations}


def test_nothing_that_should_never_be() -> None:
    assert violations(range(QUICK_SEEDS)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_that_should_never_be_in_a_thousand_seeds(first: int) -> None:
    assert violations(range(first, first + CHUNK)) == {}


def test_a_trial_is_the_same_in_every_process() -> None:
    def digests(hash_seed: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    ones, others = digests("1"), digests("2")
    assert ones == others
    assert len(set(ones)) == 4


def test_machines_are_checked_after_their_events() -> None:
    report = trial(1)
    # The rest are those of wires and of the trial itself.
    assert report.events / 2 < report.checks < report.events


@pytest.mark.parametrize(
    "plant",
    [kv_release_forgotten, block_given_to_two, tokens_told_twice, session_left_in_engine],
    ids=lambda plant: plant.__name__,
)
def test_a_bug_in_the_live_code_is_found_and_replays(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = first_violating(range(QUICK_SEEDS))
    event = re.match(r"event (\d+), ", found.violations[0])
    assert event is not None and int(event[1]) < found.events, "it was only seen at the end"
    replayed = trial(found.seed)
    assert replayed.violations == found.violations
    assert replayed.digest == found.digest


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_every_planted_bug_is_found_and_replays(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = first_violating(range(FOUND_WITHIN))
    monkeypatch.undo()
    assert not trial(found.seed).violations, "the seed shows something without the bug"
    plant(monkeypatch)
    assert trial(found.seed).digest == found.digest


def first_violating(seeds: range) -> TrialReport:
    """The first trial that shows something wrong; fails if none does."""
    for seed in seeds:
        report = trial(seed)
        if report.violations:
            return report
    pytest.fail(f"not found within {len(seeds)} seeds")
