"""What the default policy promises: budget, order, preemption and its two ways back."""

import pytest
from simulated_engine import SimulatedEngine

from plait.errors import BadRequest, NoCapacity
from plait.scheduling import ScheduledStep


def chunks_of(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(chunk.request_id, chunk.start, chunk.tokens) for chunk in step.chunks]


def test_a_long_prompt_is_cut_into_chunks_beside_decodes() -> None:
    engine = SimulatedEngine(step_tokens=10)
    short = engine.submit([1, 2, 3])
    assert chunks_of(engine.step()) == [(short, 0, 3)]
    long = engine.submit(list(range(20)))
    assert chunks_of(engine.step()) == [(short, 3, 1), (long, 0, 9)]
    assert chunks_of(engine.step()) == [(short, 4, 1), (long, 9, 9)]
    assert chunks_of(engine.step()) == [(short, 5, 1), (long, 18, 2)]
    assert chunks_of(engine.step()) == [(short, 6, 1), (long, 20, 1)]
    engine.run_until_idle()


def test_decodes_come_first_even_those_that_arrived_later() -> None:
    engine = SimulatedEngine(step_tokens=6, long_prefill_tokens=4)
    long = engine.submit(list(range(20)))
    short = engine.submit([1, 2])
    engine.step()
    assert chunks_of(engine.step()) == [(short, 2, 1), (long, 4, 4)]
    engine.run_until_idle()


def test_a_cap_lets_several_prompts_advance_together() -> None:
    engine = SimulatedEngine(step_tokens=12, long_prefill_tokens=4)
    prompts = [engine.submit([token] * 12) for token in range(3)]
    assert chunks_of(engine.step()) == [(request_id, 0, 4) for request_id in prompts]
    engine.run_until_idle()


def test_a_group_steps_even_when_the_cap_is_below_its_size() -> None:
    engine = SimulatedEngine(kv_blocks=11, host_blocks=12, step_tokens=8, long_prefill_tokens=1)
    engine.submit([0] * 10, new_tokens=30)
    engine.submit([1] * 9, new_tokens=6, fan_out=3)
    steps = engine.run_until_idle()
    assert any(step.swap_in for step in steps), "the group was meant to be swapped out and back"


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    engine = SimulatedEngine(kv_blocks=10, watermark_fraction=0.0)
    first = engine.submit([1] * 20)
    big, small = engine.submit([2] * 24), engine.submit([3])
    admitted = [request_id for step in engine.run_until_idle() for request_id in step.admitted]
    assert admitted == [first, big, small]


def test_a_higher_class_is_admitted_first() -> None:
    engine = SimulatedEngine(max_running_sequences=1)
    late_class, early_class = engine.submit([1], priority=5), engine.submit([2], priority=-5)
    assert engine.step().admitted == (early_class,)
    engine.run_until_idle()
    assert not engine.scheduler.counts().running_requests
    assert late_class not in engine.requests


def test_admission_leaves_the_watermark_unless_nothing_runs() -> None:
    engine = SimulatedEngine(kv_blocks=10, watermark_fraction=0.5)
    alone = engine.submit([1] * 28, new_tokens=4)
    assert engine.step().admitted == (alone,)
    engine.submit([2] * 4)
    assert engine.step().admitted == ()
    engine.run_until_idle()


def test_blocks_promised_to_an_unfinished_prompt_are_not_given_to_a_newcomer() -> None:
    engine = SimulatedEngine(kv_blocks=10, step_tokens=8, long_prefill_tokens=4, watermark_fraction=0.0)
    long = engine.submit([1] * 32, new_tokens=4)
    engine.submit([2] * 12)
    assert engine.step().admitted == (long,)
    engine.run_until_idle()
    assert engine.scheduler.counts().preemptions_total == 0


def test_the_newest_of_the_lowest_class_is_preempted() -> None:
    engine = SimulatedEngine(kv_blocks=6, watermark_fraction=0.0)
    low = engine.submit([1] * 4, new_tokens=12, priority=1)
    engine.step()
    old = engine.submit([2] * 4, new_tokens=12)
    new = engine.submit([3] * 4, new_tokens=12)
    preempted = [request_id for step in engine.run_until_idle() for request_id in step.preempted]
    assert preempted[0] == low
    assert new in preempted
    assert old not in preempted


def test_a_preempted_request_returns_before_anyone_new() -> None:
    engine = SimulatedEngine(kv_blocks=6, watermark_fraction=0.0)
    engine.submit([1] * 8, new_tokens=12)
    victim = engine.submit([2] * 7, new_tokens=9)
    engine.step_until(lambda step: victim in step.preempted)
    newcomer = engine.submit([3])
    admitted = [request_id for step in engine.run_until_idle() for request_id in step.admitted]
    assert admitted.index(victim) < admitted.index(newcomer)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("fan_out", [1, 3])
def test_a_pool_at_a_third_of_demand_serves_everybody(preemption: str, fan_out: int) -> None:
    demand_blocks = 8 * 6 * fan_out
    engine = SimulatedEngine(
        kv_blocks=demand_blocks * 3 // 10,
        host_blocks=demand_blocks,
        preemption=preemption,
        watermark_fraction=0.0,
    )
    for token in range(8):
        engine.submit([token] * 9, new_tokens=15, fan_out=fan_out)
    engine.run_until_idle()
    counts = engine.scheduler.counts()
    assert counts.preemptions_total > 0
    assert counts.swaps_total == (counts.preemptions_total if preemption == "swap" else 0)


def test_auto_recomputes_single_sequences_and_swaps_groups() -> None:
    engine = SimulatedEngine(kv_blocks=10, host_blocks=20, watermark_fraction=0.0)
    engine.submit([0] * 8, new_tokens=24)
    group = engine.submit([1] * 6, new_tokens=10, fan_out=2)
    single = engine.submit([2] * 4, new_tokens=12)
    swaps: dict[str, set[bool]] = {group: set(), single: set()}
    for step in engine.run_until_idle():
        for request_id in step.preempted:
            swaps[request_id].add(bool(step.swap_out))
    assert swaps == {group: {True}, single: {False}}


def test_swapping_copies_a_shared_block_once() -> None:
    engine = SimulatedEngine(kv_blocks=12, host_blocks=12, watermark_fraction=0.0)
    engine.submit([0] * 8, new_tokens=20)
    group = engine.submit([1] * 12, new_tokens=8, fan_out=3)
    engine.step()
    steps = engine.run_until_idle()
    out = next(step for step in steps if group in step.preempted)
    assert 0 < len(out.swap_out) <= 2 + 3 * 3
    sources = [source for source, _ in out.swap_out]
    assert len(set(sources)) == len(sources)


def test_a_full_host_pool_falls_back_to_recomputation() -> None:
    engine = SimulatedEngine(kv_blocks=8, host_blocks=1, preemption="swap", watermark_fraction=0.0)
    for token in range(3):
        engine.submit([token] * 8, new_tokens=8)
    engine.run_until_idle()
    counts = engine.scheduler.counts()
    assert counts.preemptions_total > 0
    assert counts.swaps_total == 0


def test_a_group_that_recomputes_shares_its_prompt_again() -> None:
    """Three sequences with a prompt of their own each would need 21 blocks, and there are 14."""
    engine = SimulatedEngine(kv_blocks=14, preemption="recompute", watermark_fraction=0.0)
    group = engine.submit([1] * 24, new_tokens=8, fan_out=3, reuse_prefix=False)
    engine.step()
    urgent = engine.submit([2] * 4, new_tokens=24, priority=-1)
    engine.step_until(lambda step: group in step.preempted)
    assert urgent in engine.requests
    engine.step_until(lambda step: group in step.admitted)
    # The first sequence has computed the full blocks of the prompt, for all three.
    assert engine.pool.used_blocks == 5
    engine.step()
    assert engine.pool.used_blocks == 5 + 3 * 3
    engine.run_until_idle()
    follower = engine.submit([1] * 24 + [0, 7, 7, 7, 7])
    engine.run_until_idle()
    hit_tokens = engine.scheduler.counts().prefix_hit_tokens_total
    assert hit_tokens == 28, f"{follower} should find what the group computed"


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_one_maximal_request_completes_alone(preemption: str) -> None:
    engine = SimulatedEngine(
        kv_blocks=17, host_blocks=17, step_tokens=5, preemption=preemption, watermark_fraction=0.9
    )
    engine.submit([1] * 24, new_tokens=8, fan_out=4)
    steps = engine.run_until_idle()
    assert max(len(step.chunks) for step in steps) == 4


def test_a_resumed_request_finds_its_blocks_in_the_prefix_cache() -> None:
    engine = SimulatedEngine(kv_blocks=8, watermark_fraction=0.0)
    engine.submit([0] * 15, new_tokens=3)
    victim = engine.submit([1] * 12, new_tokens=6)
    steps = engine.run_until_idle()
    resumed = [step for step in steps if victim in step.admitted][1]
    (chunk,) = [chunk for chunk in resumed.chunks if chunk.request_id == victim]
    assert chunk.start >= 8


def test_swapped_blocks_are_found_again_once_they_are_back() -> None:
    engine = SimulatedEngine(kv_blocks=7, host_blocks=7, preemption="swap", watermark_fraction=0.0)
    engine.submit([0] * 12, new_tokens=12)
    victim = engine.submit([1] * 12, new_tokens=8)
    engine.step_until(lambda step: step.swap_in)
    engine.step()
    follower = engine.submit([1] * 12)
    engine.step_until(lambda step: follower in step.admitted)
    assert engine.scheduler.cached_tokens(follower) == 8
    assert victim in engine.requests
    engine.run_until_idle()


def test_a_request_beyond_the_whole_pool_is_refused_with_the_numbers() -> None:
    engine = SimulatedEngine(kv_blocks=10)
    with pytest.raises(BadRequest, match=r"need 11 KV blocks .* has 10; .*--kv-cache-memory"):
        engine.submit([1] * 36, new_tokens=5)
    engine.submit([1] * 36, new_tokens=4)
    # Two full blocks of the prompt are shared, each sequence fills two of its own.
    with pytest.raises(BadRequest, match=r"5 sequence.* need 12 KV blocks"):
        engine.submit([1] * 9, new_tokens=7, fan_out=5)
    engine.submit([1] * 9, new_tokens=7, fan_out=4)


def test_more_sequences_than_a_step_has_tokens_are_refused() -> None:
    engine = SimulatedEngine(step_tokens=3)
    with pytest.raises(BadRequest, match=r"4 sequences side by side .* at most 3"):
        engine.submit([1], fan_out=4)
    with pytest.raises(BadRequest, match="prompt is empty"):
        engine.submit([])


def test_a_full_queue_refuses_until_somebody_left_it() -> None:
    engine = SimulatedEngine(max_waiting=2)
    engine.submit([1])
    engine.submit([2])
    with pytest.raises(NoCapacity, match="2 requests are waiting") as refusal:
        engine.submit([3])
    assert refusal.value.retry_after_s > 0
    engine.step()
    engine.submit([3])
    engine.run_until_idle()


def test_decoding_sequences_never_outnumber_the_budget() -> None:
    engine = SimulatedEngine(step_tokens=4, max_running_sequences=100)
    for token in range(10):
        engine.submit([token])
    for _ in range(4):
        step = engine.step()
        assert len(step.chunks) == 4
    engine.run_until_idle()


def test_paged_memory_is_wasted_only_in_last_blocks() -> None:
    engine = SimulatedEngine(kv_blocks=200, block_tokens=16)
    for token in range(20):
        engine.submit([token] * (token + 3), new_tokens=40)
    for _ in range(30):
        engine.step()
        usage = engine.scheduler.kv_usage()
        sequences = engine.scheduler.counts().running_sequences
        assert 0 <= usage.held_tokens - usage.useful_tokens <= 15 * sequences
    engine.run_until_idle()
    assert engine.scheduler.kv_usage().useful_fraction == 1.0
