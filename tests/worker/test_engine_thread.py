"""The thread in which an engine computes: calls in order, what they return or raise, and its end."""

import asyncio
import threading

import pytest

from plait.worker.engine_thread import EngineThread


def test_calls_run_in_order_in_one_thread_of_their_own() -> None:
    async def run() -> None:
        ran: list[tuple[int, int]] = []
        async with EngineThread() as thread:
            calls = [
                thread.run(lambda number=number: ran.append((number, threading.get_ident())))
                for number in range(20)
            ]
            for call in calls:
                await call
        assert [number for number, _ in ran] == list(range(20))
        assert len({ident for _, ident in ran}) == 1 and ran[0][1] != threading.get_ident()

    asyncio.run(run())


def test_what_a_call_raises_comes_back_and_the_next_one_runs() -> None:
    def fail() -> None:
        raise ValueError("no such layer")

    async def run() -> None:
        async with EngineThread() as thread:
            with pytest.raises(ValueError, match="no such layer"):
                await thread.run(fail)
            assert await thread.run(lambda: 7) == 7

    asyncio.run(run())


def test_a_call_that_nobody_waits_for_is_left_out() -> None:
    async def run() -> None:
        ran: list[str] = []
        release = threading.Event()
        async with EngineThread() as thread:
            first = asyncio.ensure_future(thread.run(lambda: release.wait()))
            second = asyncio.ensure_future(thread.run(lambda: ran.append("second")))
            second.cancel()
            release.set()
            await first
            await thread.run(lambda: ran.append("third"))
        assert ran == ["third"]

    asyncio.run(run())


def test_leaving_waits_for_what_runs() -> None:
    async def run() -> None:
        done: list[bool] = []
        release = threading.Event()

        def work() -> None:
            release.wait()
            done.append(True)

        async with EngineThread() as thread:
            _ = thread.run(work)
            asyncio.get_running_loop().call_later(0.01, release.set)
        assert done == [True]

    asyncio.run(run())
