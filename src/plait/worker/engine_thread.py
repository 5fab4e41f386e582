"""How an engine's steps are run: in a thread of its own, or on the event loop where time is virtual."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

_Result = TypeVar("_Result")


class RunStep(Protocol):
    """Runs a call that computes, and waits for it; calls do not overlap."""

    def __call__(self, call: Callable[[], _Result], /) -> Awaitable[_Result]: ...


class EngineThread:
    """One thread, in which all of an engine's computing happens; enter it to start, leave it to stop."""

    async def __aenter__(self) -> Self:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="plait-engine")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._executor.shutdown)

    def run(self, call: Callable[[], _Result]) -> Awaitable[_Result]:
        """Run a call in the thread."""
        return asyncio.get_running_loop().run_in_executor(self._executor, call)


async def run_inline(call: Callable[[], Any]) -> Any:
    """Run a call on the event loop, in no time of its clock: for virtual time."""
    await asyncio.sleep(0)
    return call()
