# pyright: reportPrivateUsage=false
"""Bugs that somebody could have written, put into what the event heap runs: its trials must find each of them.

Most are in the live code (scheduler, pool, prefix index, router, plan of a recovery); the last three are in how
requests move over machines, which the event heap has for itself.
"""

from collections.abc import Callable
from typing import Any

import pytest

from plait.kvcache import KvBlockPool
from plait.kvcache.prefix import PrefixIndex
from plait.routing import Router
from plait.scheduling import Scheduler
from plait.simulator import data_path
from plait.simulator.data_path import DataPath
from plait.simulator.event_heap import ns_of
from plait.simulator.flight import Flight

Plant = Callable[[pytest.MonkeyPatch], None]
"""Puts a bug in."""


def lost_wake_up(patch: pytest.MonkeyPatch) -> None:
    """A request that rests, and is fed, is not put back among those that wait."""
    right = Scheduler.extend

    def extend(self: Any, request_id: Any, start: int, token_ids: Any) -> None:
        request = self._requests[request_id]
        if request.resting and start:
            request.sole.token_ids[start:] = token_ids
            return
        right(self, request_id, start, token_ids)

    patch.setattr(Scheduler, "extend", extend)


def double_free(patch: pytest.MonkeyPatch) -> None:
    """Who frees four blocks or more puts the first into the free list twice."""
    right = KvBlockPool.release

    def release(self: Any, kv_blocks: Any) -> None:
        right(self, kv_blocks)
        if len(kv_blocks) > 3 and self._references[kv_blocks[0]] == 0 and kv_blocks[0] not in self._cached:
            self._blank.append(kv_blocks[0])

    patch.setattr(KvBlockPool, "release", release)


def release_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who frees three blocks or more frees one too few."""
    right = KvBlockPool.release

    def release(self: Any, kv_blocks: Any) -> None:
        right(self, kv_blocks[1:] if len(kv_blocks) > 2 else kv_blocks)

    patch.setattr(KvBlockPool, "release", release)


def block_given_to_two(patch: pytest.MonkeyPatch) -> None:
    """A block that was handed out stays in the free list, if it was among five or more."""
    right = KvBlockPool.allocate

    def allocate(self: Any, kv_blocks: int) -> list[int]:
        taken = right(self, kv_blocks)
        if len(taken) > 4:
            self._blank.append(taken[-1])
        return taken

    patch.setattr(KvBlockPool, "allocate", allocate)


def block_leaked_by_cancelling(patch: pytest.MonkeyPatch) -> None:
    """Who cancels a request that waits in host memory forgets what it has there, as in a crash of its client."""
    right = Scheduler.cancel

    def cancel(self: Any, request_id: Any) -> None:
        request = self._requests.get(request_id)
        if request is not None and not request.running:
            self._leave_queue(request)
            del self._requests[request_id]
            return
        right(self, request_id)
        if request is not None and self._pool.free_blocks:
            self._pool.allocate(1)

    patch.setattr(Scheduler, "cancel", cancel)


def preempted_and_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A request that was preempted is not queued again, if another one waits."""
    right = Scheduler._wait_or_rest

    def wait_or_rest(self: Any, request: Any) -> None:
        if request.started and self._waiting:
            request.running = False
            return
        right(self, request)

    patch.setattr(Scheduler, "_wait_or_rest", wait_or_rest)


def queue_out_of_order(patch: pytest.MonkeyPatch) -> None:
    """Who comes back to a queue goes to its end."""
    right = Scheduler._join_queue

    def join_queue(self: Any, request: Any, *, running: bool) -> None:
        right(self, request, running=running)
        queue = self._running if running else self._waiting
        queue.remove(request)
        queue.append(request)

    patch.setattr(Scheduler, "_join_queue", join_queue)


def prefix_of_another_prompt(patch: pytest.MonkeyPatch) -> None:
    """The index keeps the name of a block that is overwritten."""

    def discard(self: Any, kv_block: int) -> None:
        self._key_of_block.pop(kv_block)

    patch.setattr(PrefixIndex, "discard", discard)


def shared_prefix_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Who finds its prompt in the cache does not count as a holder of it."""
    right = KvBlockPool.fork

    def fork(self: Any, kv_blocks: Any) -> list[int]:
        return list(kv_blocks) if len(kv_blocks) > 1 else right(self, kv_blocks)

    patch.setattr(KvBlockPool, "fork", fork)


def stale_route(patch: pytest.MonkeyPatch) -> None:
    """A route once found for some blocks is used again, whoever has been lost since."""
    right = Router.choose
    routes: dict[Any, dict[range, Any]] = {}

    def choose(self: Any, view: Any, blocks: range, wish: Any, **more: Any) -> Any:
        found = routes.setdefault(self, {})
        if blocks not in found:
            found[blocks] = right(self, view, blocks, wish, **more)
        return found[blocks]

    patch.setattr(Router, "choose", choose)


def replay_from_wrong_position(patch: pytest.MonkeyPatch) -> None:
    """A chain that is mended goes on one position too late."""
    right = data_path.plan_resume

    def plan_resume(known: Any, kept_from: Any, tokens: int) -> tuple[int, ...]:
        return tuple(position + (position < tokens - 1) for position in right(known, kept_from, tokens))

    patch.setattr(data_path, "plan_resume", plan_resume)


def retry_without_a_key(patch: pytest.MonkeyPatch) -> None:
    """What takes long to arrive is sent once more, and nothing in it says that it is the same."""
    right = DataPath._send

    def send(self: Any, sender: str, receiver: str, size: int, action: Any, what: Any, flight: Any) -> None:
        right(self, sender, receiver, size, action, what, flight)
        arrival_ns = self._network.send(sender, receiver, 0, self._heap.now_ns)
        if arrival_ns is not None and arrival_ns > self._heap.now_ns + ns_of(0.3):
            right(self, sender, receiver, size, action, what, flight)

    patch.setattr(DataPath, "_send", send)


def token_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """The first token after a request has moved is told twice."""
    right = Flight.take_token
    moved: dict[Flight, int] = {}

    def take_token(self: Any, now_ns: int) -> int:
        gap_ns = right(self, now_ns)
        if self.retries > moved.get(self, 0) and self.produced < self.output_tokens:
            moved[self] = self.retries
            right(self, now_ns)
        return gap_ns

    patch.setattr(Flight, "take_token", take_token)


def session_left_on_a_machine(patch: pytest.MonkeyPatch) -> None:
    """Who moves a request off its machines forgets one of three or more."""
    right = DataPath.close

    def close(self: Any, flight: Flight, but: Any = None) -> None:
        if len(flight.hops) > 2 and but is None:
            flight.hops.pop()
        right(self, flight, but)

    patch.setattr(DataPath, "close", close)


PLANTS: tuple[Plant, ...] = (
    lost_wake_up,
    double_free,
    release_forgotten,
    block_given_to_two,
    block_leaked_by_cancelling,
    preempted_and_forgotten,
    queue_out_of_order,
    prefix_of_another_prompt,
    shared_prefix_not_counted,
    stale_route,
    replay_from_wrong_position,
    retry_without_a_key,
    token_counted_twice,
    session_left_on_a_machine,
)
