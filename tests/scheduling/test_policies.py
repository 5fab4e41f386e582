"""Policies by name, their purity, and the limits they keep."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_engine import SimulatedEngine

from plait.errors import BadSetup
from plait.scheduling import POLICY_NAMES, SchedulerView, StepLimits, policy_named


def test_an_unknown_policy_lists_the_known() -> None:
    with pytest.raises(BadSetup, match="no scheduling policy 'fifo'; choose one of static, orca, paged"):
        policy_named("fifo")
    assert [policy_named(name).name for name in POLICY_NAMES] == list(POLICY_NAMES)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(POLICY_NAMES), st.integers(0, 25), st.integers(8, 16))
def test_planning_changes_nothing_and_repeats(policy: str, steps: int, kv_blocks: int) -> None:
    engine = SimulatedEngine(policy, kv_blocks=kv_blocks, host_blocks=8, step_tokens=6)
    for token in range(5):
        engine.submit([token % 2] * 9, new_tokens=6, fan_out=1 + token % 2)
    for _ in range(steps):
        engine.step()
    seen: list[SchedulerView] = []

    class Witness:
        name = policy
        reserves = policy != "paged"

        def plan_step(self, view: SchedulerView) -> object:
            before = copy.deepcopy(view)
            plans = [policy_named(policy).plan_step(view) for _ in range(2)]
            assert plans[0] == plans[1]
            assert state_of(view) == state_of(before)
            seen.append(view)
            return plans[0]

    engine.scheduler._policy = Witness()  # pyright: ignore
    engine.step()
    assert seen
    engine.run_until_idle()


def state_of(view: SchedulerView) -> object:
    return [
        (
            request.id,
            request.reserve,
            request.stem_tokens,
            [(s.token_ids, s.computed_tokens, s.kv_blocks) for s in request.sequences],
        )
        for queue in (view.running, view.waiting)
        for request in queue
    ] + [[view.pool.references(block) for block in range(view.pool.kv_blocks)]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_tokens": 0},
        {"max_running_sequences": 0},
        {"max_waiting": -1},
        {"long_prefill_tokens": 0},
        {"watermark_fraction": 1.0},
        {"preemption": "drop"},
    ],
)
def test_limits_that_cannot_work_are_refused_by_name(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(BadSetup, match=name):
        StepLimits(**wrong)  # pyright: ignore
