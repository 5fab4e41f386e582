# pyright: standard
"""A session on one span: what it was fed, what came out of it, and how its tokens are chosen where the model ends.

Nothing here knows of blocks, pages or other sessions; `SpanEngine` does.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plait.engine.constraints import Matcher
from plait.engine.sampling import SampledToken, SamplingRow, takes_best_token
from plait.ids import SessionId
from plait.session import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSession:
    """One sequence that will cross the span.

    `max_tokens` bounds prompt and answer together and must be the same at every hop (some models choose their rotary
    frequencies by it); `prompt_tokens` of them are the prompt. `sampling`, `seed` and `sample_index` matter to the
    span that ends the model. `blocks` are those that it crosses here, None all that there are; they end where they
    end, also if the worker has more. `arrived_unix_s`: when the request reached its gateway, by the gateway's clock;
    on every worker the earlier session goes first, and the smaller id among equals.
    """

    id: SessionId
    max_tokens: int
    prompt_tokens: int
    blocks: range | None = None
    sampling: SamplingParams | None = None
    seed: int = 0
    sample_index: int = 0
    arrived_unix_s: float = 0.0

    @property
    def order(self) -> int:
        """Smaller goes first; no two sessions have the same."""
        return int(self.arrived_unix_s * 1e6) << 128 | int(self.id, 16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpanOutput:
    """Positions from `start` on of one feed that ran; a feed comes out in order, in one piece or several.

    `hidden` [len(token_ids), hidden] is float32 on the CPU, owns its memory, and is None from the span that ends the
    model. The rows to be sampled are never cut: they come with the last piece, whose `sample_rows` and `draft_tokens`
    are the feed's (0 in those before), so that the hop after is fed with exactly this. `sampled` are their tokens:
    fewer than `sample_rows` where a draft was wrong. `completes`: with the last of them the session's constraint allows
    no more.
    """

    id: SessionId
    start: int
    token_ids: Sequence[int]
    hidden: Tensor | None
    sample_rows: int = 0
    draft_tokens: int = 0
    sampled: tuple[SampledToken, ...] = ()
    completes: bool = False


class Language:
    """Where an answer stands in its constraint's language, also after it went back."""

    def __init__(self, matcher: Matcher) -> None:
        self._start = matcher
        self._matcher = matcher.fork()
        self._accepted: list[int] = []

    def allowed(self, output_token_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """The tokens that may come after these, as a bit mask (`Matcher.allowed`)."""
        known = len(self._accepted)
        if list(output_token_ids[:known]) != self._accepted:
            self._matcher = self._start.fork()
            self._accepted, known = [], 0
        for token_id in output_token_ids[known:]:
            self._accept(token_id)
        return self._matcher.allowed()

    def take(self, token_id: int) -> bool:
        """Go on with the token that was drawn from `allowed`; whether nothing can follow it."""
        self._accept(token_id)
        return self._matcher.is_finished

    def _accept(self, token_id: int) -> None:
        self._matcher.accept(token_id)
        self._accepted.append(token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How the tokens of a session are chosen; `stop_token_ids` are all that end it."""

    session: SpanSession
    params: SamplingParams
    stop_token_ids: frozenset[int]
    language: Language | None

    def takes_best_token(self, position: int) -> bool:
        """Whether the tokens after this position are simply the most likely ones."""
        return takes_best_token(
            self.params,
            output_tokens=position + 1 - self.session.prompt_tokens,
            stop_token_ids=self.stop_token_ids,
            constrained=self.language is not None,
        )

    def row(self, token_ids: Sequence[int], position: int) -> SamplingRow:
        """What decides the token after the one at `position`, besides its logits; `token_ids` are all known ones."""
        prompt_tokens = self.session.prompt_tokens
        output = token_ids[prompt_tokens : position + 1]
        return SamplingRow(
            params=self.params,
            seed=self.session.seed & (2**64 - 1),
            position=position + 1,
            sample_index=self.session.sample_index,
            prompt_token_ids=token_ids[:prompt_tokens],
            output_token_ids=output,
            stop_token_ids=self.stop_token_ids,
            allowed=self.language.allowed(output) if self.language is not None else None,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Feed:
    """Inputs at positions from `start` to `end` that have not all come out.

    `held` are rows of its tail, the rows to be sampled, that ran before the others of it: [rows, hidden] each.
    """

    start: int
    end: int
    sample_rows: int
    draft_tokens: int
    held: list[Tensor] = field(default_factory=list[Tensor])
    sampled: list[SampledToken] = field(default_factory=list[SampledToken])
    stopped: bool = False
    completes: bool = False

    @property
    def sampled_from(self) -> int:
        """Position of the first row to be sampled."""
        return self.end - self.sample_rows

    @property
    def drafts_from(self) -> int:
        """Position of the first guessed token."""
        return self.end - self.draft_tokens


@dataclass(slots=True, eq=False)
class LiveSession:
    """A session between `SpanEngine.open` and `close`; the positions are those of span_engine.py's drawing."""

    session: SpanSession
    blocks: range
    answer: Answer | None
    pages: list[int] = field(default_factory=list[int])
    feeds: deque[Feed] = field(default_factory=deque[Feed])
    told: int = 0
    handled: int = 0
    started: bool = False

    def cut(self, start: int) -> int:
        """Forget the inputs from position `start` on; returns the position from which they have to run again.

        That is `start`, unless a part of a tail ran before it: what is left of that tail has to come out after all.
        """
        if start >= (self.feeds[-1].end if self.feeds else self.told):
            return start
        begun = self.handled > self.told and start < self.feeds[0].end
        first = min(start, self.told) if begun else start
        self.told = min(self.told, start)
        self.handled = self.told if begun else min(self.handled, start)
        while self.feeds and self.feeds[-1].start >= start:
            self.feeds.pop()
        if self.feeds and self.feeds[-1].end > start:
            self.feeds[-1] = Feed(start=self.feeds[-1].start, end=start, sample_rows=0, draft_tokens=0)
            if start <= self.told:
                self.feeds.pop()
        return first

    def due(self, end: int, known: Sequence[int]) -> Iterator["DueRows"]:
        """What is to be sampled once positions below `end` have run, by feed; `known` are the session's tokens."""
        if self.answer is None:
            return
        for feed in self.feeds:
            positions = range(max(self.handled, feed.sampled_from), min(end, feed.end))
            if positions and not feed.stopped:
                yield DueRows(self, self.answer, feed, positions, known)

    def come_out(self, start: int, end: int, known: Sequence[int], hidden: Tensor | None) -> list[SpanOutput]:
        """Note that positions from `start` to `end` ran, `hidden` being their rows; returns what can be told now.

        `known` are all tokens of the session. Rows that ran before, and were computed again, say nothing.
        """
        outputs: list[SpanOutput] = []
        while self.feeds and self.handled < end:
            feed = self.feeds[0]
            ran = min(end, feed.end)
            if hidden is not None:
                feed.held.append(hidden[self.handled - start : ran - start])
            self.handled = ran
            if ran == feed.end:
                self.feeds.popleft()
                outputs.append(
                    self._piece(
                        feed,
                        ran,
                        known,
                        sample_rows=feed.sample_rows,
                        draft_tokens=feed.draft_tokens,
                        sampled=tuple(feed.sampled),
                        completes=feed.completes,
                    )
                )
            elif (until := min(ran, feed.sampled_from)) > self.told:
                outputs.append(self._piece(feed, until, known))
        return outputs

    def _piece(self, feed: Feed, until: int, known: Sequence[int], **sampling: Any) -> SpanOutput:
        """What of a feed comes out up to position `until`."""
        hidden = None
        if feed.held:
            rows = torch.cat(feed.held)  # [handled - told, hidden], in memory of its own
            count = until - self.told
            hidden = rows if count == len(rows) else rows[:count].clone()
            feed.held = [rows[count:].clone()] if count < len(rows) else []
        start, self.told = self.told, until
        return SpanOutput(
            id=self.session.id, start=start, token_ids=tuple(known[start:until]), hidden=hidden, **sampling
        )


@dataclass(slots=True, eq=False)
class DueRows:
    """Rows of one feed in one forward pass that are to be sampled; `known` are all tokens of the session.

    The first of them is row `first_row` of the logits, unless the decoder found the `best` tokens of all itself: their
    ids and logits.
    """

    live: LiveSession
    answer: Answer
    feed: Feed
    positions: range
    known: Sequence[int]
    first_row: int = 0
    best: Sequence[tuple[int, float]] | None = None
