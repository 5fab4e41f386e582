"""What `bench/fidelity.py` makes of runs, on runs worked out by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from fidelity.levels import (
    Figure,
    goodput_per_s,
    output_tokens_per_s,
    ranking_figures,
    request_figures,
)
from fidelity.live import RequestTimes, StepTimes
from fidelity.page import row
from fidelity.workloads import CALIBRATION_SEED, CONFIGURATIONS, chat_trace, shared_trace

from plait.metrics import Objectives


def requests(factor: float) -> list[RequestTimes]:
    """Four requests a second apart: first tokens after 0.1 to 0.4 s, ten gaps of 10 ms each, all times `factor`."""
    return [
        RequestTimes(
            first_s=factor * 0.1 * (number + 1),
            end_s=factor * (0.1 * (number + 1) + 0.1),
            tokens=11,
            prompt_tokens=5,
            arrival_s=float(number),
        )
        for number in range(4)
    ]


def named(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.what: figure for figure in figures}


def test_a_figure_holds_within_its_goal_or_its_floor() -> None:
    def figure(value: float, floor: float, **more: Any) -> Figure:
        return Figure(level="L3", what="x", value=value, goal=0.05, floor=floor, **more)

    assert figure(-0.04, 0.0).holds
    assert not figure(-0.06, 0.0).holds
    assert figure(-0.06, 0.07).holds
    assert figure(0.9, 0.8, at_least=True).holds
    assert not Figure(level="L4", what="tau", value=0.7, goal=0.8, floor=0.9, at_least=True).holds
    assert Figure(level="L4", what="tau", value=0.7, goal=0.8, floor=0.6, at_least=True).holds


def test_throughput_and_goodput_are_over_the_whole_run() -> None:
    runs = requests(1.0)  # 44 tokens from 0 to 3.5 s
    assert output_tokens_per_s(runs) == pytest.approx(44 / 3.5)
    assert goodput_per_s(runs, Objectives(ttft_s=0.25)) == pytest.approx(2 / 3.5)


def test_requests_are_compared_with_the_mean_of_repeats_and_repeats_with_each_other() -> None:
    figures, details = request_figures(0.6, [requests(1.0), requests(1.2)], requests(1.1))
    found = named(figures)
    assert found["60 %: TTFT P50"].value == pytest.approx(0.0)
    assert found["60 %: TTFT P50"].floor == pytest.approx(0.2)  # 0.3 beside 0.25
    figures, details = request_figures(0.6, [requests(1.0), requests(1.0)], requests(1.1))
    found = named(figures)
    assert found["60 %: TPOT P50"].value == pytest.approx(0.1)
    assert found["60 %: TPOT P50"].floor == 0.0
    assert not found["60 %: TPOT P50"].holds
    assert found["60 %: TPOT, KS distance"].value == 1.0
    single = details["TTFT of each request"]
    assert single["mape"] == pytest.approx(0.1)
    assert single["mae_s"] == pytest.approx(0.025)
    assert single["floor_mae_s"] == 0.0


def test_rankings_of_configurations() -> None:
    live = [[requests(factor), requests(factor)] for factor in (1.0, 2.0, 3.0)]
    figures, _ = ranking_figures(["a", "b", "c"], live, [requests(factor) for factor in (1.5, 1.4, 5.0)])
    found = named(figures)
    assert found["ranking by P90 of E2E, Kendall's tau"].value == pytest.approx(1 / 3)
    assert found["regret of the pick by P90 of E2E"].value == pytest.approx(1.0)
    assert found["regret of the pick by P90 of E2E"].floor == 0.0


def test_a_step_is_interrupted_when_it_lost_more_than_the_interpreter_makes_it_wait() -> None:
    assert not StepTimes(began_s=0.0, ended_s=0.010, device_s=0.009, lost_s=0.0005).interrupted
    assert StepTimes(began_s=0.0, ended_s=0.010, device_s=0.009, lost_s=0.0007).interrupted


def test_traces_that_are_judged_are_not_those_that_calibrate() -> None:
    judged = {chat_trace(seed, 20, 5.0) for seed in range(3)}
    assert judged.isdisjoint(chat_trace(CALIBRATION_SEED + place, 20, 5.0) for place in range(4))
    assert {request.prompt_blocks[0] for request in shared_trace(0, 40, 5.0)} == {0, 1, 2, 3}
    assert len({given.name for given in CONFIGURATIONS}) >= 8


def test_a_line_of_the_page() -> None:
    figure = {
        "level": "L3",
        "what": "TTFT P50",
        "value": -0.0312,
        "goal": 0.05,
        "floor": 0.018,
        "unit": "fraction",
        "at_least": False,
        "holds": True,
    }
    assert row(figure) == "| L3 | TTFT P50 | -3.1 % | 5.0 % | 1.8 % |  |"
