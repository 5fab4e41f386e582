"""One session of a gateway at work: its state machine, its timer, and what carries out its actions."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol, assert_never

from plait.errors import NoRoute, ServingError
from plait.ids import PeerId
from plait.session import (
    Ban,
    Begun,
    Cancelled,
    ChainSession,
    Emit,
    Ended,
    Fail,
    FindRoute,
    Routed,
    Send,
    SessionAction,
    SessionEvent,
    TimePassed,
    Unroutable,
)
from plait.wire import ChainHop, Message

log = logging.getLogger(__name__)


class FindHops(Protocol):
    """Looks for hops through a range of blocks.

    Raises:
        NoRoute: there are none now.
        ServingError: the session cannot go on.
    """

    def __call__(self, wanted: FindRoute, /) -> Coroutine[None, None, tuple[ChainHop, ...]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHooks:
    """What a session does to the world. `on_end` gets the error, if it did not end as it should."""

    post: Callable[[PeerId, Message], None]
    find_hops: FindHops
    on_ban: Callable[[Ban], None]
    on_tokens: Callable[[Emit], None]
    on_end: Callable[[ServingError | None], None]


class SessionDriver:
    """Runs a `ChainSession` on the event loop: events go in by `dispatch`, the session ends by `on_end` or `cancel`."""

    def __init__(self, session: ChainSession, hooks: SessionHooks) -> None:
        self.session = session
        self._hooks = hooks
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0
        self._searches: set[asyncio.Task[None]] = set()
        self._events: deque[SessionEvent] = deque()
        self._busy = False
        self._failure: ServingError | None = None
        self._cancelled = False

    def start(self) -> None:
        """Look for a chain and begin."""
        self.dispatch(Begun())

    def cancel(self) -> None:
        """Free all hops; nothing is told any more."""
        self._cancelled = True
        self.dispatch(Cancelled())

    def dispatch(self, event: SessionEvent) -> None:
        """Take an event; one that comes while another is carried out waits for its turn."""
        self._events.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._events:
                for action in self.session.on_event(self._events.popleft(), self._loop.time()):
                    self._carry_out(action)
        finally:
            self._busy = False
        self._set_timer()

    def _carry_out(self, action: SessionAction) -> None:
        match action:
            case Send(peer, message):
                self._hooks.post(peer, message)
            case FindRoute():
                search = self._loop.create_task(self._search(action))
                self._searches.add(search)
                search.add_done_callback(self._searches.discard)
            case Emit():
                if not self._cancelled:
                    self._hooks.on_tokens(action)
            case Ban():
                self._hooks.on_ban(action)
            case Fail(error):
                self._end(error)
            case Ended():
                self._end(self._failure)
            case _:
                assert_never(action)

    async def _search(self, wanted: FindRoute) -> None:
        try:
            hops = await self._hooks.find_hops(wanted)
        except NoRoute as error:
            self.dispatch(Unroutable(wanted.blocks, error))
        except ServingError as error:
            self._fail(error)
        except Exception as error:
            log.exception("session=%s: no route could be worked out", self.session.id)
            self._fail(ServingError(f"no route could be worked out: {type(error).__name__}: {error}"))
        else:
            self.dispatch(Routed(wanted.blocks, hops))

    def _fail(self, error: ServingError) -> None:
        self._failure = error
        self.dispatch(Cancelled())

    def _end(self, error: ServingError | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for search in self._searches:
            search.cancel()
        if not self._cancelled:
            self._hooks.on_end(error)

    def _set_timer(self) -> None:
        """One timer, put off when it fires too early: deadlines move with every token."""
        if self.session.phase == "ended":
            return
        deadline_s = self.session.deadline_s
        if self._timer is None or deadline_s < self._timer_at_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at_s = deadline_s
            self._timer = self._loop.call_at(deadline_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._loop.time() >= self.session.deadline_s:
            self.dispatch(TimePassed())
        else:
            self._set_timer()
