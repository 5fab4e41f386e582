"""The engine: requests in, one forward pass after another, deltas out.

One step is: the scheduler decides which tokens of which sequences run (ORCA's iteration-level scheduling);
blocks that were swapped or must be copied before writing are moved; the decoder runs the flat batch; rows that
reached the end of what is known are sampled; the new tokens are checked for an end and told to the scheduler.

Everything here runs in one thread and holds no lock. Tokens live in three places that advance together:
the scheduler's known tokens (what to compute), a live sequence's outputs (what was generated), and its
detokenizer (what was shown).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from plait.engine.constraints import ConstraintCompiler, Matcher
from plait.engine.decoder import SequenceChunk, SpanDecoder
from plait.engine.kv_store import KvExtents, move_blocks
from plait.engine.live import BeamProgress, LiveRequest, LiveSequence, check_prompt, new_sequence
from plait.engine.sampling import (
    SampledToken,
    SamplingRow,
    position_logprobs,
    sample_each,
    take_best,
    top_candidates,
)
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadRequest, EngineFailure, ServingError
from plait.ids import RequestId
from plait.scheduling import KvUsage, NewRequest, ScheduledChunk, ScheduledStep, Scheduler
from plait.session import Constraint, GenerationRequest, RequestDelta, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Counts for people and metrics; totals are since the start."""

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_blocks_cached: int = 0
    block_tokens: int = 0
    steps_total: int = 0
    step_tokens_total: int = 0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    prefix_query_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0


class Engine:
    """Owns a decoder, its KV memory and a scheduler; see `load_engine` for how they are made."""

    def __init__(
        self,
        *,
        decoder: SpanDecoder,
        store: KvExtents,
        host_store: KvExtents | None,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        max_model_tokens: int,
        namespace_of: Callable[[GenerationRequest, int], bytes],
        prefix_caching: bool,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_tokens = max_model_tokens
        self._decoder = decoder
        self._store = store
        self._host_store = host_store
        self._scheduler = scheduler
        self._eos_token_ids = eos_token_ids
        self._namespace_of = namespace_of
        self._prefix_caching = prefix_caching
        self._seed = seed
        self._clock = clock
        self._constraints = ConstraintCompiler(tokenizer, eos_token_ids)
        self._live: dict[RequestId, LiveRequest] = {}
        self._captures: dict[RequestId, list[torch.Tensor]] = {}
        self._failures: list[tuple[RequestId, ServingError]] = []
        self.on_step: Callable[[ScheduledStep, float], None] | None = None
        """Told of each forward pass once its tokens are out: what ran, and when it began by the engine's clock."""
        self._step: ScheduledStep | None = None
        """The step in flight: set between the scheduler's decision and its completion."""
        self._added = 0
        self._steps = 0
        self._step_tokens = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._live)

    def compile(self, constraint: Constraint) -> Matcher:
        """Prepare a constraint for `add`. Any thread may call this, as it can take seconds.

        Raises:
            BadRequest: the constraint is malformed, empty of outputs, or too large.
        """
        return self._constraints.matcher(constraint)

    def add(self, request: GenerationRequest, *, matcher: Matcher | None = None) -> None:
        """Queue a request; `matcher` is its constraint if that was compiled before.

        Raises:
            BadRequest: it can never run on this model.
            NoCapacity: the waiting queue is full.
        """
        if request.id in self._live:
            raise BadRequest(f"request id {request.id!r} is already running", param="request_id")
        room_tokens = check_prompt(
            request, vocab_tokens=self._decoder.spec.vocab_tokens, max_model_tokens=self.max_model_tokens
        )
        sampling = request.sampling
        if matcher is None and sampling.constraint is not None:
            matcher = self.compile(sampling.constraint)
        live = LiveRequest(
            request=request,
            seed=self._seed_of(sampling),
            max_new_tokens=min(sampling.max_tokens or room_tokens, room_tokens),
            eos_token_ids=self._eos_token_ids,
            arrived_s=self._clock(),
            sequences=[new_sequence(request, self.tokenizer, matcher=matcher)],
        )
        self._scheduler.submit(
            NewRequest(
                id=request.id,
                token_ids=list(request.prompt_token_ids),
                max_sequence_tokens=live.max_sequence_tokens,
                fan_out=sampling.sequences,
                priority=request.priority,
                namespace=self._namespace_of(request, live.max_sequence_tokens),
                reuse_prefix=self._prefix_caching and sampling.prompt_logprobs is None,
            )
        )
        self._live[request.id] = live
        self._added += 1

    def abort(self, id: RequestId) -> None:
        """Forget a request and free all it held, now; an unknown or finished one is no error."""
        if self._live.pop(id, None) is not None:
            self._scheduler.cancel(id)
            self._captures.pop(id, None)

    def abort_running(self) -> list[RequestId]:
        """Abort every request that has been admitted, after a step went wrong; returns their ids."""
        ids = [id for id, live in self._live.items() if live.scheduled_s]
        for id in ids:
            self.abort(id)
        if self._step is not None:
            self._scheduler.complete(self._step)
            self._step = None
        return ids

    def take_failures(self) -> list[tuple[RequestId, ServingError]]:
        """Requests that ended with an error of their own in the latest steps, and which."""
        failures, self._failures = self._failures, []
        return failures

    def step(self) -> list[RequestDelta]:
        """Run one forward pass over what the scheduler chooses, and say what each request gained."""
        now_s = self._clock()
        step = self._step = self._scheduler.schedule()
        for id in step.admitted:
            live = self._live[id]
            if not live.scheduled_s:
                live.scheduled_s = now_s
                live.cached_tokens = self._scheduler.cached_tokens(id)
                self._prompt_tokens += len(live.request.prompt_token_ids)
        with torch.inference_mode():
            move_blocks(step, self._store, self._host_store)
            if not step.chunks:
                self._scheduler.complete(step)
                self._step = None
                return []
            chunks = [self._chunk(chunk) for chunk in step.chunks]
            logits = self._decoder.forward(chunks, self._store)
            self._scheduler.complete(step)
            self._step = None
            self._steps += 1
            self._step_tokens += step.tokens
            gained = self._take_logits(step.chunks, chunks, logits)
        deltas = self._deltas(gained)
        if self.on_step is not None:
            self.on_step(step, now_s)
        return deltas

    def prompt_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position of a prompt, float32 [tokens, vocab], through the same paged path.

        Call it only while nothing else runs.
        """
        id = RequestId(f"logits-{self._added}")
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
        self._captures[id] = []
        try:
            self.add(GenerationRequest(id=id, prompt_token_ids=tuple(token_ids), sampling=sampling))
            captured = self._captures[id]
            while id in self._live:
                self.step()
            for failed_id, failure in self.take_failures():
                if failed_id == id:
                    raise failure
        finally:
            self._captures.pop(id, None)
        return torch.cat(captured)

    def status(self) -> EngineStatus:
        """Counts as of now."""
        counts = self._scheduler.counts()
        return EngineStatus(
            running=counts.running_requests,
            waiting=counts.waiting_requests,
            swapped=counts.swapped_requests,
            kv_blocks_used=counts.used_kv_blocks,
            kv_blocks_total=counts.kv_blocks,
            kv_blocks_cached=counts.cached_kv_blocks,
            block_tokens=self._store.block_tokens,
            steps_total=self._steps,
            step_tokens_total=self._step_tokens,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            preemptions_total=counts.preemptions_total,
            prefix_query_tokens_total=counts.prefix_query_tokens_total,
            prefix_hit_tokens_total=counts.prefix_hit_tokens_total,
        )

    def kv_usage(self) -> KvUsage:
        """How much of the KV memory that running requests hold is filled; walks every block table."""
        return self._scheduler.kv_usage()

    def check(self) -> None:
        """Assert that scheduler, pool and live requests agree."""
        self._scheduler.check()
        assert (
            len(self._live)
            == self._scheduler.counts().running_requests + self._scheduler.counts().waiting_requests
        )

    # -- one step, in order ----------------------------------------------------------------------------

    def _seed_of(self, sampling: SamplingParams) -> int:
        if sampling.seed is not None:
            return sampling.seed & (2**64 - 1)
        # Weyl sequence over the requests: distinct, reproducible from the engine's seed and arrival order.
        return (self._seed * 0x9E3779B97F4A7C15 + (self._added + 1) * 0xD1B54A32D192ED03) & (2**64 - 1)

    def _chunk(self, chunk: ScheduledChunk) -> SequenceChunk:
        live = self._live[chunk.request_id]
        token_ids = self._scheduler.token_ids(chunk.request_id, chunk.sequence)
        return SequenceChunk(
            start=chunk.start,
            token_ids=token_ids[chunk.start : chunk.start + chunk.tokens],
            kv_blocks=chunk.kv_blocks,
            rope_tokens=live.max_sequence_tokens,
            logit_rows=_logit_rows(live, chunk),
            top_logits=1 if self._decoder.finds_best and chunk.samples and live.takes_best_token else 0,
        )

    def _take_logits(
        self, chunks: Sequence[ScheduledChunk], ran: Sequence[SequenceChunk], logits: torch.Tensor
    ) -> list[LiveRequest]:
        """Sample every row that is due; returns the requests that gained something, in batch order.

        `ran` is what the decoder got for each chunk; `logits` are the rows of those that wanted all of them.
        """
        best_tokens = iter(self._decoder.best)
        token_of: list[tuple[LiveRequest, LiveSequence, SampledToken]] = []
        rows: list[SamplingRow] = []
        row_logits: list[int] = []
        owners: list[tuple[LiveRequest, LiveSequence]] = []
        gained: list[LiveRequest] = []
        first_row = 0
        for chunk, given in zip(chunks, ran, strict=True):
            live = self._live[chunk.request_id]
            if live.wants_prompt_rows:
                self._take_prompt_logprobs(live, chunk, logits[first_row : first_row + given.logit_rows])
            if not given.top_logits:
                first_row += given.logit_rows
            if not chunk.samples:
                continue
            last_row = first_row - 1
            gained.append(live)
            if live.beam is not None:
                self._take_beam_row(live, live.beam, chunk.sequence, logits[last_row])
                continue
            if live.fanned_out:
                sequences = [live.sequences[chunk.sequence]]
            else:
                live.fan_out()
                self._scheduler.fork(live.request.id, (0,) * len(live.sequences))
                sequences = live.sequences
            if given.top_logits:
                token = self._best_token(live, next(best_tokens)[0])
                token_of.extend((live, sequence, token) for sequence in sequences if token is not None)
                continue
            for sequence in sequences:
                rows.append(live.sampling_row(sequence))
                row_logits.append(last_row)
                owners.append((live, sequence))
        if rows:
            if len(rows) != len(logits) or row_logits != list(range(len(rows))):
                logits = logits[torch.tensor(row_logits, device=logits.device)]
            for (live, sequence), token in zip(owners, self._sample(logits, rows, owners), strict=True):
                if token is not None:
                    token_of.append((live, sequence, token))
        for live, sequence, token in token_of:
            self._append(live, sequence, token)
        unique = dict.fromkeys(live.request.id for live in gained)
        return [self._live[id] for id in unique if id in self._live]

    def _sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplingRow],
        owners: Sequence[tuple[LiveRequest, LiveSequence]],
    ) -> Sequence[SampledToken | None]:
        """Sample all rows; those that cannot be sampled fail their own requests and no other."""
        sampled = sample_each(logits, rows, self.tokenizer.vocab_tokens)
        return [self._unless_failed(live, token) for (live, _), token in zip(owners, sampled, strict=True)]

    def _best_token(self, live: LiveRequest, best: tuple[int, float]) -> SampledToken | None:
        """The greedy choice that the decoder made itself."""
        return self._unless_failed(live, take_best(*best, self._decoder.non_finite))

    def _unless_failed(self, live: LiveRequest, token: SampledToken | ServingError) -> SampledToken | None:
        if isinstance(token, SampledToken):
            return token
        self._fail(live, token)
        return None

    def _fail(self, live: LiveRequest, failure: ServingError) -> None:
        if live.request.id in self._live:
            self.abort(live.request.id)
            self._failures.append((live.request.id, failure))

    def _take_prompt_logprobs(self, live: LiveRequest, chunk: ScheduledChunk, logits: torch.Tensor) -> None:
        """Row i of the chunk predicts token start + i + 1; positions seen before a preemption are skipped."""
        prompt = live.request.prompt_token_ids
        if not live.prompt_logprobs:
            live.prompt_logprobs.append(None)
        if (capture := self._captures.get(live.request.id)) is not None:
            seen_rows = sum(len(part) for part in capture)
            capture.append(logits[max(0, seen_rows - chunk.start) :].float().cpu())
        count = live.sampling.prompt_logprobs or 0
        first = len(live.prompt_logprobs) - 1 - chunk.start
        last = min(chunk.start + chunk.tokens, len(prompt) - 1) - chunk.start
        if first < last:
            targets = prompt[chunk.start + first + 1 : chunk.start + last + 1]
            live.prompt_logprobs.extend(
                position_logprobs(logits[first:last], targets, [count] * len(targets))
            )

    def _append(self, live: LiveRequest, sequence: LiveSequence, token: SampledToken) -> None:
        if live.request.id not in self._live:  # a sibling's failure ended the request in this step
            return
        live.first_token_s = live.first_token_s or self._clock()
        self._generated_tokens += 1
        live.take_token(sequence, token)
        if sequence.finish_reason is None:
            self._scheduler.append(live.request.id, sequence.index, token.token_id)
        else:
            self._scheduler.finish_sequence(live.request.id, sequence.index)

    def _take_beam_row(
        self, live: LiveRequest, beam: BeamProgress, sequence: int, logits: torch.Tensor
    ) -> None:
        """Offer the candidates of one beam; its last one chooses the survivors, which then share blocks."""
        in_vocab = logits[None, : self.tokenizer.vocab_tokens]
        parents = beam.offer(sequence, top_candidates(in_vocab, beam.options.candidates_per_beam)[0])
        if parents is None:
            return
        live.first_token_s = live.first_token_s or self._clock()
        self._generated_tokens += len(parents)
        if not beam.search.done:
            self._scheduler.fork(live.request.id, parents)
            for index, survivor in enumerate(beam.search.beams):
                self._scheduler.append(live.request.id, index, survivor.token_ids[-1])
        elif beam.search.finished:
            live.take_beams(beam.search)
        else:
            self._fail(live, EngineFailure("beam search found no possible token: the logits are not finite"))

    def _deltas(self, gained: Sequence[LiveRequest]) -> list[RequestDelta]:
        deltas: list[RequestDelta] = []
        for live in gained:
            delta = live.take_delta(self._clock())
            if delta is not None:
                deltas.append(delta)
                if delta.finished:
                    self._scheduler.finish(live.request.id)
                    del self._live[live.request.id]
        return deltas


def _logit_rows(live: LiveRequest, chunk: ScheduledChunk) -> int:
    """All rows while log-probabilities of the prompt are still due, else the last if it will be sampled."""
    if live.wants_prompt_rows:
        return chunk.tokens
    return 1 if chunk.samples else 0
