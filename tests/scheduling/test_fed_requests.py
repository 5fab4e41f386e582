"""Requests whose tokens come from outside, piece by piece: they wait without being asked, go back, and give way."""

import random

import pytest
from simulated_engine import SimulatedEngine

from plait.errors import BadRequest, NoCapacity
from plait.ids import RequestId
from plait.scheduling import ScheduledStep


def chunks_of(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(chunk.request_id, chunk.start, chunk.tokens) for chunk in step.chunks]


def settle(engine: SimulatedEngine) -> list[tuple[str, int, int]]:
    """Step until nothing more happens; returns all chunks."""
    ran: list[tuple[str, int, int]] = []
    while chunks := chunks_of(engine.step()):
        ran += chunks
    return ran


def test_a_fed_request_runs_what_it_is_given_and_then_waits_for_more() -> None:
    engine = SimulatedEngine(step_tokens=8)
    one = engine.submit([], new_tokens=40, fed=True)
    assert settle(engine) == []
    engine.feed(one, 0, list(range(12)))
    assert settle(engine) == [(one, 0, 8), (one, 8, 4)]
    engine.feed(one, 12, [5])
    engine.feed(one, 13, [6])
    assert settle(engine) == [(one, 12, 2)]
    assert engine.pool.used_blocks == 4
    engine.cancel(one)
    engine.check_nothing_is_left()


def test_going_back_frees_blocks_and_computes_the_new_tokens_only() -> None:
    engine = SimulatedEngine(block_tokens=4)
    one = engine.submit([], new_tokens=40, fed=True)
    engine.feed(one, 0, list(range(20)))
    settle(engine)
    assert engine.pool.used_blocks == 5
    engine.feed(one, 6, [7])
    engine.scheduler.check()
    assert engine.pool.used_blocks == 2
    assert settle(engine) == [(one, 6, 1)]
    assert list(engine.scheduler.token_ids(one, 0)) == [0, 1, 2, 3, 4, 5, 7]
    engine.feed(one, 0, [9, 9])
    assert settle(engine) == [(one, 0, 2)]


def test_going_back_without_new_tokens_leaves_nothing_to_do() -> None:
    engine = SimulatedEngine(kv_blocks=8, block_tokens=4, watermark_fraction=0.0)
    old, young = (engine.submit([], new_tokens=30, fed=True) for _ in range(2))
    engine.feed(old, 0, [1] * 24)
    settle(engine)
    engine.feed(young, 0, [2] * 12)
    assert settle(engine) == []
    engine.feed(young, 5, [])
    engine.feed(young, 0, [])
    other = engine.submit([3])
    assert engine.step().admitted == (other,), "who was taken back to nothing keeps nobody waiting"
    engine.cancel(other)
    engine.feed(old, 23, [])
    assert settle(engine) == []
    engine.feed(old, 23, [1])
    assert settle(engine) == [(old, 23, 1)]


def test_nothing_of_a_fed_request_is_found_by_others() -> None:
    engine = SimulatedEngine(block_tokens=4)
    one = engine.submit(list(range(16)), fed=True)
    settle(engine)
    other = engine.submit(list(range(16)))
    assert chunks_of(engine.step()) == [(other, 0, 16)]
    engine.cancel(one)
    assert engine.pool.cached_blocks == 0


def test_a_preempted_request_that_waits_for_input_keeps_nobody_waiting() -> None:
    engine = SimulatedEngine(kv_blocks=8, block_tokens=4, watermark_fraction=0.0)
    old, young = (engine.submit([], new_tokens=30, fed=True) for _ in range(2))
    engine.feed(old, 0, [1] * 16)
    engine.feed(young, 0, [2] * 16)
    settle(engine)
    engine.feed(old, 16, [1])
    step = engine.step()
    assert step.preempted == (young,) and engine.scheduler.counts().resting_requests == 1
    small = engine.submit([3])
    assert engine.step().admitted == (small,)
    engine.cancel(small)
    engine.feed(young, 16, [2])
    assert settle(engine) == [], "the older keeps its blocks"
    engine.cancel(old)
    assert settle(engine) == [(young, 0, 17)]


def test_the_idle_and_later_give_way_to_the_earlier_and_never_the_other_way_round() -> None:
    engine = SimulatedEngine(kv_blocks=8, block_tokens=4, watermark_fraction=0.0)
    old, young = (engine.submit([], new_tokens=30, fed=True) for _ in range(2))
    engine.feed(young, 0, [2] * 24)
    settle(engine)
    engine.feed(old, 0, [1] * 20)
    step = engine.step()
    assert step.preempted == (young,) and step.admitted == (old,)
    engine.feed(young, 24, [2])
    assert settle(engine) == []
    engine.cancel(old)
    assert settle(engine) == [(young, 0, 25)]


def test_who_gives_way_does_so_only_if_that_is_enough() -> None:
    engine = SimulatedEngine(kv_blocks=8, block_tokens=4, watermark_fraction=0.0)
    oldest, old, young = (engine.submit([], new_tokens=28, fed=True) for _ in range(3))
    engine.feed(oldest, 0, [1] * 16)
    engine.feed(young, 0, [2] * 4)
    settle(engine)
    engine.feed(old, 0, [3] * 24)
    assert engine.step().preempted == ()
    assert engine.scheduler.counts().running_requests == 2


def test_places_are_given_up_as_well_as_blocks() -> None:
    engine = SimulatedEngine(max_running_sequences=1)
    old, young = (engine.submit([], new_tokens=8, fed=True) for _ in range(2))
    engine.feed(young, 0, [2])
    settle(engine)
    engine.feed(old, 0, [1])
    assert settle(engine) == [(old, 0, 1)]


def test_those_that_rest_count_as_queued() -> None:
    engine = SimulatedEngine(max_waiting=2)
    engine.submit([], fed=True)
    engine.submit([], fed=True)
    with pytest.raises(NoCapacity):
        engine.submit([], fed=True)
    with pytest.raises(BadRequest):
        engine.submit([], new_tokens=4 * 64 + 1, fed=True)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("seed", range(8))
def test_random_feeds_rollbacks_and_ends_lose_no_block(preemption: str, seed: int) -> None:
    """Fed and other requests under memory pressure; the simulated engine checks every read, write and order."""
    rng = random.Random(seed)
    block_tokens = rng.choice([1, 3, 4])
    engine = SimulatedEngine(
        kv_blocks=rng.randint(24, 44) // block_tokens,
        block_tokens=block_tokens,
        host_blocks=16,
        preemption=preemption,
        step_tokens=rng.choice([6, 24]),
        max_running_sequences=rng.choice([4, 16]),
        max_waiting=8,
    )
    preempted = 0
    for _ in range(400):
        choice = rng.random()
        fed = [id for id, request in engine.requests.items() if request.fed]
        if choice < 0.15:
            prompt = [rng.randrange(2) for _ in range(rng.randint(0, 8))]
            try:
                if rng.random() < 0.7:
                    engine.submit(prompt, new_tokens=rng.randint(4, 20), fed=True)
                else:
                    engine.submit([1, *prompt], new_tokens=rng.randint(1, 6))
            except (BadRequest, NoCapacity):
                continue
        elif choice < 0.75 and fed:
            feed_something(engine, rng.choice(fed), rng)
        elif choice < 0.78 and engine.requests:
            engine.cancel(rng.choice(sorted(engine.requests)))
        preempted += len(engine.step().preempted)
    for id in [id for id, request in engine.requests.items() if request.fed]:
        engine.cancel(id)
    engine.run_until_idle()
    assert preempted


def feed_something(engine: SimulatedEngine, id: RequestId, rng: random.Random) -> None:
    request = engine.requests[id]
    known = len(request.token_ids[0])
    start = known if rng.random() < 0.7 else rng.randint(0, known)
    room = request.max_sequence_tokens - start
    engine.feed(id, start, [rng.randrange(2) for _ in range(rng.randint(min(1, room), room))])
    if rng.random() < 0.1:
        engine.feed(id, rng.randint(0, start), [])


def test_the_earliest_of_all_always_advances() -> None:
    """Two machines that got the same two requests in different order of arrival, each full of the other one."""
    machines = [SimulatedEngine(kv_blocks=4, block_tokens=4, watermark_fraction=0.0) for _ in range(2)]
    ids: list[dict[str, RequestId]] = []
    for machine, names in zip(machines, (("a", "b"), ("b", "a")), strict=True):
        ids.append(
            {name: machine.submit([], new_tokens=16, priority="ab".index(name), fed=True) for name in names}
        )
        machine.feed(ids[-1][names[0]], 0, [1] * 12)
        assert settle(machine) == [(ids[-1][names[0]], 0, 12)]
    machines[1].feed(ids[1]["a"], 0, [1] * 12)
    machines[0].feed(ids[0]["b"], 0, [1] * 12)
    assert settle(machines[1]) == [(ids[1]["a"], 0, 12)], "b gives way to a"
    assert settle(machines[0]) == [], "a does not give way to b"
