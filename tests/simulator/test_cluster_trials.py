"""Clusters on the event heap live through faults drawn from seeds; bugs put into the code are found and replayed."""

import re
from dataclasses import replace

import pytest
from planted_cluster_bugs import (
    PLANTS,
    Plant,
    block_given_to_two,
    queue_out_of_order,
    release_forgotten,
    retry_without_a_key,
    session_left_on_a_machine,
    stale_route,
)

from plait.simulator.cluster_trial import (
    ClusterTrialReport,
    draw_cluster_trial,
    run_cluster_trial,
    run_of_trial,
    shrink_trial,
)
from plait.simulator.shrinking import shrunk

QUICK_SEEDS = 6
QUICK_REQUESTS = 60
CHUNK = 50
SEEDS = 1000
FOUND_WITHIN = 500
"""Simulation landscape, section 10: each planted bug is found within so many seeds."""


def test_nothing_that_should_never_be() -> None:
    reports = [run_cluster_trial(draw_cluster_trial(seed, QUICK_REQUESTS)) for seed in range(QUICK_SEEDS)]
    assert [report.violation for report in reports] == [""] * QUICK_SEEDS
    assert all(report.finished + report.refused + report.failed == QUICK_REQUESTS for report in reports)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_that_should_never_be_in_a_thousand_seeds(first: int) -> None:
    reports = [run_cluster_trial(draw_cluster_trial(seed)) for seed in range(first, first + CHUNK)]
    assert {report.seed: report.violation for report in reports if report.violation} == {}


@pytest.mark.parametrize(
    "plant",
    [release_forgotten, block_given_to_two, queue_out_of_order, session_left_on_a_machine, stale_route],
    ids=lambda plant: plant.__name__,
)
def test_a_bug_is_found_by_its_event_and_replays(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = first_violating(QUICK_SEEDS)
    event = re.search(r"event (\d+)", found.violation)
    assert event is not None and int(event[1]) == found.events
    assert run_cluster_trial(draw_cluster_trial(found.seed)) == found
    # Until the event before, nothing was wrong.
    run_of_trial(draw_cluster_trial(found.seed)).run(until_event=found.events - 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_every_planted_bug_is_found_and_replays(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = first_violating(FOUND_WITHIN)
    monkeypatch.undo()
    assert not run_cluster_trial(draw_cluster_trial(found.seed)).violation, "it shows without the bug"
    plant(monkeypatch)
    assert run_cluster_trial(draw_cluster_trial(found.seed)) == found


def first_violating(seeds: int) -> ClusterTrialReport:
    """The first trial that shows something wrong; fails if none does."""
    for seed in range(seeds):
        report = run_cluster_trial(draw_cluster_trial(seed))
        if report.violation:
            return report
    pytest.fail(f"not found within {seeds} seeds")


def test_a_failing_trial_shrinks_to_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    retry_without_a_key(monkeypatch)
    trial = replace(draw_cluster_trial(3), options=replace(draw_cluster_trial(3).options, check="end"))
    small = shrink_trial(trial)
    assert run_cluster_trial(small).violation
    assert len(small.requests) < 10 < len(trial.requests)
    assert len(small.faults) < len(trial.faults)


def test_shrinking_leaves_out_all_that_is_not_needed() -> None:
    asked = 0

    def shows(items: tuple[int, ...]) -> bool:
        nonlocal asked
        asked += 1
        return {17, 60} <= set(items)

    assert shrunk(range(100), shows) == (17, 60)
    assert asked < 100
    assert shrunk(range(100), lambda items: True) == ()
    assert shrunk(range(100), lambda items: 99 in items, attempts=1) == tuple(range(100))
