"""How an engine's steps are run: in a thread of its own, or on the event loop where time is virtual."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

_Result = TypeVar("_Result")


class RunStep(Protocol):
    """Runs a call that computes, and waits for it; calls do not overlap."""

    def __call__(self, call: Callable[[], _Result], /) -> Awaitable[_Result]: ...


class EngineThread:
    """One thread, in which all of an engine's computing happens; enter it to start, leave it to stop.

    A step of a short span takes less than a `ThreadPoolExecutor` needs to hand it over with its two futures, their
    locks and callbacks; here there is one future, which the event loop alone touches.
    """

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._given: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="plait-engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given.put(None)
        await asyncio.to_thread(self._thread.join)

    def run(self, call: Callable[[], _Result]) -> Awaitable[_Result]:
        """Run a call in the thread, after those given before; one that nobody waits for any more is left out."""
        done: asyncio.Future[_Result] = self._loop.create_future()
        self._given.put((call, done))
        return done

    def _work(self) -> None:
        while (given := self._given.get()) is not None:
            call, done = given
            if done.cancelled():
                continue
            try:
                settle, outcome = _succeed, call()
            except BaseException as error:  # whoever waits gets it
                settle, outcome = _fail, error
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(settle, done, outcome)
            del given, call, done, outcome  # nothing is kept while it waits


def _succeed(done: "asyncio.Future[Any]", result: Any) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: "asyncio.Future[Any]", error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)


async def run_inline(call: Callable[[], Any]) -> Any:
    """Run a call on the event loop, in no time of its clock: for virtual time."""
    await asyncio.sleep(0)
    return call()
