"""A request while the engine works on it: what was generated, what was told, and when it ends.

The engine decides what runs; a `LiveRequest` knows what a new token means for its sequences. Nothing here
touches tensors, blocks or other requests.
"""

from dataclasses import dataclass, field, replace

from plait.engine.beam import BeamOptions, BeamSearch, advance_beams, best_beams
from plait.engine.constraints import Matcher
from plait.engine.detokenizer import IncrementalDetokenizer
from plait.engine.sampling import (
    SampledToken,
    SamplingRow,
    check_logit_bias,
    ending_token_ids,
    takes_best_token,
)
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadRequest
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


@dataclass(slots=True)
class LiveSequence:
    """One token stream; `unsent_text` and the tokens from `sent_tokens` on are not told yet."""

    index: int
    detokenizer: IncrementalDetokenizer
    matcher: Matcher | None
    output_token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    sent_tokens: int = 0
    unsent_text: str = ""

    def fork(self, index: int) -> "LiveSequence":
        """A sequence that goes on independently from before its first token."""
        matcher = self.matcher.fork() if self.matcher is not None else None
        return LiveSequence(index=index, detokenizer=self.detokenizer.fork(), matcher=matcher)


def check_prompt(request: GenerationRequest, *, vocab_tokens: int, max_model_tokens: int) -> int:
    """Refuse what the model cannot take; returns the tokens left for an answer.

    Raises:
        BadRequest: it is empty, too long, or names tokens that the model does not have.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise BadRequest("the prompt is empty; give at least one token", param="prompt")
    if max(prompt) >= vocab_tokens or min(prompt) < 0:
        raise BadRequest(f"prompt token ids must be between 0 and {vocab_tokens - 1}", param="prompt")
    room_tokens = max_model_tokens - len(prompt)
    if room_tokens < 1:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens and this model's context is {max_model_tokens} tokens, "
            "prompt and answer together; shorten the prompt",
            param="prompt",
        )
    check_logit_bias(request.sampling, vocab_tokens)
    return room_tokens


def new_sequence(
    request: GenerationRequest, tokenizer: Tokenizer, *, index: int = 0, matcher: Matcher | None = None
) -> LiveSequence:
    """A sequence of a request before its first token."""
    sampling = request.sampling
    detokenizer = IncrementalDetokenizer(
        tokenizer,
        stop_strings=sampling.stop_strings,
        include_stop=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        continues_text=request.continues_text,
    )
    return LiveSequence(index=index, detokenizer=detokenizer, matcher=matcher)


@dataclass(slots=True)
class BeamProgress:
    """A beam search in the middle: its state, and the candidates of the beams seen in this step."""

    options: BeamOptions
    search: BeamSearch = field(default_factory=BeamSearch)
    candidates: dict[int, list[TokenLogprob]] = field(default_factory=dict[int, list[TokenLogprob]])

    def offer(self, beam: int, candidates: list[TokenLogprob]) -> tuple[int, ...] | None:
        """Take the candidates of one beam; with the last one, choose the survivors and return their parents."""
        self.candidates[beam] = candidates
        if len(self.candidates) < len(self.search.beams):
            return None
        in_order = [self.candidates[index] for index in range(len(self.search.beams))]
        self.candidates = {}
        self.search, parents = advance_beams(self.search, in_order, self.options)
        return parents


@dataclass(slots=True, kw_only=True)
class LiveRequest:
    """A request between `Engine.add` and its last delta.

    `eos_token_ids` are the model's own end tokens; `stop_token_ids` all that end this request. It begins with one
    sequence, which computes the prompt; `fan_out` makes the samples of it.
    """

    request: GenerationRequest
    seed: int
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    arrived_s: float
    sequences: list[LiveSequence]
    stop_token_ids: frozenset[int] = field(init=False)
    row_params: SamplingParams = field(init=False)
    """The sampling parameters, with the log-probabilities that ranking the sequences needs."""
    beam: BeamProgress | None = field(init=False, default=None)
    fanned_out: bool = False
    cached_tokens: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list[PositionLogprobs | None])
    prompt_logprobs_sent: bool = False

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.stop_token_ids = ending_token_ids(sampling, self.eos_token_ids)
        self.row_params = replace(sampling, logprobs=sampling.logprobs or 0) if self.ranked else sampling
        self.fanned_out = sampling.sequences == 1
        if sampling.beam_width:
            self.beam = BeamProgress(
                BeamOptions(
                    width=sampling.beam_width,
                    max_tokens=self.max_new_tokens,
                    end_token_ids=self.stop_token_ids,
                    length_penalty=sampling.length_penalty,
                    min_tokens=sampling.min_tokens,
                )
            )

    @property
    def sampling(self) -> SamplingParams:
        """What was asked."""
        return self.request.sampling

    @property
    def ranked(self) -> bool:
        """Whether sequences compete: the winners are told at the end, whole."""
        sampling = self.sampling
        return sampling.beam_width > 0 or (sampling.best_of or sampling.n) > sampling.n

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and answer of one sequence together, at most."""
        return len(self.request.prompt_token_ids) + self.max_new_tokens

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether log-probabilities of prompt tokens are still due."""
        asked = self.sampling.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < len(self.request.prompt_token_ids)

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def fan_out(self) -> None:
        """The prompt is computed: the samples go on from it."""
        self.sequences = [self.sequences[0].fork(index) for index in range(self.sampling.sequences)]
        self.fanned_out = True

    @property
    def takes_best_token(self) -> bool:
        """Whether its next tokens are simply the most likely ones: no other logit than the largest matters."""
        plain = self.beam is None and not self.wants_prompt_rows
        return plain and takes_best_token(
            self.row_params,
            output_tokens=min(len(each.output_token_ids) for each in self.sequences),
            stop_token_ids=self.stop_token_ids,
            constrained=self.sequences[0].matcher is not None,
        )

    def sampling_row(self, sequence: LiveSequence) -> SamplingRow:
        """What decides the next token of a sequence, besides its logits."""
        return SamplingRow(
            params=self.row_params,
            seed=self.seed,
            position=len(self.request.prompt_token_ids) + len(sequence.output_token_ids),
            sample_index=sequence.index,
            prompt_token_ids=self.request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            stop_token_ids=self.stop_token_ids,
            allowed=sequence.matcher.allowed() if sequence.matcher is not None else None,
        )

    def take_token(self, sequence: LiveSequence, token: SampledToken, *, completes: bool = False) -> None:
        """Add a sampled token to a sequence, which may end it; `completes`: its constraint allows no more."""
        token_id = token.token_id
        sequence.output_token_ids.append(token_id)
        if token.logprobs is not None:
            sequence.logprobs.append(token.logprobs)
            sequence.cumulative_logprob += token.logprobs.chosen.logprob
        if token_id in self.stop_token_ids:
            self._stop_at(sequence, token_id)
        else:
            self._show(sequence, token_id, completes)
        if sequence.finish_reason is not None and sequence.detokenizer.stop_string is None:
            sequence.unsent_text += sequence.detokenizer.flush()
            if sequence.detokenizer.stop_string is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", sequence.detokenizer.stop_string

    def _stop_at(self, sequence: LiveSequence, token_id: int) -> None:
        sequence.finish_reason = "stop"
        if token_id not in self.eos_token_ids or token_id in (self.sampling.stop_token_ids or ()):
            sequence.stop_reason = token_id
            if self.sampling.include_stop_str_in_output:
                sequence.unsent_text += sequence.detokenizer.push([token_id], match_stops=False)[0]

    def _show(self, sequence: LiveSequence, token_id: int, completes: bool) -> None:
        made_tokens = len(sequence.output_token_ids)
        may_stop = made_tokens >= self.sampling.min_tokens
        text, stop_string = sequence.detokenizer.push([token_id], match_stops=may_stop)
        sequence.unsent_text += text
        if sequence.matcher is not None:
            sequence.matcher.accept(token_id)
        if stop_string is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", stop_string
        elif completes or (sequence.matcher is not None and sequence.matcher.is_finished):
            sequence.finish_reason = "stop"
        elif made_tokens >= self.max_new_tokens:
            sequence.finish_reason = "length"

    def take_beams(self, search: BeamSearch) -> None:
        """End with the best hypotheses of a finished search."""
        unused = self.sequences[0]
        self.sequences = []
        for index, hypothesis in enumerate(best_beams(search, self.sampling.n)):
            beam = hypothesis.beam
            sequence = unused.fork(index)
            shown = beam.token_ids[:-1] if hypothesis.ended else beam.token_ids
            sequence.output_token_ids = list(beam.token_ids)
            sequence.unsent_text = sequence.detokenizer.push(shown)[0] + sequence.detokenizer.flush()
            sequence.finish_reason = "stop" if hypothesis.ended else "length"
            sequence.logprobs = [
                PositionLogprobs(TokenLogprob(token_id, logprob), ())
                for token_id, logprob in zip(beam.token_ids, beam.token_logprobs, strict=True)
            ]
            self.sequences.append(sequence)

    def take_delta(self, now_s: float) -> RequestDelta | None:
        """What is to be told after a step; None while sequences still compete."""
        finished = self.finished
        if self.ranked:
            if not finished:
                return None
            if self.beam is None:
                self.sequences = self._winners()
        prompt_logprobs = None
        if self.prompt_logprobs and not self.prompt_logprobs_sent:
            self.prompt_logprobs_sent = True
            prompt_logprobs = tuple(self.prompt_logprobs)
        return RequestDelta(
            request_id=self.request.id,
            sequences=tuple(
                self._sequence_delta(sequence)
                for sequence in self.sequences
                if len(sequence.output_token_ids) > sequence.sent_tokens
            ),
            finished=finished,
            prompt_tokens=len(self.request.prompt_token_ids),
            cached_tokens=self.cached_tokens,
            prompt_logprobs=prompt_logprobs,
            timing=RequestTiming(self.arrived_s, self.scheduled_s, self.first_token_s, now_s)
            if finished
            else None,
        )

    def _sequence_delta(self, sequence: LiveSequence) -> SequenceDelta:
        first, text = sequence.sent_tokens, sequence.unsent_text
        sequence.sent_tokens, sequence.unsent_text = len(sequence.output_token_ids), ""
        return SequenceDelta(
            index=sequence.index,
            token_ids=tuple(sequence.output_token_ids[first:]),
            text=text,
            logprobs=None if self.sampling.logprobs is None else tuple(sequence.logprobs[first:]),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _winners(self) -> list[LiveSequence]:
        """The best n sequences, best first, numbered anew: `best_of` by mean log-probability."""
        ranked = sorted(
            self.sequences, key=lambda one: (-one.cumulative_logprob / len(one.output_token_ids), one.index)
        )[: self.sampling.n]
        for index, sequence in enumerate(ranked):
            sequence.index = index
        return ranked
