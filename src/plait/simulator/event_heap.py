"""A heap of events on a virtual clock: what happens next, in one order on every machine.

Time is a whole number of nanoseconds. Events at the same instant go by kind, completions first, scheduling last, and
then by the order in which they were pushed; so nothing depends on hashes, addresses or rounding that adds up.

An event is an action and the name of whom it concerns. Each is counted, and its line (time, kind, name) goes into a
digest: equal digests mean equal runs. What an event breaks is reported with its number and the seed, which are all it
takes to see it again (`until_event`).

A run that can never go on is named: `Livelock` if the clock stands still while events keep coming (here), `Deadlock` if
work is left and nothing will ever happen to it (by whoever knows of the work).
"""

import heapq
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from hashlib import blake2b
from typing import Any

from plait.errors import BadSetup
from plait.simulator.virtual_loop import MAX_EVENTS_AT_ONCE, Livelock

NS_PER_S = 1_000_000_000
_FOREVER_S = 1e10
_DIGEST_LINES = 256
_REMEMBERED_LINES = 20


class EventKind(IntEnum):
    """What an event is; at one instant the lower goes first."""

    DONE = 0
    """A step has run."""
    DELIVERED = 1
    """A message has arrived."""
    FAULT = 2
    """Something breaks or is mended."""
    NOTICED = 3
    """Somebody finds out, or has waited long enough."""
    ARRIVAL = 4
    """A client asks."""
    SCHEDULE = 5
    """A machine may begin a step."""
    TICK = 6
    """What happens every so often and causes nothing by itself."""


class EventFailed(RuntimeError):
    """An event broke an invariant; the message says which event of which seed, and the cause is attached."""


class EventHeap:
    """The clock and what is to come."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now_ns = 0
        self.events = 0
        self._heap: list[tuple[int, int, int, str, Callable[[Any], None], Any]] = []
        self._pushed = 0
        self._ticks = 0
        self._at_once = 0
        self._latest: tuple[int, str] = EventKind.TICK, "the start"
        self._hash = blake2b(digest_size=16)
        self._unhashed: list[str] = []
        self._lines: deque[str] = deque(maxlen=_REMEMBERED_LINES)

    @property
    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self.now_ns / NS_PER_S

    @property
    def idle(self) -> bool:
        """Nothing is to come but ticks."""
        return len(self._heap) == self._ticks

    def at(self, time_ns: int, kind: EventKind, name: str, action: Callable[[Any], None], what: Any) -> None:
        """Do `action(what)` then; not before now."""
        assert time_ns >= self.now_ns, f"{kind.name} of {name!r} was pushed into the past"
        heapq.heappush(self._heap, (time_ns, kind, self._pushed, name, action, what))
        self._pushed += 1
        if kind == EventKind.TICK:
            self._ticks += 1

    def after(
        self, delay_s: float, kind: EventKind, name: str, action: Callable[[Any], None], what: Any
    ) -> None:
        """Do `action(what)` in so many seconds."""
        self.at(self.now_ns + ns_of(delay_s), kind, name, action, what)

    def step(self) -> None:
        """Let the next event happen.

        Raises:
            EventFailed: an assertion did not hold.
            Livelock: the clock stands still.
        """
        time_ns, kind, _, name, action, what = heapq.heappop(self._heap)
        if time_ns > self.now_ns:
            self.now_ns = time_ns
            self._at_once = 0
        self.events += 1
        self._at_once += 1
        self._note(f"{time_ns} {kind:d} {name}\n")
        if kind == EventKind.TICK:
            self._ticks -= 1
        if self._at_once > MAX_EVENTS_AT_ONCE:
            raise Livelock(
                f"{self._at_once} events at {self.now_s:.9f} s and the clock stands still; seed {self.seed}, "
                f"event {self.events}; the latest:\n{self.recent()}"
            )
        self._latest = kind, name
        self.blame(action, what)

    def blame(self, action: Callable[..., None], *what: Any) -> None:
        """Do something at once; what it breaks, or finds broken, is the latest event's fault.

        Raises:
            EventFailed: an assertion did not hold.
        """
        try:
            action(*what)
        except AssertionError as error:
            kind, name = self._latest
            raise EventFailed(
                f"seed {self.seed}, event {self.events} ({EventKind(kind).name.lower()} of {name!r} at "
                f"{self.now_s:.9f} s): {error or 'an invariant does not hold'}; run the same scenario until that "
                "event to see it again"
            ) from error

    def digest(self) -> str:
        """Of all events so far, in hexadecimal."""
        self._flush()
        return self._hash.hexdigest()

    def recent(self) -> str:
        """The latest events, a line each: seconds, kind, name."""
        self._flush()
        split = (line.split(" ", 2) for line in self._lines)
        return "\n".join(
            f"{int(time_ns) / NS_PER_S:.9f} {EventKind(int(kind)).name.lower()} {name.strip()}"
            for time_ns, kind, name in split
        )

    def _note(self, line: str) -> None:
        # Hashing many lines at once costs a tenth of hashing each.
        self._unhashed.append(line)
        if len(self._unhashed) == _DIGEST_LINES:
            self._flush()

    def _flush(self) -> None:
        self._lines.extend(self._unhashed[-_REMEMBERED_LINES:])
        self._hash.update("".join(self._unhashed).encode())
        self._unhashed.clear()


def ns_of(seconds: float) -> int:
    """Seconds as whole nanoseconds.

    Raises:
        BadSetup: more than centuries: some rate, time or cost is not what was meant.
    """
    if not seconds < _FOREVER_S:
        raise BadSetup(
            f"a run in which something takes {seconds:g} s never ends; look for a rate, a duration or a cost that is "
            "not what was meant"
        )
    return round(seconds * NS_PER_S)
