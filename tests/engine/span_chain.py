"""A chain of span engines in one process, and the smallest gateway that can drive it."""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import plait.model
from plait.engine import EngineOptions, SpanEngine, SpanOutput, SpanSession
from plait.errors import NoCapacity, NotFound
from plait.ids import SessionId
from plait.scheduling import StepLimits
from plait.session import PositionLogprobs, SamplingParams

TINY = Path(plait.model.__file__).parent / "tiny"
TINY_BLOCKS = 6


def tiny_options(
    dtype: str, kv_cache_bytes: int = 2**20, swap_bytes: int = 0, **limits: object
) -> EngineOptions:
    """`tiny` on one thread, nothing kept on the disk."""
    return EngineOptions(
        folder=TINY,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        swap_bytes=swap_bytes,
        limits=replace(StepLimits(), **limits),
        prefix_caching=False,
        packed_cache=False,
        threads=1,
    )


@dataclass
class Asked:
    """A session as its gateway knows it: prompt and answer so far."""

    session: SpanSession
    token_ids: list[int]
    logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    ended: bool = False

    @property
    def answer(self) -> tuple[int, ...]:
        return tuple(self.token_ids[self.session.prompt_tokens :])


class SpanChain:
    """Hops, what is on its way between them, and the sessions that cross them."""

    def __init__(self, hops: Sequence[SpanEngine], eos_token_ids: Iterable[int] = (0, 4)) -> None:
        self.hops = list(hops)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.sent: list[deque[SpanOutput]] = [deque() for _ in hops]
        """What each hop has sent to the next and that has not arrived; that of the last goes to the gateway."""
        self.asked: dict[SessionId, Asked] = {}
        self.opened = 0
        self.rounds = 0
        self._come_out: dict[tuple[SessionId, int], int] = {}
        """Where the next output of a session must begin, by hop: every position comes out once."""

    def open(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        sample_index: int = 0,
        out: Sequence[int] = (),
    ) -> SessionId:
        """Open a session at every hop, the answer beginning with `out`; nothing is fed yet."""
        id = SessionId(f"{self.opened:032x}")
        assert sampling.max_tokens is not None
        session = SpanSession(
            id=id,
            max_tokens=len(prompt) + sampling.max_tokens,
            prompt_tokens=len(prompt),
            sampling=sampling,
            seed=sampling.seed or 0,
            sample_index=sample_index,
            arrived_unix_s=float(self.opened),
        )
        for place, hop in enumerate(self.hops):
            try:
                hop.open(session)
            except NoCapacity:
                for earlier in self.hops[:place]:
                    earlier.close(id)
                raise
        self.opened += 1
        self.asked[id] = Asked(session, [*prompt, *out])
        return id

    def feed(self, id: SessionId, start: int, drafts: Sequence[int] = ()) -> None:
        """Send the first hop all that is known from `start` on, and guesses."""
        token_ids = [*self.asked[id].token_ids[start:], *drafts]
        self.rounds += 1
        self._expect(id, 0, start)
        with suppress(NotFound):  # it had no room for it
            self.hops[0].feed(
                id, start, token_ids, None, sample_rows=1 + len(drafts), draft_tokens=len(drafts)
            )

    def rewind(self, id: SessionId, start: int) -> None:
        """Lose what is on its way, and let every hop forget what it has from `start` on."""
        self.forget_sent(id)
        for place, hop in enumerate(self.hops):
            hop.rewind(id, start)
            hop.check()
            self._expect(id, place, start)

    def _expect(self, id: SessionId, place: int, start: int) -> None:
        self._come_out[id, place] = min(self._come_out.get((id, place), 0), start)

    def close(self, id: SessionId) -> None:
        self.forget_sent(id)
        for place, hop in enumerate(self.hops):
            hop.close(id)
            self._come_out.pop((id, place), None)
        del self.asked[id]

    def forget_sent(self, id: SessionId) -> None:
        """Lose what is on its way."""
        for sent in self.sent:
            for output in [output for output in sent if output.id == id]:
                sent.remove(output)

    def step(self, place: int) -> None:
        """Let a hop take a step and send what came out."""
        hop = self.hops[place]
        outputs = hop.step()
        hop.check()
        for output in outputs:
            assert output.start == self._come_out[output.id, place]
            self._come_out[output.id, place] += len(output.token_ids)
            assert (output.hidden is None) == hop.decides
            assert hop.decides or output.hidden.shape == (len(output.token_ids), hop.spec.hidden)
            assert not output.sampled or hop.decides
        self.sent[place].extend(outputs)

    def arrive(self, place: int) -> list[SessionId]:
        """Deliver what a hop has sent; returns the sessions whose answers grew."""
        grown: list[SessionId] = []
        while self.sent[place]:
            output = self.sent[place].popleft()
            if output.id not in self.asked:
                continue
            if place + 1 == len(self.hops):
                if self._take(output):
                    grown.append(output.id)
                continue
            self._expect(output.id, place + 1, output.start)
            with suppress(NotFound):  # the next hop had no room for it
                self.hops[place + 1].feed(
                    output.id,
                    output.start,
                    output.token_ids,
                    output.hidden,
                    sample_rows=output.sample_rows,
                    draft_tokens=output.draft_tokens,
                )
        return grown

    def _take(self, output: SpanOutput) -> bool:
        asked = self.asked[output.id]
        before = len(asked.token_ids)
        position = output.start + len(output.token_ids) - output.sample_rows
        for place, token in enumerate(output.sampled):
            position += 1
            if asked.ended:
                break
            if position < len(asked.token_ids):
                assert asked.token_ids[position] == token.token_id, "a replay gave another token"
                continue
            assert position == len(asked.token_ids)
            asked.token_ids.append(token.token_id)
            asked.logprobs.append(token.logprobs)
            asked.ended = self._ends(asked, token.token_id) or (
                output.completes and place + 1 == len(output.sampled)
            )
        return len(asked.token_ids) > before

    def _ends(self, asked: Asked, token_id: int) -> bool:
        sampling = asked.session.sampling
        ending = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self.eos_token_ids
        )
        return token_id in ending or len(asked.token_ids) == asked.session.max_tokens

    def settle(self) -> None:
        """Step every hop, first to last, until nothing moves."""
        while any(hop.has_work for hop in self.hops):
            for place, hop in enumerate(self.hops):
                if hop.has_work:
                    self.step(place)
                self.arrive(place)

    def run(self, id: SessionId, guess: "Guess | None" = None) -> Asked:
        """Drive one session to its end, with guessed tokens if `guess` gives some."""
        asked = self.asked[id]
        start = 0
        while not asked.ended:
            room = asked.session.max_tokens - len(asked.token_ids) - 1
            drafts = guess(asked.token_ids)[:room] if guess is not None else ()
            self.feed(id, start, drafts)
            self.settle()
            start = len(asked.token_ids) - 1
        self.close(id)
        return asked


class Guess:
    """Drafts from an answer that is known beforehand: right up to the first of the places in `wrong`."""

    def __init__(self, tokens: Sequence[int], drafts: int, wrong: frozenset[int] = frozenset()) -> None:
        self.tokens, self.drafts, self.wrong = tokens, drafts, wrong

    def __call__(self, known: Sequence[int]) -> list[int]:
        ahead = self.tokens[len(known) : len(known) + self.drafts]
        return [token ^ (place in self.wrong) for place, token in enumerate(ahead)]
