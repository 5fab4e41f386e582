from typing import Any

import pytest

from plait.simulator import EventFailed, EventHeap, EventKind, Livelock


def test_events_happen_by_time_then_kind_then_order_of_pushing() -> None:
    heap = EventHeap(0)
    seen: list[str] = []
    for time_ns, kind, name in (
        (20, EventKind.ARRIVAL, "late"),
        (10, EventKind.SCHEDULE, "begin"),
        (10, EventKind.ARRIVAL, "first"),
        (10, EventKind.ARRIVAL, "second"),
        (10, EventKind.DONE, "done"),
    ):
        heap.at(time_ns, kind, name, seen.append, name)
    while not heap.idle:
        heap.step()
    assert seen == ["done", "first", "second", "begin", "late"]
    assert heap.now_ns == 20 and heap.events == 5


def test_nothing_is_pushed_into_the_past() -> None:
    heap = EventHeap(0)
    heap.at(10, EventKind.TICK, "tick", lambda _: None, None)
    heap.step()
    with pytest.raises(AssertionError, match="past"):
        heap.at(9, EventKind.TICK, "tick", lambda _: None, None)


def test_a_clock_that_stands_still_is_named() -> None:
    heap = EventHeap(7)

    def again(name: str) -> None:
        heap.at(heap.now_ns, EventKind.SCHEDULE, name, again, name)

    again("ping-pong")
    with pytest.raises(Livelock, match=r"seed 7, event 100001[\s\S]*ping-pong"):
        while True:
            heap.step()


def test_a_broken_invariant_is_reported_with_seed_and_event() -> None:
    heap = EventHeap(3)

    def fail(_: Any) -> None:
        raise AssertionError("a block was lost")

    heap.at(5, EventKind.TICK, "fine", lambda _: None, None)
    heap.at(2_000_000_000, EventKind.DONE, "worker", fail, None)
    heap.step()
    with pytest.raises(
        EventFailed, match=r"seed 3, event 2 \(done of 'worker' at 2.0+ s\): a block was lost"
    ):
        heap.step()


def test_digests_are_those_of_the_events() -> None:
    def digest(*names: str) -> str:
        heap = EventHeap(0)
        for name in names:
            heap.at(1, EventKind.TICK, name, lambda _: None, None)
        for _ in names:
            heap.step()
        return heap.digest()

    assert digest("a", "b") == digest("a", "b")
    assert digest("a", "b") != digest("b", "a")
    many = [str(number) for number in range(1000)]
    assert digest(*many) == digest(*many)
    assert digest(*many) != digest(*many[:-1])


def test_ticks_alone_are_no_work() -> None:
    heap = EventHeap(0)
    assert heap.idle
    heap.at(1, EventKind.TICK, "tick", lambda _: None, None)
    assert heap.idle
    heap.at(1, EventKind.DONE, "done", lambda _: None, None)
    assert not heap.idle
