"""The virtual clock: it jumps, it repeats itself, its processes stop and die, and it names what can never go on."""

import asyncio

import pytest

from plait.simulator import Deadlock, Livelock, Process, VirtualLoop, run_virtual


def virtual_loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def test_the_clock_jumps_to_the_next_timer() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        times: list[float] = []

        async def note(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            times.append(loop.time())

        await asyncio.gather(note(3600), note(0.25), note(7))
        return times

    assert run_virtual(main()) == [0.25, 7, 3600]


def test_timeouts_queues_and_groups_behave() -> None:
    async def main() -> tuple[float, list[int]]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        taken: list[int] = []

        async def put() -> None:
            for number in range(3):
                await queue.put(number)
                await asyncio.sleep(1)

        async def take() -> None:
            while len(taken) < 3:
                taken.append(await queue.get())

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(put())
            group.create_task(take())
        return loop.time(), taken

    assert run_virtual(main()) == (8.0, [0, 1, 2])


def test_a_cancelled_timer_does_not_move_the_clock() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(100, lambda: None).cancel()
        await asyncio.sleep(1)
        return loop.time()

    assert run_virtual(main()) == 1


def test_a_deadlock_is_named() -> None:
    async def waits_for_nothing() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match=r"waits_for_nothing at test_virtual_loop\.py:\d+"):
        run_virtual(waits_for_nothing())


def test_a_livelock_is_named() -> None:
    async def goes_round() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Livelock, match=r"goes_round at test_virtual_loop\.py:\d+"):
        run_virtual(goes_round())


def test_there_are_no_threads() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="thread"):
            await asyncio.to_thread(int)

    run_virtual(main())


def test_a_process_that_is_stopped_goes_on_where_it_was() -> None:
    async def main() -> None:
        loop = virtual_loop()
        process = loop.process("ticking")
        ticks: list[float] = []

        async def nap() -> None:
            await asyncio.sleep(1)

        async def tick() -> None:
            for _ in range(6):
                # A task of a task belongs to the same process.
                await asyncio.create_task(nap())
                ticks.append(loop.time())

        running = process.start(tick())
        await asyncio.sleep(2.5)
        process.stop()
        await asyncio.sleep(10)
        assert ticks == [1, 2]
        process.go_on()
        await running
        assert ticks == [1, 2, 12.5, 13.5, 14.5, 15.5]

    run_virtual(main())


def test_a_killed_process_says_no_farewell() -> None:
    async def main() -> list[str]:
        loop = virtual_loop()
        process, other = loop.process("mortal"), loop.process("other")
        said: list[str] = []

        async def live(name: str) -> None:
            try:
                await asyncio.sleep(5)
                said.append(f"{name} woke")
            finally:
                said.append(f"{name} left")

        process.start(live("mortal"))
        surviving = other.start(live("other"))
        await asyncio.sleep(1)
        process.kill()
        process.go_on()
        await surviving
        await asyncio.sleep(100)
        assert len(loop.unfinished(process)) == 1
        assert loop.unfinished(other) == []
        return list(said)

    assert run_virtual(main()) == ["other woke", "other left"]


def test_a_future_that_another_process_completes_wakes_its_own() -> None:
    async def main() -> None:
        loop = virtual_loop()
        one, two = loop.process("one"), loop.process("two")
        reached: list[Process | None] = []
        future: asyncio.Future[None] = loop.create_future()

        async def wait() -> None:
            await future
            reached.append(one)

        async def complete() -> None:
            future.set_result(None)

        waiting = one.start(wait())
        await asyncio.sleep(1)
        one.stop()
        await two.start(complete())
        await asyncio.sleep(1)
        assert not reached
        one.go_on()
        await waiting

    run_virtual(main())


def test_two_runs_are_the_same_event_for_event() -> None:
    async def main() -> tuple[int, float]:
        loop = virtual_loop()

        async def work(number: int) -> None:
            for step in range(20):
                await asyncio.sleep((number * 7 + step * 3) % 5 / 10)

        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(work(number))
        return loop.events, loop.time()

    assert run_virtual(main()) == run_virtual(main())
