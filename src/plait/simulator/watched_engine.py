# pyright: standard
"""A span engine that is watched: what it computes, how often, and that nobody touches it meanwhile."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from plait.engine import Matcher, SpanEngine, SpanLoad, SpanOutput, SpanSession
from plait.ids import SessionId


class WatchedSpanEngine(SpanEngine):
    """The real engine; `violate` is told what should never be.

    A step is `computing` from its call until whoever runs it says that it is over: on a virtual clock it takes its time
    after the call, and where it runs in a thread nobody may touch the engine in that time. `epochs` is the latest epoch
    that its worker was told of each session. `computed_tokens`: positions that came out.

    `check` can be called after every event: it costs nothing while nobody has asked the engine to do anything.
    """

    violate: Callable[[str], None] = staticmethod(lambda text: None)  # type: ignore[assignment]

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.computing = False
        self._touched = True
        self.epochs: dict[SessionId, int] = {}
        self.computed_tokens = 0
        self._histories: dict[SessionId, list[int]] = {}
        self._executed: Counter[tuple[SessionId, int, int, int]] = Counter()

    def open(self, session: SpanSession, *, matcher: Matcher | None = None) -> None:
        self._touch("open a session")
        super().open(session, matcher=matcher)
        self._histories[session.id] = []

    def feed(
        self,
        id: SessionId,
        start: int,
        token_ids: Sequence[int],
        hidden: Tensor | None,
        *,
        sample_rows: int,
        draft_tokens: int = 0,
    ) -> None:
        self._touch("take inputs")
        super().feed(id, start, token_ids, hidden, sample_rows=sample_rows, draft_tokens=draft_tokens)
        self._histories[id][start:] = token_ids

    def rewind(self, id: SessionId, start: int) -> None:
        self._touch("go back")
        super().rewind(id, start)

    def close(self, id: SessionId) -> None:
        self._touch("close a session")
        super().close(id)

    def load(self) -> SpanLoad:
        self._touch("tell its load")
        return super().load()

    def step(self) -> list[SpanOutput]:
        self._touch("step")
        outputs = super().step()
        for output in outputs:
            self._came_out(output)
        return outputs

    def abort_running(self) -> list[SessionId]:
        self._touch("end what it runs")
        return super().abort_running()

    def check(self) -> None:
        if self._touched:
            super().check()
            self._touched = False

    def _touch(self, what: str) -> None:
        self._touched = True
        if self.computing:
            self.violate(f"the engine was asked to {what} while it computed")

    def _came_out(self, output: SpanOutput) -> None:
        epoch, history = self.epochs.get(output.id, 0), self._histories[output.id]
        for position in range(output.start, output.start + len(output.token_ids)):
            prefix = hash(tuple(history[: position + 1]))
            self.computed_tokens += 1
            self._executed[output.id, epoch, position, prefix] += 1
            if self._executed[output.id, epoch, position, prefix] > 1:
                self.violate(f"session {output.id[:6]}: position {position} ran twice in epoch {epoch}")
