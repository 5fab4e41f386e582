"""Requests larger than the pool: blocks move out between steps, come back empty-handed, or are lost; contents hold."""

from collections.abc import Sequence

import numpy as np
import pytest
from simulated_engine import SimulatedEngine

from plait.errors import BadRequest
from plait.ids import PeerId
from plait.kvcache import DebtBook, LentBlock
from plait.scheduling import ScheduledStep


class LendingEngine(SimulatedEngine):
    """An engine that borrows from creditors who always have room, at most as many blocks as it may."""

    def __init__(self, *, borrowable_blocks: int, **sizes: int) -> None:
        super().__init__("paged", borrowable_blocks=borrowable_blocks, **sizes)
        self.debts = DebtBook(self.pool)
        self.lent = 0
        self.moves: list[tuple[int, int]] = []
        self.moved = 0

    def other_holders(self) -> list[list[int]]:
        return [self.debts.held, [source for source, _ in self.moves]]

    def _check_gangs(self, step: ScheduledStep) -> None:
        """Whoever waits for a block that is to move out may miss a step; nothing else is different."""
        for request_id in {chunk.request_id for chunk in step.chunks}:
            assert self.requests[request_id].running

    def borrow(self, creditor: str, kv_blocks: int) -> None:
        kv_blocks = min(kv_blocks, self.limits.borrowable_blocks - self.debts.borrowed_blocks)
        blocks = [LentBlock(self.lent + place, 1) for place in range(kv_blocks)]
        self.lent += kv_blocks
        self.debts.granted(PeerId(creditor), blocks)

    def start_moves(self, kv_blocks: int) -> None:
        staying = {source for source, _ in self.moves}
        sources = self.scheduler.movable(min(kv_blocks, self.debts.empty_blocks), staying)
        for source, target in zip(sources, self.debts.take_empty(len(sources)), strict=True):
            self.pool.share([source])
            self.moves.append((source, target))
            while len(self.device) <= target:
                self.device.append([None] * self.block_tokens)
            self.device[target] = list(self.device[source])

    def finish_moves(self, count: int) -> None:
        for source, target in self.moves[:count]:
            self.pool.release([source])
            if self.scheduler.relocate(source, target):
                self.debts.filled(target)
                self.moved += 1
            else:
                self.debts.cancel(target)
        del self.moves[:count]

    def lose(self, creditor: str) -> None:
        numbers = list(self.debts.numbers(PeerId(creditor)).values())
        for request_id in self.scheduler.lose(numbers):
            self.requests[request_id].running = False
            self.requests[request_id].computed = {}
        for source, target in [move for move in self.moves if move[1] in numbers]:
            self.pool.release([source])
            self.moves.remove((source, target))
        self.debts.lose(numbers)
        for number in numbers:
            self.device[number : number + 1] = (
                [[None] * self.block_tokens] if number < len(self.device) else []
            )


def run(engine: LendingEngine, rng: np.random.Generator, *, losses: float, most_steps: int = 4000) -> int:
    """Step until all requests have ended, with moves and losses in between; returns how many losses there were."""
    lost = 0
    for _ in range(most_steps):
        if not engine.requests:
            return lost
        engine.step()
        engine.debts.take_spent()
        engine.finish_moves(int(rng.integers(0, len(engine.moves) + 1)))
        if wanted := engine.scheduler.wanted_blocks():
            engine.borrow(str(rng.choice(["a", "b"])), int(rng.integers(1, wanted + 1)))
        engine.start_moves(int(rng.integers(0, 4)))
        if rng.random() < losses:
            engine.lose(str(rng.choice(["a", "b"])))
            lost += 1
        engine.debts.check()
        engine.scheduler.check(engine.other_holders())
    raise AssertionError(f"{len(engine.requests)} requests never ended")


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_requests_ends_with_what_it_wrote(seed: int) -> None:
    """The simulated engine checks before each chunk that the whole past of its sequence is readable, wherever it is."""
    rng = np.random.default_rng(seed)
    engine = LendingEngine(
        borrowable_blocks=60,
        kv_blocks=int(rng.integers(6, 14)),
        block_tokens=3,
        step_tokens=12,
        host_blocks=6,
    )
    common = list(rng.integers(0, 2, 9))
    for _ in range(8):
        prompt: Sequence[int] = [int(token) for token in [*common, *rng.integers(0, 2, rng.integers(1, 60))]]
        engine.submit(list(prompt), new_tokens=int(rng.integers(1, 20)), fan_out=int(rng.choice([1, 1, 2])))
    run(engine, rng, losses=0.03 if seed % 2 else 0.0)
    assert engine.moved
    engine.finish_moves(len(engine.moves))
    engine.debts.take_spent()
    engine.debts.give_back(engine.debts.empty_blocks)
    engine.check_nothing_is_left()
    assert engine.debts.borrowed_blocks == 0


def test_a_request_several_times_the_pool_runs_and_a_larger_one_is_refused() -> None:
    engine = LendingEngine(borrowable_blocks=30, kv_blocks=6, block_tokens=4, step_tokens=16)
    engine.submit([1] * 90, new_tokens=30)
    with pytest.raises(BadRequest, match="the whole cache has 36"):
        engine.submit([1] * 90, new_tokens=60)
    run(engine, np.random.default_rng(0), losses=0.0)
    assert engine.moved >= 24


def test_a_prefix_that_moved_out_is_shared_by_who_comes_later() -> None:
    engine = LendingEngine(borrowable_blocks=10, kv_blocks=8, block_tokens=4, step_tokens=64)
    first = engine.submit(list(range(16)), new_tokens=12)
    engine.step()
    engine.borrow("a", 4)
    engine.start_moves(4)
    engine.finish_moves(4)
    second = engine.submit([*range(16), 5], new_tokens=3)
    step = engine.step()
    tables = {chunk.request_id: list(chunk.kv_blocks) for chunk in step.chunks}
    assert tables[second][:4] == tables[first][:4] and min(tables[second][:4]) >= 8, "borrowed, and shared"
    assert engine.scheduler.cached_tokens(second) == 16
    run(engine, np.random.default_rng(0), losses=0.0)


def test_a_request_that_waits_for_a_loan_is_not_preempted() -> None:
    engine = LendingEngine(borrowable_blocks=10, kv_blocks=4, block_tokens=2, step_tokens=64)
    engine.submit([1] * 5, new_tokens=9)
    steps = [engine.step() for _ in range(20)]
    assert not any(step.preempted for step in steps)
    assert not steps[-1].chunks and engine.scheduler.wanted_blocks() >= 1
    engine.borrow("a", 3)
    assert not engine.step().chunks, "what is promised is not free yet"
    engine.start_moves(3)
    engine.finish_moves(3)
    assert engine.step().chunks
    run(engine, np.random.default_rng(0), losses=0.0)


def test_a_step_that_failed_is_undone() -> None:
    engine = SimulatedEngine(kv_blocks=8, block_tokens=2)
    engine.submit([1] * 5, new_tokens=4)
    step = engine.scheduler.schedule()
    assert engine.pool.used_blocks == 3
    engine.scheduler.undo(step)
    engine.scheduler.check()
    assert engine.pool.used_blocks == 0
    again = engine.scheduler.schedule()
    assert [chunk.tokens for chunk in again.chunks] == [5]


def test_a_feed_that_goes_back_into_a_borrowed_block_computes_it_again() -> None:
    engine = LendingEngine(borrowable_blocks=10, kv_blocks=8, block_tokens=4, step_tokens=64)
    fed = engine.submit([], new_tokens=30, fed=True)
    engine.feed(fed, 0, list(range(10)))
    engine.step()
    engine.borrow("a", 2)
    engine.start_moves(2)
    engine.finish_moves(2)
    engine.scheduler.extend(fed, 6, [9])
    [chunk] = engine.scheduler.schedule().chunks
    assert (chunk.start, chunk.tokens) == (4, 3) and chunk.kv_blocks[0] >= 8 > chunk.kv_blocks[1]
