"""One session on one hop of its chain: messages and outputs in, messages and inputs for the engine out; no I/O.

Theory. A session is a row of positions. At a hop each of them passes four marks, which only ever grow unless a step
or a resumption sets them back:

    start ≤ sent ≤ computed ≤ fed ≤ known
            │      │          │     └ inputs that arrived
            │      │          └ inputs given to the engine
            │      └ inputs whose outputs came out of it
            └ outputs that went to the next hop

A hop feeds its engine no further than one slice ahead of what is computed, so that a long prompt flows through the
chain in slices, and no further than one window ahead of what the next hop has taken, so that nobody is flooded. The
rows of one sampling step travel together, because only the last hop can say how many of them count.

Outputs are kept after they were sent: a replacement of the next hop is replayed from there. A fence stops the session
(nothing goes out, nothing is fed, what was fed and did not run is forgotten) until `Resume` says where it goes on;
until then messages of the new epoch wait.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.ids import PeerId, SessionId
from plait.session.hop_actions import CutOff, Feed, Forget, Forward, HopAction, Rows, Tell, Unreadable
from plait.session.prompt_lookup import PromptLookup
from plait.session.row_buffer import RowBuffer
from plait.wire import (
    MAX_DRAFT_TOKENS,
    ChainHop,
    Fault,
    FaultCode,
    Fence,
    Fenced,
    FinishCode,
    OpenSession,
    Resume,
    Step,
    Taken,
    TokenReport,
    Tokens,
    reason_text,
)

# Long enough for full speed on every device we know, short enough for a prompt to be on several hops at once.
SLICE_TOKENS = 512
WINDOW_TOKENS = 2048
# Between a fence and its resumption only a predecessor that was resumed a little earlier can send anything.
MAX_WAITING_MESSAGES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HopFacts:
    """What a hop is told of its model: rows of `hidden_values` go from hop to hop, token ids are below `vocab_tokens`.

    `message_tokens`: positions in one message, such that its tensors stay within what a link accepts.
    """

    hidden_values: int
    vocab_tokens: int
    message_tokens: int


@dataclass(frozen=True, slots=True)
class SampledRow:
    """The token sampled after one position."""

    token_id: int
    report: TokenReport | None


class HopSession:
    """The state of one session at one hop; `gateway` opened it."""

    def __init__(self, opening: OpenSession, *, own: PeerId, gateway: PeerId, facts: HopFacts) -> None:
        self.id: SessionId = opening.session
        self.gateway = gateway
        self.epoch = opening.epoch
        self.held = opening.held
        self.kept = RowBuffer()
        self._opening = opening
        self._own = own
        self._facts = facts
        self._hops = opening.hops
        self._index = opening.index
        self._broken = False
        self._last_number = 0  # of the hop before, and of the last hop
        self._last_tokens_number = 0
        self._step_number = 0  # own
        self._tokens_number = 0
        self._inputs: list[int] = []
        self._pending: deque[Rows] = deque()  # of inputs not fed yet
        self._fed = 0
        self._computed = 0
        self._sent = 0
        self._most_sent = 0  # in this epoch
        self._taken_by_next = 0
        self._taken_told = 0
        self._sample_from = 0  # the positions [_sample_from, _sample_to) are to be sampled
        self._sample_to = 0
        self._drafts = 0
        self._tokens: list[int] = []  # at the first hop: what is certain, without guesses
        self._all_tokens = opening.prompt_tokens  # what it will have when the gateway has sent all its steps
        self._early_tokens: tuple[PeerId, Tokens] | None = None
        self._guessed = 0
        self._lookup = PromptLookup(opening.draft_tokens)
        self._waiting: list[tuple[PeerId, Step, Rows | Unreadable | None]] = []

    # -- what it is --------------------------------------------------------------------------------------

    @property
    def first(self) -> bool:
        """Whether it takes token ids, not hidden states."""
        return self._index == 0

    @property
    def last(self) -> bool:
        """Whether it samples."""
        return self._index == len(self._hops) - 1

    @property
    def peers(self) -> frozenset[PeerId]:
        """All who take part."""
        return frozenset((self.gateway, *(hop.peer for hop in self._hops)))

    @property
    def before(self) -> PeerId:
        """Who sends its inputs."""
        return self.gateway if self.first else self._hops[self._index - 1].peer

    @property
    def next_hop(self) -> ChainHop | None:
        return None if self.last else self._hops[self._index + 1]

    @property
    def computed_tokens(self) -> int:
        """Positions whose outputs have come out of the engine."""
        return self._computed

    def check(self) -> None:
        """Assert that its marks are in order, and that what it keeps is what lies between them."""
        known = len(self._inputs)
        assert self._computed <= self._fed <= known <= self._opening.max_tokens
        assert self.last or self.kept.end == self._computed, (
            f"outputs are kept up to {self.kept.end}, and {self._computed} are computed"
        )
        assert self.first or sum(map(len, self._pending)) == known - self._fed

    # -- messages ----------------------------------------------------------------------------------------

    def on_step(self, sender: PeerId, step: Step, rows: Rows | Unreadable | None) -> list[HopAction]:
        """Take inputs from the hop before (the gateway, at the first hop), with its hidden states [tokens, hidden]."""
        if step.epoch != self.epoch or self._broken:
            return []
        if not self.held and sender != self.before:
            return [CutOff(sender, "it sent a step of a session in which it is not the hop before")]
        if self.held:
            if len(self._waiting) >= MAX_WAITING_MESSAGES:
                return [
                    CutOff(
                        sender, f"it sent more than {MAX_WAITING_MESSAGES} steps to a session that is held"
                    )
                ]
            self._waiting.append((sender, step, rows))
            return []
        if step.number <= self._last_number:
            return []
        if step.number != self._last_number + 1:
            return self._fault(sender, "gap", f"step {step.number} came after step {self._last_number}")
        wrong = self._wrong_step(step, rows)
        if wrong or isinstance(rows, Unreadable):
            return self.accuse(sender, wrong)
        self._last_number = step.number
        self._take_inputs(step.start, step.token_ids, rows, step.sample_rows, step.draft_tokens)
        actions = self._feed()
        if self.first:
            self._tokens = list(self._inputs)
            actions += self._take_early_tokens()
        return actions

    def on_tokens(self, sender: PeerId, tokens: Tokens) -> list[HopAction]:
        """At the first hop: the last one has sampled, so the next step begins."""
        if tokens.epoch != self.epoch or self._broken:
            return []
        if self.held:
            self._early_tokens = sender, tokens
            return []
        if not self.first or sender != self._hops[-1].peer:
            return [CutOff(sender, "it sent tokens of a session in which it is not the last hop")]
        if tokens.number <= self._last_tokens_number:
            return []
        if tokens.number != self._last_tokens_number + 1:
            return self._fault(sender, "gap", f"tokens {tokens.number} came after {self._last_tokens_number}")
        known_tokens = len(self._tokens)
        if known_tokens < tokens.position == self._all_tokens:
            # Hops behind a replaced one sample the next token while this one still gets the old ones.
            self._early_tokens = sender, tokens
            return []
        room_tokens = self._opening.max_tokens - known_tokens
        if (
            tokens.position != known_tokens
            or (self._guessed and self._computed < len(self._inputs))
            or len(tokens.token_ids) > min(self._guessed + 1, room_tokens)
            or max(tokens.token_ids) >= self._facts.vocab_tokens
        ):
            return self.accuse(
                sender,
                f"it sent tokens for position {tokens.position} of a session with {known_tokens} tokens",
            )
        self._last_tokens_number = tokens.number
        if self._guessed:
            self._lookup.learn(self._guessed, len(tokens.token_ids) - 1)
        self._tokens += tokens.token_ids
        if tokens.finished:
            return []
        room_tokens -= len(tokens.token_ids)
        guess = self._lookup.guess(self._tokens, min(room_tokens - 1, MAX_DRAFT_TOKENS))
        self._guessed = len(guess)
        self._take_inputs(
            len(self._tokens) - 1, (self._tokens[-1], *guess), None, 1 + self._guessed, self._guessed
        )
        return self._feed()

    def _take_early_tokens(self) -> list[HopAction]:
        early, self._early_tokens = self._early_tokens, None
        return self.on_tokens(*early) if early is not None else []

    def on_taken(self, sender: PeerId, taken: Taken) -> list[HopAction]:
        """The next hop has computed what it was sent: more may follow."""
        following = self.next_hop
        if taken.epoch != self.epoch or self.held or self._broken or following is None:
            return []
        if sender != following.peer or taken.known > self._most_sent:
            return [CutOff(sender, "it took what it was not sent")]
        self._taken_by_next = max(self._taken_by_next, min(taken.known, self._sent))
        return self._send() + self._feed()

    def on_fence(self, fence: Fence) -> list[HopAction]:
        """Stop, and tell the gateway what is known here of its `tokens` tokens."""
        if fence.epoch <= self.epoch:
            return []
        self._begin_epoch(fence.epoch)
        self.held = True
        known = self._computed
        if known >= fence.tokens:
            right = fence.tokens and self._inputs[fence.tokens - 1] == fence.last_token_id
            known = fence.tokens if right else max(0, fence.tokens - 1)
        forget: list[HopAction] = [Forget(known)] if known < self._fed else []
        self._set_known(known)
        return [*forget, Tell(self.gateway, Fenced(self.id, self.epoch, known, min(self.kept.start, known)))]

    def on_resume(self, resume: Resume) -> list[HopAction]:
        """Go on, perhaps in another place of another chain."""
        if resume.epoch != self.epoch or not self.held:
            return []
        hops, index = resume.hops, resume.index
        own = self._hops[self._index]
        if index >= len(hops) or hops[index] != own or resume.own_known > self._computed:
            return self.accuse(self.gateway, "it resumes a session in a place that this hop does not have")
        self._hops, self._index = hops, index
        forget: list[HopAction] = [Forget(resume.own_known)] if resume.own_known < self._fed else []
        self._set_known(resume.own_known)
        if not self.last and self.kept.start > resume.next_known and self._computed > resume.next_known:
            return self._fault(
                self._own, "gap", f"outputs from {resume.next_known} on are not kept here any more"
            )
        self.held = False
        self._sent = self._most_sent = self._taken_by_next = resume.next_known
        self._taken_told = resume.own_known
        self._sample_from, self._sample_to, self._drafts = max(0, resume.tokens - 1), resume.tokens, 0
        self._guessed = 0
        self._all_tokens = resume.tokens
        if self.first:
            self._tokens = list(self._inputs)
            self._lookup = PromptLookup(self._opening.draft_tokens)
        waiting, self._waiting = self._waiting, []
        actions = forget + self._send()
        for sender, step, rows in waiting:
            actions += self.on_step(sender, step, rows)
        return actions + self._take_early_tokens()

    def on_lost(self, peer: PeerId) -> list[HopAction]:
        """A peer cannot be reached any more. What comes out of the last hop goes to the first."""
        following = self.next_hop or self._hops[0]
        if self.held or self._broken or peer == self._own or peer != following.peer:
            return []
        return self._fault(peer, "unreachable", "the next hop cannot be reached")

    def accuse(self, peer: PeerId, reason: str) -> list[HopAction]:
        """A peer sent what cannot be: cut it off, and let the gateway find another chain."""
        return [CutOff(peer, reason), *self._fault(peer, "misbehaved", reason)]

    def engine_failed(self, code: FaultCode, reason: str) -> list[HopAction]:
        """This hop's own engine could not go on with it, and has forgotten it."""
        return self._fault(self._own, code, reason)

    # -- the engine --------------------------------------------------------------------------------------

    def on_output(
        self,
        start: int,
        tokens: int,
        rows: Rows | None,
        sampled: Sequence[SampledRow],
        *,
        completes: bool = False,
    ) -> list[HopAction]:
        """A slice was computed: rows [tokens, hidden] for the next hop, or what was sampled at the last one.

        `completes`: the answer's constraint allows nothing after these samples.
        """
        if self.held or self._broken:
            return []
        assert start == self._computed and start + tokens <= self._fed, (
            "the engine runs what it was fed, in order"
        )
        self._computed = start + tokens
        actions: list[HopAction] = []
        if not self.last:
            assert rows is not None and len(rows) == tokens
            self.kept.append(rows)
            actions += self._send()
        if not self.first and self._computed - self._taken_told >= WINDOW_TOKENS // 4:
            self._taken_told = self._computed
            actions.append(Tell(self.before, Taken(self.id, self.epoch, self._computed)))
        if self.last and sampled:
            actions += self._tell_tokens(sampled, completes)
        return actions + self._feed()

    def forget_sent(self) -> None:
        """Give the memory of outputs back that the next hop has; if it is lost, they are computed again."""
        self.kept.forget_before(min(self._sent, self._computed))

    # -- inside ------------------------------------------------------------------------------------------

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._broken = False
        self._last_number = self._last_tokens_number = 0
        self._step_number = self._tokens_number = 0
        self._waiting.clear()
        self._early_tokens = None

    def _set_known(self, known: int) -> None:
        """Know this many positions, all computed."""
        assert known <= self._computed
        del self._inputs[known:]
        self._pending.clear()
        self._fed = self._computed = known
        self._sent = min(self._sent, known)
        self._taken_by_next = min(self._taken_by_next, known)
        self._taken_told = min(self._taken_told, known)
        if not self.last:
            self.kept.cut(known)

    def _fault(self, peer: PeerId, code: FaultCode, reason: str) -> list[HopAction]:
        self._broken = True
        return [Tell(self.gateway, Fault(self.id, self.epoch, peer, code, reason_text(reason)))]

    def _wrong_step(self, step: Step, rows: Rows | Unreadable | None) -> str:
        """Why a step cannot be; "" if it can."""
        if isinstance(rows, Unreadable):
            return rows.reason
        tokens = len(step.token_ids)
        if step.start > len(self._inputs) or step.start + tokens > self._opening.max_tokens:
            return (
                f"it sent inputs for positions {step.start}:{step.start + tokens} of a session that has "
                f"{len(self._inputs)} and may have {self._opening.max_tokens}"
            )
        if max(step.token_ids) >= self._facts.vocab_tokens:
            return f"it sent token {max(step.token_ids)}; the vocabulary has {self._facts.vocab_tokens}"
        if step.sample_rows > tokens or (step.draft_tokens and step.draft_tokens != step.sample_rows - 1):
            return (
                f"it asked for {step.sample_rows} samples and {step.draft_tokens} guesses of {tokens} inputs"
            )
        if (rows is None) != self.first or (
            rows is not None and rows.shape != (tokens, self._facts.hidden_values)
        ):
            return f"it sent hidden states {None if rows is None else rows.shape} for {tokens} inputs"
        # Only guesses are ever taken back, and only after all of them were computed.
        taken_back = len(self._inputs) - step.start
        if taken_back and (self.first or self._computed < len(self._inputs) or taken_back > MAX_DRAFT_TOKENS):
            return (
                f"it took back {taken_back} of {len(self._inputs)} inputs, {self._computed} of them computed"
            )
        return ""

    def _take_inputs(
        self, start: int, token_ids: tuple[int, ...], rows: Rows | None, sample_rows: int, draft_tokens: int
    ) -> None:
        if start < len(self._inputs):
            self._set_known(start)
        self._inputs += token_ids
        if rows is not None:
            self._pending.append(rows)
        end = start + len(token_ids)
        self._sample_from, self._sample_to, self._drafts = end - sample_rows, end, draft_tokens

    def _feed(self) -> list[HopAction]:
        """Give the engine the next slice, if it may have one."""
        known = len(self._inputs)
        if self.held or self._broken or self._fed == known:
            return []
        if self.first and self.last:
            limit = known
        else:
            limit = min(known, self._computed + SLICE_TOKENS)
            if not self.last:
                limit = min(limit, self._taken_by_next + WINDOW_TOKENS)
        if self._sample_from < limit < self._sample_to:  # the rows of a sampling step stay together
            limit = self._sample_from
        if limit <= self._fed:
            return []
        start, self._fed = self._fed, limit
        samples = limit == self._sample_to
        rows = None if self.first else self._take_pending(limit - start)
        return [
            Feed(
                start,
                tuple(self._inputs[start:limit]),
                rows,
                self._sample_to - self._sample_from if samples else 0,
                self._drafts if samples else 0,
            )
        ]

    def _take_pending(self, tokens: int) -> Rows:
        parts: list[Rows] = []
        while tokens:
            rows = self._pending.popleft()
            if len(rows) > tokens:
                self._pending.appendleft(rows[tokens:])
                rows = rows[:tokens]
            parts.append(rows)
            tokens -= len(rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _send(self) -> list[HopAction]:
        """Send the next hop what is computed and it may have."""
        following = self.next_hop
        if following is None:
            return []
        limit = min(self._computed, self._taken_by_next + WINDOW_TOKENS)
        if limit < self._sample_to:
            limit = min(limit, self._sample_from)
        actions: list[HopAction] = []
        while self._sent < limit:
            end = min(limit, self._sent + self._facts.message_tokens)
            if self._sample_from < end < self._sample_to:
                end = self._sample_from
            start, self._sent = self._sent, end
            self._most_sent = max(self._most_sent, end)
            samples = end == self._sample_to
            self._step_number += 1
            step = Step(
                self.id,
                self.epoch,
                self._step_number,
                start,
                tuple(self._inputs[start:end]),
                self._sample_to - self._sample_from if samples else 0,
                self._drafts if samples else 0,
            )
            actions.append(Forward(following.peer, step, self.kept.rows(start, end)))
        return actions

    def _tell_tokens(self, sampled: Sequence[SampledRow], completes: bool) -> list[HopAction]:
        """Tell the gateway and the first hop what was sampled, up to where the answer ends."""
        opening = self._opening
        assert opening.sampling is not None and self._computed == self._sample_to
        position = self._sample_from + 1
        finished: FinishCode = ""
        rows = list(sampled)
        for count, row in enumerate(rows, start=1):
            if row.token_id in opening.sampling.stop_token_ids or (completes and count == len(sampled)):
                finished = "stop"
            elif position + count >= opening.max_tokens:
                finished = "length"
            if finished:
                del rows[count:]
                break
        self._tokens_number += 1
        reports = tuple(row.report for row in rows if row.report is not None)
        tokens = Tokens(
            self.id,
            self.epoch,
            self._tokens_number,
            position,
            tuple(row.token_id for row in rows),
            reports if opening.sampling.logprobs is not None else None,
            finished,
        )
        # Told once to a peer that is both.
        return [Tell(peer, tokens) for peer in dict.fromkeys((self._hops[0].peer, self.gateway))]
