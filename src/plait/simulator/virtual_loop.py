# pyright: reportPrivateUsage=false
"""An asyncio event loop on a virtual clock: hours of waiting pass in no time, and always the same way.

When nothing is ready the clock jumps to the next timer. There are no sockets, no threads and no executor; what would
need them fails. Two runs of one program are the same, event for event, if it takes its time from the loop, its
randomness from seeds and no order from the addresses of objects.

`Process` is a machine's process on this loop. Everything that starts in it belongs to it: its tasks, and the callbacks
and timers that they set, told apart by their context. It can be stopped as SIGSTOP does (nothing of it runs, what
comes due waits; `go_on` as SIGCONT) and killed as SIGKILL does (nothing of it ever runs again: no farewell, no
`finally`). Both take effect between two events of the loop, as signals do between two moments of a real process.

A program that can never go on is named instead of hanging: `Deadlock` if everything waits and no timer is set,
`Livelock` if the clock does not move although events keep coming.
"""

import asyncio
import contextvars
import heapq
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

Result = TypeVar("Result")

MAX_EVENTS_AT_ONCE = 100_000
"""At one instant: far more than any program here needs (simulation landscape, section 9)."""
_NAMED_TASKS = 12


class Deadlock(RuntimeError):
    """Everything waits for something that nothing will ever cause."""


class Livelock(RuntimeError):
    """Events keep coming, and the clock stands still."""


class Process:
    """What runs in it can be stopped as a whole; made by `VirtualLoop.process`."""

    def __init__(self, loop: "VirtualLoop", name: str) -> None:
        self.name = name
        self.stopped = False
        self.killed = False
        self._loop = loop
        self._held: deque[asyncio.Handle] = deque()
        self._context = contextvars.copy_context()
        self._context.run(_PROCESS.set, self)

    def start(self, work: Coroutine[Any, Any, Result], *, name: str | None = None) -> "asyncio.Task[Result]":
        """Run a coroutine in this process; whoever waits for the task from outside waits while it is stopped."""
        return self._loop.create_task(work, name=name, context=self._context.copy())

    def stop(self) -> None:
        """Run nothing of it until `go_on`; its timers come due, and wait."""
        self.stopped = True

    def go_on(self) -> None:
        """Run what has waited, in the order in which it came due; a killed one stays dead."""
        if not self.killed:
            self._release()

    def kill(self) -> None:
        """Run nothing of it ever again."""
        self.stopped = self.killed = True

    def _hold(self, handle: asyncio.Handle) -> None:
        self._held.append(handle)

    def _release(self) -> None:
        self.stopped = False
        self._loop._ready.extend(self._held)
        self._held.clear()


_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class VirtualLoop(asyncio.BaseEventLoop):
    """Starts at time 0. `events` counts what has run: two runs that are the same have the same count.

    `after_event` is called after each of them, with the process that it ran in.
    """

    _ready: "deque[asyncio.Handle]"
    _scheduled: list[asyncio.TimerHandle]
    _now_s: float

    def __init__(self) -> None:
        super().__init__()
        self.events = 0
        self.after_event: Callable[[Process | None], None] | None = None
        self._now_s = 0.0
        self._buried = False
        self._events_at_once = 0
        self._processes: list[Process] = []
        self._process_of: WeakKeyDictionary[asyncio.Task[Any], Process] = WeakKeyDictionary()

    def time(self) -> float:
        """Seconds since the loop was made, virtual."""
        return self._now_s

    def process(self, name: str) -> Process:
        """A new process."""
        process = Process(self, name)
        self._processes.append(process)
        return process

    def bury(self) -> None:
        """Let what is left of killed and stopped processes run, so that it can be cancelled: for the very end.

        Tasks are cancelled in no certain order, so what runs from here on is no event any more.
        """
        self._buried = True
        for process in self._processes:
            process._release()

    def unfinished(self, process: Process | None) -> "list[asyncio.Task[Any]]":
        """Tasks of a process (None: of none) that are not done, in the order of their names."""
        tasks = [task for task in asyncio.all_tasks(self) if self._process_of.get(task) is process]
        return sorted(tasks, key=place_of)

    def create_task(
        self, coro: Any, *, name: object = None, context: contextvars.Context | None = None
    ) -> "asyncio.Task[Any]":
        task = super().create_task(coro, name=name, context=context)
        process = _PROCESS.get() if context is None else context.get(_PROCESS)
        if process is not None:
            self._process_of[task] = process
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> NoReturn:
        raise RuntimeError(f"{func!r} was to run in a thread, and there are none on a virtual clock")

    # -- what asyncio.BaseEventLoop asks of its children ---------------------------------------------------

    def _run_once(self) -> None:
        """Run what is ready; if nothing is, move the clock to the next timer and run what is due then."""
        ready, scheduled = self._ready, self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise Deadlock(f"everything waits, and no timer is set: {self._waiting()}")
            if scheduled[0].when() > self._now_s:
                self._now_s = scheduled[0].when()
                self._events_at_once = 0
        while scheduled and scheduled[0].when() <= self._now_s:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_PROCESS)
            if process is not None and process.stopped:
                process._hold(handle)
                continue
            self.events += not self._buried
            self._events_at_once += 1
            handle._run()
            if self.after_event is not None and not self._buried:
                self.after_event(process)
        if self._events_at_once > MAX_EVENTS_AT_ONCE:
            self._events_at_once = 0
            busiest = Counter(map(_named, ready)).most_common(3)
            raise Livelock(
                f"more than {MAX_EVENTS_AT_ONCE} events at {self._now_s} s; what goes round: "
                + ", ".join(f"{name} ({count} times)" for name, count in busiest)
            )

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # it is dropped when its time comes

    def _write_to_self(self) -> None:
        pass  # nobody waits in a selector

    def _waiting(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=place_of)
        named = [place_of(task) for task in tasks[:_NAMED_TASKS]]
        if len(tasks) > len(named):
            named.append(f"and {len(tasks) - len(named)} more")
        return "; ".join(named)


def run_virtual(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end on a virtual clock that starts at 0.

    Raises:
        Deadlock: it waits, and nothing else goes on.
        Livelock: it keeps the loop busy without end at one instant.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        try:
            return runner.run(work)
        finally:
            loop = runner.get_loop()
            assert isinstance(loop, VirtualLoop)
            loop.bury()


def place_of(task: "asyncio.Task[Any]") -> str:
    """What a task is and where it waits."""
    stack = task.get_stack(limit=1)
    place = f" at {stack[0].f_code.co_filename.rpartition('/')[2]}:{stack[0].f_lineno}" if stack else ""
    return f"{getattr(task.get_coro(), '__qualname__', task.get_name())}{place}"


def _named(handle: asyncio.Handle) -> str:
    callback = handle._callback  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return place_of(owner)  # pyright: ignore[reportUnknownArgumentType]
    return getattr(callback, "__qualname__", repr(callback))  # pyright: ignore[reportUnknownArgumentType]
