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
from dataclasses import dataclass, field, replace

import torch

from plait.engine.beam import BeamOptions, BeamSearch, advance_beams, best_beams
from plait.engine.constraints import ConstraintCompiler, Matcher
from plait.engine.decoder import Decoder, SequenceChunk
from plait.engine.detokenizer import IncrementalDetokenizer
from plait.engine.kv_store import KvStore
from plait.engine.sampling import (
    SampledToken,
    SamplingRow,
    position_logprobs,
    sample_rows,
    top_candidates,
)
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadRequest, EngineFailure, ServingError
from plait.ids import RequestId
from plait.scheduling import KvUsage, NewRequest, ScheduledChunk, ScheduledStep, Scheduler
from plait.session import (
    FinishReason,
    GenerationRequest,
    PositionLogprobs,
    RequestDelta,
    RequestTiming,
    SamplingParams,
    SequenceDelta,
    TokenLogprob,
)


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


@dataclass(slots=True)
class LiveSequence:
    """One token stream that is being generated."""

    index: int
    detokenizer: IncrementalDetokenizer
    matcher: Matcher | None
    output_token_ids: list[int] = field(default_factory=list[int])
    sent_tokens: int = 0
    unsent_text: str = ""
    cumulative_logprob: float = 0.0
    logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class LiveRequest:
    """A request between `add` and its last delta."""

    request: GenerationRequest
    sampling: SamplingParams
    seed: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    row_params: SamplingParams
    """`sampling` with what the engine itself needs: log-probabilities when sequences are ranked at the end."""
    ranked: bool
    rope_tokens: int
    sequences: list[LiveSequence]
    arrived_s: float
    beam: BeamSearch | None = None
    beam_options: BeamOptions | None = None
    beam_candidates: dict[int, list[TokenLogprob]] = field(default_factory=dict[int, list[TokenLogprob]])
    forked: bool = False
    cached_tokens: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list[PositionLogprobs | None])
    prompt_logprobs_sent: bool = False


class Engine:
    """Owns a decoder, its KV memory and a scheduler; see `load_engine` for how they are made."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        store: KvStore,
        host_store: KvStore | None,
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

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            BadRequest: it can never run on this model.
            NoCapacity: the waiting queue is full.
        """
        sampling, prompt = request.sampling, request.prompt_token_ids
        if request.id in self._live:
            raise BadRequest(f"request id {request.id!r} is already running", param="request_id")
        if not prompt:
            raise BadRequest("the prompt is empty; give at least one token", param="prompt")
        if max(prompt) >= self._decoder.spec.vocab_tokens or min(prompt) < 0:
            raise BadRequest(
                f"prompt token ids must be between 0 and {self._decoder.spec.vocab_tokens - 1}",
                param="prompt",
            )
        room_tokens = self.max_model_tokens - len(prompt)
        if room_tokens < 1:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and this model's context is {self.max_model_tokens} tokens, "
                "prompt and answer together; shorten the prompt",
                param="prompt",
            )
        for token_id in sampling.logit_bias or ():
            if token_id >= self._decoder.spec.vocab_tokens:
                raise BadRequest(
                    f"logit_bias names token {token_id}, beyond the vocabulary", param="logit_bias"
                )
        matcher = self._constraints.matcher(sampling.constraint) if sampling.constraint else None
        max_new_tokens = min(sampling.max_tokens or room_tokens, room_tokens)
        ranked = sampling.beam_width > 0 or (sampling.best_of or sampling.n) > sampling.n
        stop_token_ids = frozenset(sampling.stop_token_ids or ())
        detokenizer = IncrementalDetokenizer(
            self.tokenizer,
            stop_strings=sampling.stop_strings,
            include_stop=sampling.include_stop_str_in_output,
            skip_special_tokens=sampling.skip_special_tokens,
            continues_text=request.continues_text,
        )
        max_sequence_tokens = len(prompt) + max_new_tokens
        live = LiveRequest(
            request=request,
            sampling=sampling,
            seed=self._seed_of(sampling),
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids if sampling.ignore_eos else stop_token_ids | self._eos_token_ids,
            row_params=replace(sampling, logprobs=sampling.logprobs or 0) if ranked else sampling,
            ranked=ranked,
            rope_tokens=max_sequence_tokens,
            sequences=[LiveSequence(index=0, detokenizer=detokenizer, matcher=matcher)],
            arrived_s=self._clock(),
        )
        if sampling.beam_width:
            live.beam = BeamSearch()
            live.beam_options = BeamOptions(
                width=sampling.beam_width,
                max_tokens=max_new_tokens,
                end_token_ids=live.stop_token_ids,
                length_penalty=sampling.length_penalty,
                min_tokens=sampling.min_tokens,
            )
        self._scheduler.submit(
            NewRequest(
                id=request.id,
                token_ids=list(prompt),
                max_sequence_tokens=max_sequence_tokens,
                fan_out=sampling.sequences,
                priority=request.priority,
                namespace=self._namespace_of(request, max_sequence_tokens),
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
            self._move_blocks(step)
            logits = None
            if step.chunks:
                logits = self._decoder.forward([self._chunk(chunk) for chunk in step.chunks], self._store)
            self._scheduler.complete(step)
            self._step = None
            if logits is None:
                return []
            self._steps += 1
            self._step_tokens += step.tokens
            gained = self._take_logits(step.chunks, logits)
        return [delta for live in gained if (delta := self._delta(live)) is not None]

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

    def _move_blocks(self, step: ScheduledStep) -> None:
        if self._host_store is not None:
            if step.swap_out:
                self._store.swap_out(step.swap_out, self._host_store)
            if step.swap_in:
                self._store.swap_in(step.swap_in, self._host_store)
        if step.copies:
            self._store.copy_blocks(step.copies)

    def _chunk(self, chunk: ScheduledChunk) -> SequenceChunk:
        live = self._live[chunk.request_id]
        token_ids = self._scheduler.token_ids(chunk.request_id, chunk.sequence)
        return SequenceChunk(
            start=chunk.start,
            token_ids=token_ids[chunk.start : chunk.start + chunk.tokens],
            kv_blocks=chunk.kv_blocks,
            rope_tokens=live.rope_tokens,
            logit_rows=self._logit_rows(live, chunk),
        )

    def _logit_rows(self, live: LiveRequest, chunk: ScheduledChunk) -> int:
        """All rows while prompt log-probabilities are still due, else the last if it will be sampled."""
        if self._wants_prompt_rows(live):
            return chunk.tokens
        return 1 if chunk.samples else 0

    def _wants_prompt_rows(self, live: LiveRequest) -> bool:
        asked = live.sampling.prompt_logprobs is not None
        return asked and len(live.prompt_logprobs) < len(live.request.prompt_token_ids)

    def _take_logits(self, chunks: Sequence[ScheduledChunk], logits: torch.Tensor) -> list[LiveRequest]:
        """Sample every row that is due; returns the requests that gained something, in batch order."""
        rows: list[SamplingRow] = []
        row_logits: list[int] = []
        owners: list[tuple[LiveRequest, LiveSequence]] = []
        gained: list[LiveRequest] = []
        first_row = 0
        for chunk in chunks:
            live = self._live[chunk.request_id]
            row_count = self._logit_rows(live, chunk)
            if row_count and self._wants_prompt_rows(live):
                self._take_prompt_logprobs(live, chunk, logits[first_row : first_row + row_count])
            first_row += row_count
            if not chunk.samples:
                continue
            last_row = first_row - 1
            gained.append(live)
            if live.beam is not None:
                self._take_beam_row(live, chunk.sequence, logits[last_row])
                continue
            if not live.forked and live.sampling.sequences > 1:
                self._fan_out(live)
                sequences = live.sequences
            else:
                sequences = [live.sequences[chunk.sequence]]
            for sequence in sequences:
                rows.append(self._sampling_row(live, sequence))
                row_logits.append(last_row)
                owners.append((live, sequence))
        if rows:
            if len(rows) != len(logits) or row_logits != list(range(len(rows))):
                logits = logits[torch.tensor(row_logits, device=logits.device)]
            for (live, sequence), token in zip(owners, self._sample(logits, rows, owners), strict=True):
                if token is not None:
                    self._append(live, sequence, token)
        unique = dict.fromkeys(live.request.id for live in gained)
        return [self._live[id] for id in unique if id in self._live]

    def _sampling_row(self, live: LiveRequest, sequence: LiveSequence) -> SamplingRow:
        return SamplingRow(
            params=live.row_params,
            seed=live.seed,
            position=len(live.request.prompt_token_ids) + len(sequence.output_token_ids),
            sample_index=sequence.index,
            prompt_token_ids=live.request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            stop_token_ids=live.stop_token_ids,
            allowed=sequence.matcher.allowed() if sequence.matcher is not None else None,
        )

    def _sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplingRow],
        owners: Sequence[tuple[LiveRequest, LiveSequence]],
    ) -> Sequence[SampledToken | None]:
        """Sample all rows; those that cannot be sampled fail their own requests and no other."""
        vocab_limit = self.tokenizer.vocab_tokens
        try:
            return sample_rows(logits, rows, vocab_limit)
        except EngineFailure:
            sampled: list[SampledToken | None] = []
            for index, row in enumerate(rows):
                try:
                    sampled += sample_rows(logits[index : index + 1], [row], vocab_limit)
                except EngineFailure as failure:
                    sampled.append(None)
                    self._fail(owners[index][0], failure)
            return sampled

    def _fail(self, live: LiveRequest, failure: EngineFailure) -> None:
        if live.request.id in self._live:
            self.abort(live.request.id)
            self._failures.append((live.request.id, failure))

    def _fan_out(self, live: LiveRequest) -> None:
        """The prompt is computed: n samples go on from it, sharing its blocks."""
        first = live.sequences[0]
        live.sequences = [
            LiveSequence(
                index=index,
                detokenizer=first.detokenizer.fork(),
                matcher=first.matcher.fork() if first.matcher is not None else None,
            )
            for index in range(live.sampling.sequences)
        ]
        live.forked = True
        self._scheduler.fork(live.request.id, (0,) * live.sampling.sequences)

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

    # -- what a token means for its sequence -----------------------------------------------------------

    def _append(self, live: LiveRequest, sequence: LiveSequence, token: SampledToken) -> None:
        if live.request.id not in self._live:
            return
        token_id = token.token_id
        if not live.first_token_s:
            live.first_token_s = self._clock()
        sequence.output_token_ids.append(token_id)
        self._generated_tokens += 1
        if token.logprobs is not None:
            sequence.logprobs.append(token.logprobs)
            sequence.cumulative_logprob += token.logprobs.chosen.logprob
        if sequence.matcher is not None and token_id not in live.stop_token_ids:
            sequence.matcher.accept(token_id)
        self._end_or_continue(live, sequence, token_id)
        if sequence.finish_reason is None:
            self._scheduler.append(live.request.id, sequence.index, token_id)
        else:
            self._scheduler.finish_sequence(live.request.id, sequence.index)

    def _end_or_continue(self, live: LiveRequest, sequence: LiveSequence, token_id: int) -> None:
        params = live.sampling
        detokenizer = sequence.detokenizer
        if token_id in live.stop_token_ids:
            sequence.finish_reason = "stop"
            if token_id not in self._eos_token_ids or token_id in (params.stop_token_ids or ()):
                sequence.stop_reason = token_id
                if params.include_stop_str_in_output:
                    sequence.unsent_text += detokenizer.push([token_id], match_stops=False)[0]
        else:
            may_stop = len(sequence.output_token_ids) >= params.min_tokens
            text, stop_string = detokenizer.push([token_id], match_stops=may_stop)
            sequence.unsent_text += text
            if stop_string is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", stop_string
            elif sequence.matcher is not None and sequence.matcher.is_finished:
                sequence.finish_reason = "stop"
            elif len(sequence.output_token_ids) >= live.max_new_tokens:
                sequence.finish_reason = "length"
        if sequence.finish_reason is not None and detokenizer.stop_string is None:
            sequence.unsent_text += detokenizer.flush()
            if detokenizer.stop_string is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", detokenizer.stop_string

    # -- beam search -----------------------------------------------------------------------------------

    def _take_beam_row(self, live: LiveRequest, sequence: int, logits: torch.Tensor) -> None:
        """Keep the candidates of one beam; once every beam has some, choose the survivors."""
        assert live.beam is not None
        assert live.beam_options is not None
        in_vocab = logits[None, : self.tokenizer.vocab_tokens]
        live.beam_candidates[sequence] = top_candidates(in_vocab, live.beam_options.candidates_per_beam)[0]
        # The beams of a request step together, but their rows arrive one by one.
        if len(live.beam_candidates) < len(live.beam.beams):
            return
        candidates = [live.beam_candidates[index] for index in range(len(live.beam.beams))]
        live.beam_candidates = {}
        live.beam, parents = advance_beams(live.beam, candidates, live.beam_options)
        if not live.first_token_s:
            live.first_token_s = self._clock()
        self._generated_tokens += len(parents)
        if live.beam.done:
            if live.beam.finished:
                live.sequences = self._best_beams(live, live.beam)
            else:
                self._fail(
                    live, EngineFailure("beam search found no possible token: the logits are not finite")
                )
            return
        self._scheduler.fork(live.request.id, parents)
        for index, beam in enumerate(live.beam.beams):
            self._scheduler.append(live.request.id, index, beam.token_ids[-1])

    def _best_beams(self, live: LiveRequest, search: BeamSearch) -> list[LiveSequence]:
        """The winning hypotheses, best first, as sequences that are all unsent."""
        unused = live.sequences[0].detokenizer
        sequences: list[LiveSequence] = []
        for index, hypothesis in enumerate(best_beams(search, live.sampling.n)):
            beam = hypothesis.beam
            detokenizer = unused.fork()
            shown = beam.token_ids[:-1] if hypothesis.ended else beam.token_ids
            sequences.append(
                LiveSequence(
                    index=index,
                    detokenizer=detokenizer,
                    matcher=None,
                    output_token_ids=list(beam.token_ids),
                    unsent_text=detokenizer.push(shown)[0] + detokenizer.flush(),
                    logprobs=[
                        PositionLogprobs(TokenLogprob(token_id, logprob), ())
                        for token_id, logprob in zip(beam.token_ids, beam.token_logprobs, strict=True)
                    ],
                    finish_reason="stop" if hypothesis.ended else "length",
                )
            )
        return sequences

    # -- deltas ----------------------------------------------------------------------------------------

    def _delta(self, live: LiveRequest) -> RequestDelta | None:
        """What a request's reader is to be told after a step; ends the request when all its sequences have."""
        finished = all(sequence.finish_reason is not None for sequence in live.sequences)
        if live.ranked:
            if not finished:
                return None
            if live.beam is None:
                live.sequences = self._winners(live)
        sequences = tuple(
            self._sequence_delta(live, sequence)
            for sequence in live.sequences
            if len(sequence.output_token_ids) > sequence.sent_tokens
        )
        prompt_logprobs = None
        if live.prompt_logprobs and not live.prompt_logprobs_sent:
            live.prompt_logprobs_sent = True
            prompt_logprobs = tuple(live.prompt_logprobs)
        timing = None
        if finished:
            self._scheduler.finish(live.request.id)
            del self._live[live.request.id]
            timing = RequestTiming(live.arrived_s, live.scheduled_s, live.first_token_s, self._clock())
        return RequestDelta(
            request_id=live.request.id,
            sequences=sequences,
            finished=finished,
            prompt_tokens=len(live.request.prompt_token_ids),
            cached_tokens=live.cached_tokens,
            prompt_logprobs=prompt_logprobs,
            timing=timing,
        )

    def _sequence_delta(self, live: LiveRequest, sequence: LiveSequence) -> SequenceDelta:
        first, text = sequence.sent_tokens, sequence.unsent_text
        sequence.sent_tokens, sequence.unsent_text = len(sequence.output_token_ids), ""
        return SequenceDelta(
            index=sequence.index,
            token_ids=tuple(sequence.output_token_ids[first:]),
            text=text,
            logprobs=None if live.sampling.logprobs is None else tuple(sequence.logprobs[first:]),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _winners(self, live: LiveRequest) -> list[LiveSequence]:
        """The best n sequences, best first, numbered anew: `best_of` by mean log-probability."""
        ranked = sorted(
            live.sequences,
            key=lambda sequence: (
                -sequence.cumulative_logprob / len(sequence.output_token_ids),
                sequence.index,
            ),
        )[: live.sampling.n]
        for index, sequence in enumerate(ranked):
            sequence.index = index
        return ranked
