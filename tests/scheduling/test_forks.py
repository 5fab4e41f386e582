"""Sequences that multiply: samples of one prompt, and beams."""

import pytest
from simulated_engine import SimulatedEngine

from plait.ids import RequestId


def prefilled(policy: str, prompt_tokens: int, fan_out: int) -> tuple[SimulatedEngine, RequestId]:
    engine = SimulatedEngine(policy, block_tokens=4)
    request_id = engine.submit(list(range(prompt_tokens)), fan_out=fan_out)
    engine.end_step(engine.begin_step())
    engine.fork(request_id, (0,) * fan_out)
    return engine, request_id


@pytest.mark.parametrize("policy", ["static", "orca", "paged"])
def test_samples_share_the_prompt_and_copy_only_its_last_block(policy: str) -> None:
    engine, request_id = prefilled(policy, prompt_tokens=10, fan_out=3)
    for sequence in range(3):
        engine.append(request_id, sequence, 100 + sequence)
    step = engine.begin_step()
    tables = [chunk.kv_blocks for chunk in step.chunks]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 3
    # Two copy; the third keeps the original, which is its own by then.
    assert [source for source, _ in step.copies] == [tables[2][2]] * 2
    engine.end_step(step)


def test_samples_of_a_prompt_of_full_blocks_copy_nothing() -> None:
    engine, request_id = prefilled("paged", prompt_tokens=8, fan_out=3)
    for sequence in range(3):
        engine.append(request_id, sequence, 100 + sequence)
    step = engine.begin_step()
    assert step.copies == ()
    assert engine.pool.used_blocks == 2 + 3
    engine.end_step(step)


@pytest.mark.parametrize("policy", ["static", "orca", "paged"])
def test_beams_free_what_no_survivor_needs(policy: str) -> None:
    engine, request_id = prefilled(policy, prompt_tokens=4, fan_out=2)
    for sequence in range(2):
        engine.append(request_id, sequence, sequence)
    for _ in range(6):
        engine.end_step(engine.begin_step())
        engine.fork(request_id, (1, 1))
        for sequence in range(2):
            engine.append(request_id, sequence, sequence)
        engine.scheduler.check()
    step = engine.begin_step()
    # 11 tokens computed: one shared full block of prompt, one shared of answer, and two last blocks.
    assert len({block for chunk in step.chunks for block in chunk.kv_blocks}) == 4
    assert engine.pool.used_blocks == (4 if policy == "paged" else 6)
    engine.end_step(step)


def test_indices_stay_when_a_sequence_finishes() -> None:
    engine, request_id = prefilled("paged", prompt_tokens=5, fan_out=3)
    for sequence in range(3):
        engine.append(request_id, sequence, sequence)
    engine.end_step(engine.begin_step())
    engine.finish_sequence(request_id, 1)
    for sequence in (0, 2):
        engine.append(request_id, sequence, sequence)
    step = engine.begin_step()
    assert [chunk.sequence for chunk in step.chunks] == [0, 2]
    engine.end_step(step)


def test_a_request_ends_with_its_last_sequence() -> None:
    engine, request_id = prefilled("paged", prompt_tokens=5, fan_out=2)
    engine.finish_sequence(request_id, 0)
    engine.finish_sequence(request_id, 1)
    engine.check_nothing_is_left()
    engine.scheduler.finish(request_id)
    engine.scheduler.cancel(request_id)


def test_what_is_cancelled_in_flight_is_neither_published_nor_leaked() -> None:
    engine = SimulatedEngine("paged")
    request_id = engine.submit([1] * 16)
    step = engine.begin_step()
    engine.cancel(request_id)
    assert engine.end_step(step) == []
    engine.check_nothing_is_left()
    assert engine.pool.cached_blocks == 0


def test_an_id_may_be_used_again_while_its_first_owner_is_in_flight() -> None:
    engine = SimulatedEngine("paged")
    engine.submit([1] * 16)
    step = engine.begin_step()
    engine.cancel(RequestId("r0"))
    engine.arrivals = 0
    engine.submit([2] * 16)
    engine.scheduler.complete(step)
    engine.scheduler.check()
    engine.run_until_idle()
