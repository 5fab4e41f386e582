"""What the two reserving policies promise, and what their promise costs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_engine import SimulatedEngine

from plait.errors import BadRequest

requests = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 10), st.sampled_from([1, 1, 1, 2])), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(10, 30), st.integers(2, 6))
def test_orca_holds_exactly_what_it_reserved(
    asked: list[tuple[int, int, int]], kv_blocks: int, max_running_sequences: int
) -> None:
    engine = SimulatedEngine("orca", kv_blocks=kv_blocks, max_running_sequences=max_running_sequences)
    for prompt_tokens, new_tokens, fan_out in asked:
        engine.submit([prompt_tokens] * prompt_tokens, new_tokens=new_tokens, fan_out=fan_out)
    while engine.requests:
        engine.step()
        reserved = sum(
            engine.pool.blocks_for(request.max_sequence_tokens) * request.fan_out
            for request in engine.requests.values()
            if request.running
        )
        assert engine.pool.used_blocks == reserved <= kv_blocks
    engine.check_nothing_is_left()


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(2, 6))
def test_orca_never_lets_a_later_request_run_more_iterations(
    asked: list[tuple[int, int, int]], max_running_sequences: int
) -> None:
    engine = SimulatedEngine(
        "orca", kv_blocks=24, step_tokens=14, max_running_sequences=max_running_sequences
    )
    for prompt_tokens, new_tokens, fan_out in asked:
        engine.submit([prompt_tokens] * prompt_tokens, new_tokens=new_tokens, fan_out=fan_out)
    while engine.requests:
        engine.step()
        iterations = [request.iterations for _, request in sorted(engine.requests.items(), key=arrival)]
        assert iterations == sorted(iterations, reverse=True)


def arrival(item: tuple[str, object]) -> int:
    return int(item[0][1:])


def test_orca_lets_requests_join_and_leave_at_any_step() -> None:
    engine = SimulatedEngine("orca")
    long = engine.submit([1] * 5, new_tokens=10)
    engine.step()
    short = engine.submit([2] * 5, new_tokens=2)
    members = [{chunk.request_id for chunk in engine.step().chunks} for _ in range(3)]
    assert members == [{long, short}, {long, short}, {long}]


def test_orca_runs_a_prompt_whole_beside_decodes() -> None:
    engine = SimulatedEngine("orca", step_tokens=8)
    engine.submit([1] * 4)
    engine.step()
    long = engine.submit([2] * 30)
    step = engine.step()
    assert [(chunk.start, chunk.tokens) for chunk in step.chunks if chunk.request_id == long] == [(0, 30)]
    engine.run_until_idle()


def test_a_big_request_at_the_head_blocks_the_queue() -> None:
    """The known cost of strict order under reservation: free memory that nobody may use."""
    engine = SimulatedEngine("orca", kv_blocks=10)
    engine.submit([1] * 4, new_tokens=16)
    big, small = engine.submit([2] * 4, new_tokens=36), engine.submit([3], new_tokens=2)
    blocked_steps = 0
    while big in engine.requests and not engine.requests[big].running:
        engine.step()
        blocked_steps += engine.pool.free_blocks >= 1 and not engine.requests[small].running
    assert blocked_steps >= 15
    engine.run_until_idle()


def test_nobody_joins_a_static_batch() -> None:
    engine = SimulatedEngine("static", max_running_sequences=3)
    batch = [engine.submit([token] * 4, new_tokens=new) for token, new in enumerate((2, 9, 5))]
    late = engine.submit([9], new_tokens=1)
    steps = engine.run_until_idle()
    assert steps[0].admitted == tuple(batch)
    # The longest of the batch takes 9 steps, and only then the next request starts.
    assert [step.admitted for step in steps[1:]] == [()] * 8 + [(late,)]


def test_a_finished_member_of_a_static_batch_costs_no_more_computation() -> None:
    engine = SimulatedEngine("static")
    short, long = engine.submit([1] * 4, new_tokens=2), engine.submit([2] * 4, new_tokens=9)
    steps = Counter(chunk.request_id for step in engine.run_until_idle() for chunk in step.chunks)
    assert steps == {short: 2, long: 9}


def test_the_prompts_of_a_static_batch_keep_the_budget() -> None:
    engine = SimulatedEngine("static", step_tokens=10)
    for token in range(3):
        engine.submit([token] * 6, new_tokens=4)
    steps = engine.run_until_idle()
    assert [step.tokens for step in steps[:3]] == [6, 7, 8]
    assert len(steps[0].admitted) == 3


@pytest.mark.parametrize("policy", ["static", "orca"])
def test_no_prefix_is_shared_between_reserving_requests(policy: str) -> None:
    engine = SimulatedEngine(policy)
    for _ in range(2):
        engine.submit([1] * 16)
        engine.run_until_idle()
    counts = engine.scheduler.counts()
    assert (counts.prefix_hit_tokens_total, counts.cached_kv_blocks) == (0, 0)


@pytest.mark.parametrize("policy", ["static", "orca"])
def test_a_reservation_beyond_the_pool_is_refused(policy: str) -> None:
    engine = SimulatedEngine(policy, kv_blocks=10)
    with pytest.raises(BadRequest, match="need 12 KV blocks"):
        engine.submit([1] * 12, new_tokens=4, fan_out=3)
    engine.submit([1] * 16, new_tokens=4, fan_out=2)


def test_reservation_wastes_what_paging_uses() -> None:
    """At most outputs that end early: most of the reserved memory is never filled."""
    useful: dict[str, float] = {}
    for policy in ("orca", "paged"):
        engine = SimulatedEngine(policy, kv_blocks=60, block_tokens=4)
        for token in range(6):
            engine.submit([token] * 4, new_tokens=36)
        for _ in range(8):
            engine.step()
        useful[policy] = engine.scheduler.kv_usage().useful_fraction
    assert useful["orca"] < 0.35
    assert useful["paged"] > 0.9
