"""Calibration of `bench/fidelity.py` finds what made up steps were made of, and leaves out those that were held up."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from fidelity.levels import step_figures
from fidelity.live import Disturbance, LiveRun, RequestTimes, StepTimes
from fidelity.simulated import calibrate, machine_like, simulate
from fidelity.workloads import chat_trace, options_of

from plait.costs import HostOverhead
from plait.ids import RequestId
from plait.profiler import shipped_profile
from plait.simulator import Decision, RecordedRequest, RecordedStep, work_of
from plait.workload import TraceRequest

PROFILE = shipped_profile("tiny-zen4")
HOST = HostOverhead(per_step_s=1e-4, per_sequence_s=2e-5, per_token_s=3e-6)
SLOWER = 1.1
WAY_S = 2e-4


def made_up(seed: int, *, held_up_every: int = 7) -> LiveRun:
    """Steps that take what the tables say times a factor, and the host's part; some are held up for 50 ms. One request
    to an idle engine is a way there and a way back from its first token."""
    rng = np.random.default_rng(seed)
    costs = PROFILE.table_costs(extrapolates=True)
    steps: list[RecordedStep] = []
    times: list[StepTimes] = []
    now_s = WAY_S
    for number in range(300):
        decodes = int(rng.integers(1, 16))
        chunks = [(RequestId("r0"), int(rng.integers(1, 800)), 1, True) for _ in range(decodes)]
        if rng.random() < 0.4:
            chunks.append((RequestId("r0"), 0, int(rng.integers(2, 250)), True))
        decision = Decision(tuple(chunks), (), (), (0, 0, 0))
        work = work_of(decision)
        device_s = SLOWER * costs.step_s(work)
        lost_s = 0.05 if number % held_up_every == 0 else 0.0
        seconds = device_s + HOST.of(work) + lost_s
        steps.append(RecordedStep(decision=decision, began_s=now_s))
        times.append(StepTimes(now_s, now_s + seconds, device_s + lost_s, lost_s, seconds))
        now_s += seconds
    request = RequestTimes(times[0].ended_s + WAY_S, now_s, 300, 5, 0.0, 0.0, WAY_S)
    asked = TraceRequest(arrival_s=0.0, prompt_tokens=5, output_tokens=300)
    return LiveRun(
        steps=tuple(steps),
        step_times=tuple(times),
        requests=(request,),
        record=(RecordedRequest(id=RequestId("r0"), added_s=WAY_S, request=asked),),
        disturbance=Disturbance(0.0, 0.0, 0.0),
        preemptions=0,
        prefix_hit_tokens=0,
    )


def test_calibration_finds_what_steps_are_made_of() -> None:
    found = calibrate(PROFILE, [made_up(1)])
    costs = found.profile.table_costs(extrapolates=True)
    plain = PROFILE.table_costs(extrapolates=True)
    assert found.one_way_s == pytest.approx(WAY_S)
    assert found.steps == 257  # of 300, every seventh was held up
    for step in made_up(2).steps:
        work = work_of(step.decision)
        truth_s = SLOWER * plain.step_s(work) + HOST.of(work)
        # The prior on factors, that they are 1, keeps a little of the difference.
        assert costs.step_s(work) + costs.host_s(work) == pytest.approx(truth_s, rel=0.02)


def test_steps_that_were_held_up_judge_nobody() -> None:
    costs = calibrate(PROFILE, [made_up(1)]).profile.table_costs(extrapolates=True)
    figures, details = step_figures([[made_up(2), made_up(2)]], costs)
    assert details["steps"] == 600
    assert details["judged"] == 514
    assert all(figure.holds for figure in figures)
    assert all(figure.floor is not None and figure.floor < 0.02 for figure in figures)  # repeats are the same
    figures, _ = step_figures([[made_up(2), made_up(2)]], PROFILE.table_costs(extrapolates=True))
    assert not any(figure.holds for figure in figures)  # tables without the factor are found out


def test_a_simulated_run_is_the_same_again_and_counts_from_arrival() -> None:
    trace = chat_trace(0, 30, 20.0)
    machine = machine_like(options_of(Path("tiny"), 4096, 3072), 256, PROFILE)
    runs = [simulate(machine, trace, 0.01) for _ in range(2)]
    assert runs[0] == runs[1]
    assert [one.arrival_s for one in runs[0].requests] == pytest.approx([one.arrival_s for one in trace])
    assert [one.tokens for one in runs[0].requests] == [one.output_tokens for one in trace]
    assert all(one.first_s > 0.02 for one in runs[0].requests)  # the way there and back
