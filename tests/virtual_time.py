"""An event loop whose clock jumps to the next timer: hours of waiting pass in no time, and always the same way.

For coroutines that wait for timers and each other only; a socket would never become ready.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _NoWaiting(selectors.DefaultSelector):
    """Ready sockets are seen (the loop wakes itself by one), but time to wait for them is not spent."""

    asked_s: float | None = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.asked_s = timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._selecting = _NoWaiting()
        self._now_s = 0.0
        super().__init__(self._selecting)

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        waited_s = self._selecting.asked_s
        if waited_s is None:
            raise RuntimeError("everything waits, and no timer is set: a deadlock")
        self._now_s += waited_s


def run_virtual(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end on a virtual clock that starts at 0."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
