# pyright: standard
"""The engine of one span of a model's blocks: what every worker of a chain runs.

Sessions cross the span, or a part of it (`SpanSession.blocks`): "the span" below is a session's own. Each is fed
inputs (token ids, and hidden states from the hop before unless the span begins the model), and every chunk of them
that ran comes out: as hidden states for the hop after, or as sampled tokens where the span ends the model. One step
is one forward pass over all sessions that have something to compute, as the scheduler's policy decides: prompts in
chunks, KV blocks on demand.

Positions of a session, all counted from its first token:

    0 ........ told ..... handled ........... known          told      came out
                 |- tail -|                                  handled   ran; of a feed's sampled rows, waits for the rest
                                                             known     was fed

The scheduler's count of computed tokens can fall, by preemption; then kept inputs (`SpanInputs`) are computed again up
to `handled` without a word. Nobody is asked for an input twice. Going back to an earlier position (a rejected draft, a
replay) is a feed that starts before `known`.

A session's token at a position depends on the request, its seed and the tokens before, and on nothing else, so a feed
that comes again gives again what it gave; `Engine` gives the same.

Sessions that want the same memory go by the time that they reached their gateway, the same at every hop, or else two
could wait for each other at two hops (`scheduling/idle.py`). Where not even kept inputs have room, the latest session
ends with NoCapacity.
"""

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from plait.engine.constraints import ConstraintCompiler, Matcher
from plait.engine.decoder import SpanDecoder
from plait.engine.kv_loans import KvLoans
from plait.engine.kv_store import KvExtents, move_blocks
from plait.engine.sampling import check_logit_bias, ending_token_ids
from plait.engine.span_inputs import SpanInputs
from plait.engine.span_sampling import sample_due
from plait.engine.span_session import Answer, DueRows, Feed, Language, LiveSession, SpanOutput, SpanSession
from plait.engine.step import SequenceChunk
from plait.engine.stored import all_finite
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadRequest, BlocksLost, EngineFailure, NoCapacity, NotFound, ServingError
from plait.ids import RequestId, SessionId
from plait.scheduling import NewRequest, ScheduledChunk, ScheduledStep, Scheduler
from plait.session import Constraint, SamplingParams
from plait.wire import surely_finite

_SESSION_ID = re.compile("[0-9a-f]{32}")
_LATEST_UNIX_S = 2.0**36  # the year 4147: an arrival beyond is nonsense


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLoad:
    """How busy a span is now; totals are since the start. `queued_tokens` were fed and have not come out.

    `kv_borrowable_tokens`: what other machines may still lend.
    """

    sessions: int
    running_sessions: int
    queued_tokens: int
    kv_free_tokens: int
    kv_total_tokens: int
    kv_borrowable_tokens: int
    steps_total: int
    step_tokens_total: int
    preemptions_total: int


@dataclass(frozen=True, slots=True)
class DecodedStep:
    """A step of decodes only: its sessions, the tokens that were attended here, and how many others were asked."""

    sessions: int
    tokens: int
    holders: int


class SpanEngine:
    """Owns a decoder of a span, its KV memory and kept inputs, and a scheduler; `load_span_engine` makes one.

    No threads and no clock: calls must not overlap.
    """

    def __init__(
        self,
        *,
        decoder: SpanDecoder,
        store: KvExtents,
        host_store: KvExtents | None,
        scheduler: Scheduler,
        inputs: SpanInputs,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        max_model_tokens: int,
        loans: KvLoans | None = None,
    ) -> None:
        """`tokenizer` is for the span that ends the model: it knows which ids are padding, and constraints need it."""
        self.spec = decoder.spec
        self.blocks = decoder.blocks
        self.embeds = decoder.blocks.start == 0
        self.decides = decoder.blocks.stop == len(decoder.spec.blocks)
        self.max_model_tokens = max_model_tokens
        self.loans = loans
        """KV blocks lent and borrowed; call `loans_changed` when a debt has."""
        assert self.decides == (tokenizer is not None)
        assert inputs.total_tokens >= max_model_tokens, "the earliest session must always have room"
        self._decoder = decoder
        self._store = store
        self._host_store = host_store
        self._scheduler = scheduler
        self._inputs = inputs
        self._eos_token_ids = eos_token_ids
        self._vocab_limit = tokenizer.vocab_tokens if tokenizer else decoder.spec.vocab_tokens
        self._constraints = ConstraintCompiler(tokenizer, eos_token_ids) if tokenizer else None
        self._sessions: dict[SessionId, LiveSession] = {}
        self._failures: list[tuple[SessionId, ServingError]] = []
        self._step: ScheduledStep | None = None
        """The step in flight: set between the scheduler's decision and its completion."""
        self._stalled = False
        """Whether the latest step could do nothing, and nothing has happened since that would change it."""
        self._steps = 0
        self._step_tokens = 0
        self.decoded: DecodedStep | None = None
        """What the latest step was, if it only decoded."""

    # -- sessions --------------------------------------------------------------------------------------

    def compile(self, constraint: Constraint) -> Matcher:
        """Prepare a constraint for `open`. Any thread may call this, as it can take seconds.

        Raises:
            BadRequest: the constraint is malformed, empty of outputs, or too large; or this span samples nothing.
        """
        if self._constraints is None:
            raise BadRequest(f"blocks {_named(self.blocks)} do not end the model, so nothing is sampled here")
        return self._constraints.matcher(constraint)

    def open(self, session: SpanSession, *, matcher: Matcher | None = None) -> None:
        """Take a session; `matcher` is its constraint if that was compiled before.

        Raises:
            BadRequest: it can never run here.
            NoCapacity: there are too many sessions, or there is no room for its prompt.
        """
        sampling = self._check_session(session)
        if not self._inputs.fits((), session.prompt_tokens):
            raise NoCapacity(
                f"no room for a prompt of {session.prompt_tokens} tokens: this worker keeps the inputs of at most "
                f"{self._inputs.total_tokens} tokens, of {len(self._sessions)} sessions now; retry later, or elsewhere"
            )
        if matcher is None and sampling is not None and sampling.constraint is not None:
            matcher = self.compile(sampling.constraint)
        self._scheduler.submit(
            NewRequest(
                id=RequestId(session.id),
                token_ids=(),
                max_sequence_tokens=session.max_tokens,
                priority=session.order,
                fed=True,
            )
        )
        live = self._sessions[session.id] = LiveSession(
            session=session,
            blocks=self._blocks_of(session),
            answer=None
            if sampling is None
            else Answer(
                session=session,
                params=sampling,
                stop_token_ids=ending_token_ids(sampling, self._eos_token_ids),
                language=Language(matcher) if matcher is not None else None,
            ),
        )
        self._inputs.resize(live.pages, session.prompt_tokens)

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
        """Give a session its inputs at positions from `start` on; what it had from there on is forgotten.

        `hidden` [len(token_ids), hidden] comes from the hop before, None where the span begins the model. Once all
        have run, the last `sample_rows` rows are sampled, in order. The last `draft_tokens` ids are guesses: the row
        before a guess says whether it was right, and no row after a wrong one is sampled.

        Where there is no room to keep the inputs, the latest sessions end, this one if it is the latest
        (`take_failures`).

        Raises:
            NotFound: there is no such session, or no more.
            BadRequest: positions, ids, shapes or numbers that cannot be.
        """
        live = self._session(id)
        self._check_feed(live, self.known_tokens(id), start, token_ids, hidden)
        if not (0 <= sample_rows <= len(token_ids) and 0 <= draft_tokens <= max(0, sample_rows - 1)):
            raise BadRequest(
                f"session {id!r}: {sample_rows} rows to sample and {draft_tokens} drafts among {len(token_ids)} "
                "inputs; every draft needs a sampled row before it"
            )
        end = start + len(token_ids)
        if not self._make_room(live, max(end, live.session.prompt_tokens)):
            return
        if hidden is not None:
            self._inputs.write(live.pages, start, hidden)
        self._go_back(live, start, token_ids)
        live.feeds.append(Feed(start=start, end=end, sample_rows=sample_rows, draft_tokens=draft_tokens))
        self._stalled = False

    def rewind(self, id: SessionId, start: int) -> None:
        """Forget a session's inputs from position `start` on; what of those before has not come out still will.

        Raises:
            NotFound: there is no such session, or no more.
            BadRequest: fewer inputs are known.
        """
        live = self._session(id)
        if not 0 <= start <= (known := self.known_tokens(id)):
            raise BadRequest(f"session {id!r} cannot go back to position {start}: it knows {known} inputs")
        self._go_back(live, start, ())
        self._inputs.resize(live.pages, max(start, live.session.prompt_tokens))
        self._stalled = False

    def close(self, id: SessionId) -> None:
        """Forget a session and free all it held, now; an unknown one is no error."""
        live = self._sessions.pop(id, None)
        if live is not None:
            self._scheduler.cancel(RequestId(id))
            self._inputs.resize(live.pages, 0)
            self._stalled = False

    def known_tokens(self, id: SessionId) -> int:
        """How many inputs a session has been fed and still knows: where its next feed goes on.

        Raises:
            NotFound: there is no such session.
        """
        self._session(id)
        return len(self._scheduler.token_ids(RequestId(id), 0))

    def take_failures(self) -> list[tuple[SessionId, ServingError]]:
        """Sessions that the engine ended itself since the last call, and why."""
        failures, self._failures = self._failures, []
        return failures

    def loans_changed(self) -> None:
        """Blocks were borrowed, moved or lost, so that a step may be able to do more than the last."""
        self._stalled = False

    @property
    def starving(self) -> SessionId | None:
        """The first session, if the latest step gave it nothing for want of KV blocks."""
        id = self._scheduler.starving
        return None if id is None else SessionId(id)

    def abort_running(self) -> list[SessionId]:
        """End every session that has run, after `step` raised; returns their ids."""
        ids = [id for id, live in self._sessions.items() if live.started]
        for id in ids:
            self.close(id)
        if self._step is not None:
            self._scheduler.complete(self._step)
            self._step = None
        return ids

    # -- steps -----------------------------------------------------------------------------------------

    @property
    def decoder(self) -> SpanDecoder:
        """What computes the span: for measurements while no session is open."""
        return self._decoder

    @property
    def store(self) -> KvExtents:
        """The KV memory: for measurements while no session is open, which may leave anything in it."""
        return self._store

    @property
    def has_work(self) -> bool:
        """Whether `step` or `take_failures` has something to give.

        False also while all that is to be computed waits for memory of sessions that themselves wait for input.
        """
        if self._failures:
            return True
        return not self._stalled and any(live.feeds for live in self._sessions.values())

    def step(self) -> list[SpanOutput]:
        """Run one forward pass over what the scheduler chooses, and say what came out.

        Nothing comes out where borrowed KV blocks turned out to be lost: what needs them is computed again.

        Raises:
            EngineFailure: the decoder failed; `abort_running` makes the engine usable again.
        """
        step = self._step = self._scheduler.schedule()
        for id in step.admitted:
            self._sessions[SessionId(id)].started = True
        with torch.inference_mode():
            move_blocks(step, self._store, self._host_store)
            # Sessions that cross the same blocks share a pass; mostly that is all of them.
            groups: dict[range, list[_Pass]] = {}
            for chunk in step.chunks:
                ran = self._prepare(chunk)
                groups.setdefault(ran.live.blocks, []).append(ran)
            try:
                results = [self._run(blocks, passes) for blocks, passes in groups.items()]
            except BlocksLost as lost:
                assert self.loans is not None and lost.kv_blocks
                self._scheduler.undo(step)
                self._step = self.decoded = None
                self.loans.lose(lost.kv_blocks)
                return []
            self._scheduler.complete(step)
            self._step = None
            self.decoded = self._decoded(step) if self.loans is not None else None
            if not results:
                self._stalled = not (step.admitted or step.preempted)
                return []
            self._steps += 1
            self._step_tokens += step.tokens
            return [output for result in results for output in self._take(result)]

    def session_ids(self) -> Set[SessionId]:
        """The sessions that are open."""
        return self._sessions.keys()

    def load(self) -> SpanLoad:
        """How busy this span is; walks all sessions."""
        counts = self._scheduler.counts()
        block_tokens = self._store.block_tokens
        return SpanLoad(
            sessions=len(self._sessions),
            running_sessions=counts.running_requests,
            queued_tokens=sum(
                live.feeds[-1].end - live.told for live in self._sessions.values() if live.feeds
            ),
            kv_free_tokens=counts.free_kv_blocks * block_tokens,
            kv_total_tokens=counts.kv_blocks * block_tokens,
            kv_borrowable_tokens=self._borrowable_blocks() * block_tokens,
            steps_total=self._steps,
            step_tokens_total=self._step_tokens,
            preemptions_total=counts.preemptions_total,
        )

    def _borrowable_blocks(self) -> int:
        if self.loans is None:
            return 0
        return max(0, self._scheduler.borrowable_blocks - self.loans.debts.borrowed_blocks)

    def check(self) -> None:
        """Assert that scheduler, kept inputs and sessions agree."""
        self._scheduler.check(self.loans.holders() if self.loans is not None else ())
        if self.loans is not None:
            self.loans.check()
        self._inputs.check([live.pages for live in self._sessions.values()])
        counts = self._scheduler.counts()
        assert (
            len(self._sessions) == counts.running_requests + counts.waiting_requests + counts.resting_requests
        )
        for id, live in self._sessions.items():
            known = self.known_tokens(id)
            assert self._inputs.fits(live.pages, max(known, live.session.prompt_tokens))
            position = live.told
            for feed in live.feeds:
                assert feed.start <= position < feed.end, f"{id!r}: a feed is not where it should be"
                position = feed.end
            assert position == known and live.told <= live.handled <= known

    # -- checks of what comes from outside -------------------------------------------------------------

    def _check_session(self, session: SpanSession) -> SamplingParams | None:
        """Refuse what can never run here; returns how to sample, if that is done here."""
        if not _SESSION_ID.fullmatch(session.id):
            raise BadRequest(f"a session id is 32 lower-case hex digits, not {session.id!r:.80}")
        if session.id in self._sessions:
            raise BadRequest(f"session {session.id!r} is open already")
        if not 0 <= session.arrived_unix_s < _LATEST_UNIX_S:
            raise BadRequest(f"session {session.id!r} arrived at {session.arrived_unix_s}, which is no time")
        if not 1 <= session.prompt_tokens < session.max_tokens:
            raise BadRequest(
                f"session {session.id!r} has a prompt of {session.prompt_tokens} tokens and {session.max_tokens} in "
                "all; both the prompt and the answer have at least one"
            )
        if session.max_tokens > self.max_model_tokens:
            raise BadRequest(
                f"session {session.id!r} may become {session.max_tokens} tokens long, and this worker takes at most "
                f"{self.max_model_tokens}",
                param="max_tokens",
            )
        blocks = self._blocks_of(session)
        if not (self.blocks.start <= blocks.start < blocks.stop <= self.blocks.stop and blocks.step == 1):
            raise BadRequest(
                f"session {session.id!r} wants blocks {_named(blocks)}, and here are {_named(self.blocks)}"
            )
        if blocks.stop < len(self.spec.blocks):
            return None
        sampling = session.sampling
        if sampling is None:
            raise BadRequest(
                f"session {session.id!r} brings no sampling parameters, and tokens are sampled here"
            )
        if sampling.beam_width or sampling.prompt_logprobs is not None:
            raise BadRequest("beam search and prompt_logprobs are not to be had over several machines")
        check_logit_bias(sampling, self.spec.vocab_tokens)
        return sampling

    def _check_feed(
        self, live: LiveSession, known: int, start: int, token_ids: Sequence[int], hidden: Tensor | None
    ) -> None:
        session, tokens = live.session, len(token_ids)
        if not (0 <= start <= known and 1 <= tokens <= session.max_tokens - start):
            raise BadRequest(
                f"session {session.id!r} was fed {tokens} tokens from position {start} on, where {known} are known and "
                f"{session.max_tokens} are the most"
            )
        if min(token_ids) < 0 or max(token_ids) >= self.spec.vocab_tokens:
            raise BadRequest(f"token ids must be between 0 and {self.spec.vocab_tokens - 1}")
        embeds = live.blocks.start == 0
        if embeds != (hidden is None):
            raise BadRequest(
                f"session {session.id!r}: blocks {_named(live.blocks)} take "
                + ("token ids and no hidden states" if embeds else "hidden states")
            )
        if hidden is not None and (
            hidden.shape != (tokens, self.spec.hidden)
            or not hidden.is_floating_point()
            or not _finite(hidden)
        ):
            raise BadRequest(
                f"session {session.id!r}: hidden states must be {tokens} rows of {self.spec.hidden} finite numbers, "
                f"not {tuple(hidden.shape)} of {hidden.dtype}"
            )

    def _blocks_of(self, session: SpanSession) -> range:
        return self.blocks if session.blocks is None else session.blocks

    def _session(self, id: SessionId) -> LiveSession:
        live = self._sessions.get(id)
        if live is None:
            raise NotFound(f"no session {id!r} on blocks {_named(self.blocks)}; open it first")
        return live

    def _go_back(self, live: LiveSession, start: int, token_ids: Sequence[int]) -> None:
        """Replace what a session knows from position `start` on."""
        request_id = RequestId(live.session.id)
        known = self._scheduler.token_ids(request_id, 0)
        first = live.cut(start)
        self._scheduler.extend(request_id, first, [*known[first:start], *token_ids])

    def _make_room(self, live: LiveSession, tokens: int) -> bool:
        """Let a session keep so many inputs; False if it had to end because it is the latest of all."""
        while not self._inputs.fits(live.pages, tokens):
            latest = max(self._sessions.values(), key=lambda each: each.session.order)
            self._fail(
                latest,
                NoCapacity(
                    f"session {latest.session.id!r} gave way to earlier ones: this worker keeps the inputs of at most "
                    f"{self._inputs.total_tokens} tokens; run it elsewhere, or later"
                ),
            )
            if latest is live:
                return False
        self._inputs.resize(live.pages, tokens)
        return True

    def _fail(self, live: LiveSession, failure: ServingError) -> None:
        if live.session.id in self._sessions:
            self.close(live.session.id)
            self._failures.append((live.session.id, failure))

    # -- one step, in order ----------------------------------------------------------------------------

    def _prepare(self, chunk: ScheduledChunk) -> "_Pass":
        live = self._sessions[SessionId(chunk.request_id)]
        token_ids = self._scheduler.token_ids(chunk.request_id, chunk.sequence)
        end = chunk.start + chunk.tokens
        due = list(live.due(end, token_ids))
        first_due = due[0].positions.start if due else end
        best = bool(due) and self._decoder.finds_best and due[0].answer.takes_best_token(first_due)
        return _Pass(
            live=live,
            start=chunk.start,
            end=end,
            due=due,
            chunk=SequenceChunk(
                start=chunk.start,
                token_ids=token_ids[chunk.start : end],
                kv_blocks=chunk.kv_blocks,
                rope_tokens=live.session.max_tokens,
                logit_rows=end - first_due,
                top_logits=1 if best else 0,
            ),
        )

    def _decoded(self, step: ScheduledStep) -> "DecodedStep | None":
        """The load of a step in which every session computed one token."""
        if not step.chunks or any(chunk.tokens != 1 for chunk in step.chunks):
            return None
        own_blocks, block_tokens = self._store.kv_blocks, self._store.block_tokens
        here = there = 0
        for chunk in step.chunks:
            borrowed = sum(kv_block >= own_blocks for kv_block in chunk.kv_blocks)
            here += chunk.start + 1 - borrowed * block_tokens
            there += borrowed
        holders = len(self.loans.debts.borrowed_from()) if there and self.loans is not None else 0
        return DecodedStep(len(step.chunks), max(0, here), holders)

    def _run(self, blocks: range, passes: Sequence["_Pass"]) -> "_Result":
        """One forward pass of sessions that cross the same blocks."""
        hidden = None
        if blocks.start > 0:
            hidden = self._inputs.read(
                (each.live.pages, each.start, each.end - each.start) for each in passes
            )
        result = self._decoder.forward([each.chunk for each in passes], self._store, hidden, blocks=blocks)
        return _Result(
            passes=passes,
            decides=blocks.stop == len(self.spec.blocks),
            result=result,
            best=self._decoder.best,
            non_finite=self._decoder.non_finite(),
        )

    def _take(self, ran: "_Result") -> list[SpanOutput]:
        """What came of a forward pass."""
        outputs: list[SpanOutput] = []
        if ran.decides:
            self._sample(ran)
            for each in ran.passes:
                outputs += self._outputs(each, None, ran.non_finite)
            return outputs
        hidden = ran.result.float().cpu()
        first = 0
        for each in ran.passes:
            outputs += self._outputs(each, hidden[first : first + each.end - each.start], ran.non_finite)
            first += each.end - each.start
        return outputs

    def _sample(self, ran: "_Result") -> None:
        """Sample all rows that are due; the logits are those of chunks that wanted all of them, in chunk order."""
        best_tokens = iter(ran.best)
        first_row = 0
        for each in ran.passes:
            chunk = each.chunk
            best = None
            if chunk.top_logits:
                best = [row[0] for row in islice(best_tokens, chunk.logit_rows)]
            for due in each.due:
                offset = due.positions.start - (each.end - chunk.logit_rows)
                due.first_row = first_row + offset
                due.best = None if best is None else best[offset:]
            first_row += 0 if chunk.top_logits else chunk.logit_rows
        due_rows = [due for each in ran.passes for due in each.due]
        for live, failure in sample_due(due_rows, ran.result, self._vocab_limit, lambda: ran.non_finite):
            self._fail(live, failure)

    def _outputs(self, ran: "_Pass", hidden: Tensor | None, non_finite: str) -> list[SpanOutput]:
        """What a session's rows of the pass bring out; `hidden` are theirs, None where the model ends."""
        live = ran.live
        if live.session.id not in self._sessions:
            return []
        if hidden is not None and not _finite(hidden):
            where = non_finite or f"blocks {_named(live.blocks)}"
            failure = f"session {live.session.id!r}: activations stopped being finite in {where}"
            self._fail(live, EngineFailure(failure))
            return []
        known = self._scheduler.token_ids(RequestId(live.session.id), 0)
        return live.come_out(ran.start, ran.end, known, hidden)


@dataclass(slots=True, eq=False)
class _Pass:
    """One session's rows of a forward pass: positions from `start` to `end`."""

    live: LiveSession
    start: int
    end: int
    due: list[DueRows]
    chunk: SequenceChunk


@dataclass(slots=True, eq=False)
class _Result:
    """What one forward pass gave: logits where the model ends, hidden states elsewhere."""

    passes: Sequence[_Pass]
    decides: bool
    result: Tensor
    best: Sequence[Sequence[tuple[int, float]]]
    non_finite: str


def _finite(hidden: Tensor) -> bool:
    """Whether all values are; those of one token, in float32 on the CPU, are mostly seen to be at once."""
    if hidden.dtype == torch.float32 and hidden.device.type == "cpu" and surely_finite(hidden.numpy()):
        return True
    return all_finite(hidden)


def _named(blocks: range) -> str:
    return f"{blocks.start}:{blocks.stop}"
