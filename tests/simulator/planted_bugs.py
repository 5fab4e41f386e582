# pyright: reportPrivateUsage=false
"""Bugs that somebody could have written, put into the live code: trials must find each of them.

Each is a function that patches a class of the live system, and says in its docstring what was forgotten.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from plait.engine import SpanEngine
from plait.engine.span_session import Answer
from plait.errors import PeerLost
from plait.kvcache import KvBlockPool
from plait.routing import Router
from plait.session import ChainSession, Emit, HopSession
from plait.transport.connection import Connection
from plait.worker import SpanWorker, SwarmEngine

Plant = Callable[[pytest.MonkeyPatch], None]
"""Puts a bug in."""


def lost_wake_up(patch: pytest.MonkeyPatch) -> None:
    """A worker that sleeps is woken by the second thing to do, not by the first."""

    def command(self: Any, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if len(self._commands) > 1:
            self._wake.set()

    patch.setattr(SpanWorker, "_command", command)


def step_executed_twice(patch: pytest.MonkeyPatch) -> None:
    """A hop does not see that it had a step before."""
    right = HopSession.on_step

    def on_step(self: Any, sender: Any, step: Any, rows: Any) -> Any:
        self._last_number = min(self._last_number, step.number - 1)
        return right(self, sender, step, rows)

    patch.setattr(HopSession, "on_step", on_step)


def tokens_told_twice(patch: pytest.MonkeyPatch) -> None:
    """A gateway passes on the tokens of a message that comes again, as a retry without a number would."""
    right = ChainSession._on_tokens

    def on_tokens(self: Any, peer: Any, tokens: Any, now_s: float) -> Any:
        again = self.phase == "flowing" and tokens.number == self._tokens_number
        extra = [Emit(tokens.token_ids, tokens.reports, "")] if again else []
        return [*extra, *right(self, peer, tokens, now_s)]

    patch.setattr(ChainSession, "_on_tokens", on_tokens)


def kv_release_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Who frees three blocks or more frees one too few."""
    right = KvBlockPool.release

    def release(self: Any, kv_blocks: Any) -> None:
        right(self, kv_blocks[1:] if len(kv_blocks) > 2 else kv_blocks)

    patch.setattr(KvBlockPool, "release", release)


def block_freed_twice(patch: pytest.MonkeyPatch) -> None:
    """After a step that failed, the KV blocks of a session that was in it are put into the free list once more."""
    right = SpanEngine.abort_running

    def abort_running(self: Any) -> Any:
        tables = [list(live.pages) for live in self._sessions.values() if live.started]
        ended = right(self)
        for table in tables:
            self._inputs._pool._blank += table[:1]
        return ended

    patch.setattr(SpanEngine, "abort_running", abort_running)


def block_given_to_two(patch: pytest.MonkeyPatch) -> None:
    """A block that was handed out stays in the free list, if it was among five or more."""
    right = KvBlockPool.allocate

    def allocate(self: Any, kv_blocks: int) -> list[int]:
        taken = right(self, kv_blocks)
        if len(taken) > 4:
            self._blank.append(taken[-1])
        return taken

    patch.setattr(KvBlockPool, "allocate", allocate)


def session_left_in_engine(patch: pytest.MonkeyPatch) -> None:
    """A worker forgets to close a session in its engine, if a step runs at that moment."""
    right = SpanWorker._end_session

    def end_session(self: Any, live: Any) -> None:
        right(self, live)
        if self._computes:
            self._commands.pop()

    patch.setattr(SpanWorker, "_end_session", end_session)


def stale_route(patch: pytest.MonkeyPatch) -> None:
    """A route once found for some blocks is used again, whoever has been lost since."""
    right = Router.choose
    routes: dict[Any, dict[range, Any]] = {}

    def choose(self: Any, view: Any, blocks: range, wish: Any, **more: Any) -> Any:
        found = routes.setdefault(self, {})
        if blocks not in found:
            found[blocks] = right(self, view, blocks, wish, **more)
        return found[blocks]

    patch.setattr(Router, "choose", choose)


def replay_from_wrong_position(patch: pytest.MonkeyPatch) -> None:
    """A hop whose next one was replaced sends its outputs again, but from one position too late."""
    right = HopSession.on_resume

    def on_resume(self: Any, resume: Any) -> Any:
        late = min(resume.next_known + 1, max(self._computed, resume.next_known))
        return right(self, msgspec.structs.replace(resume, next_known=late))

    patch.setattr(HopSession, "on_resume", on_resume)


def old_epoch_heard(patch: pytest.MonkeyPatch) -> None:
    """What the engine computed before a fence is taken for what was asked after it."""
    right = SpanWorker._hand_out

    def hand_out(self: Any, output: Any) -> None:
        live = self._live.get(output.id)
        if live is not None:
            live.stale_step = 0
        right(self, output)

    patch.setattr(SpanWorker, "_hand_out", hand_out)


def orphans_kept(patch: pytest.MonkeyPatch) -> None:
    """Sessions whose gateway is gone are never ended."""

    async def expire(self: Any) -> None:
        await asyncio.Event().wait()

    patch.setattr(SpanWorker, "_expire", expire)


def silence_never_noticed(patch: pytest.MonkeyPatch) -> None:
    """Nobody is lost for saying nothing."""
    right = Connection.tick

    def tick(self: Any) -> None:
        try:
            right(self)
        except PeerLost:
            self._silent_ticks = 0

    patch.setattr(Connection, "tick", tick)


def seed_of_sampling_lost(patch: pytest.MonkeyPatch) -> None:
    """Randomness is keyed by how many tokens this hop has sampled, not by the position: a replacement draws others."""
    right = Answer.row
    drawn: dict[int, tuple[Any, int]] = {}  # by object; it is kept, so that no other gets its id

    def row(self: Any, token_ids: Any, position: int) -> Any:
        _, count = drawn.get(id(self), (self, 0))
        drawn[id(self)] = self, count + 1
        return replace(right(self, token_ids, position), position=self.session.prompt_tokens + count)

    patch.setattr(Answer, "row", row)


def gateway_keeps_sessions(patch: pytest.MonkeyPatch) -> None:
    """A session that has ended stays in its gateway's books."""

    def forget(self: Any, driver: Any) -> None:
        pass

    patch.setattr(SwarmEngine, "_forget", forget)


PLANTS: tuple[Plant, ...] = (
    lost_wake_up,
    step_executed_twice,
    tokens_told_twice,
    kv_release_forgotten,
    block_freed_twice,
    block_given_to_two,
    session_left_in_engine,
    stale_route,
    replay_from_wrong_position,
    old_epoch_heard,
    orphans_kept,
    silence_never_noticed,
    seed_of_sampling_lost,
    gateway_keeps_sessions,
)
