"""CPU time of parts of the data path: functions are wrapped, and each is charged what it does not spend in others."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_CALIBRATION_CALLS = 20_000


@dataclass(slots=True)
class _Frame:
    """A call under way, charged up to `since_s`."""

    part: str
    since_s: float


class PartClock:
    """Thread CPU seconds by part, exclusive of the parts inside it, less what the clock itself costs."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._calls: dict[str, int] = defaultdict(int)
        self._local = threading.local()
        self._inside_s = self._outside_s = 0.0
        self._calibrate()

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Charge calls of `owner.name` (a class's method, a module's function) to a part."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, charged to a part."""
        seconds, calls, local, now = self._seconds, self._calls, self._local, time.thread_time

        def run(*arguments: Any, **named: Any) -> Any:
            stack: list[_Frame] | None = getattr(local, "stack", None)
            if stack is None:
                stack = local.stack = []
            began_s = now()
            if stack:
                outer = stack[-1]
                seconds[outer.part] += began_s - outer.since_s
            frame = _Frame(part, began_s)
            stack.append(frame)
            try:
                return call(*arguments, **named)
            finally:
                ended_s = now()
                seconds[part] += ended_s - frame.since_s
                calls[part] += 1
                stack.pop()
                if stack:
                    stack[-1].since_s = ended_s

        return run

    def read(self) -> dict[str, float]:
        """Seconds of each part so far."""
        return {part: max(0.0, s - self._calls[part] * self._inside_s) for part, s in self._seconds.items()}

    @property
    def own_s(self) -> float:
        """What all the measuring has cost so far."""
        return sum(self._calls.values()) * (self._inside_s + self._outside_s)

    def _calibrate(self) -> None:
        def nothing() -> None:
            pass

        timed = self.timed("", nothing)
        before_s = time.thread_time()
        for _ in range(_CALIBRATION_CALLS):
            nothing()
        bare_s = time.thread_time() - before_s
        before_s = time.thread_time()
        for _ in range(_CALIBRATION_CALLS):
            timed()
        whole_s = (time.thread_time() - before_s - bare_s) / _CALIBRATION_CALLS
        self._inside_s = max(0.0, (self._seconds[""] - bare_s) / _CALIBRATION_CALLS)
        self._outside_s = max(0.0, whole_s - self._inside_s)
        self._seconds.clear()
        self._calls.clear()
