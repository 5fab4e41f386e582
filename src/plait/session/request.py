"""One request for generation, and what comes back for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from plait.ids import RequestId
from plait.session.route_ask import RouteAsk
from plait.session.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A prompt in token ids and how to continue it.

    A lower `priority` runs earlier; equals run first come, first served. Requests share cached prefixes
    only with requests of the same `cache_salt` (one per tenant). `continues_text` keeps the space that some
    tokenizers drop before the first word: right where the answer is read on from the prompt, wrong for a chat.
    `route` None leaves it to the swarm, if there is one, which machines answer.
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    continues_text: bool = True
    route: RouteAsk | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability under the model, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position and its most likely alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one sequence of a request gained in one step.

    `text` holds whole characters only and never a prefix of a stop string that may still complete.
    `logprobs` runs parallel to `token_ids`, or is None when none were asked for. `stop_reason` is the
    stop string or stop token id that ended the sequence (None for the model's own end token).
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[PositionLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When the engine did what for a request, in seconds of its own monotonic clock."""

    arrived_s: float
    scheduled_s: float
    first_token_s: float
    finished_s: float


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """What a request gained in one step; the last one has `finished` set.

    Requests whose sequences compete (`best_of` above `n`, beam search) send their winners at the end, whole.
    `prompt_logprobs` comes once, with the first delta: None for the first prompt token. `timing` comes
    with the last delta of a request that was not aborted.
    """

    request_id: RequestId
    sequences: tuple[SequenceDelta, ...]
    finished: bool
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    timing: RequestTiming | None = None


def merge_deltas(deltas: Sequence[RequestDelta]) -> RequestDelta:
    """The one delta that says what several of one request say, in order; there is at least one."""
    if len(deltas) == 1:
        return deltas[0]
    parts: dict[int, list[SequenceDelta]] = {}
    for delta in deltas:
        for sequence in delta.sequences:
            parts.setdefault(sequence.index, []).append(sequence)
    prompt_logprobs = next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None)
    sequences = tuple(_merge_sequence_deltas(of_one) for of_one in parts.values())
    return replace(deltas[-1], sequences=sequences, prompt_logprobs=prompt_logprobs)


def _merge_sequence_deltas(deltas: Sequence[SequenceDelta]) -> SequenceDelta:
    logprobs = None
    if any(delta.logprobs is not None for delta in deltas):
        logprobs = tuple(position for delta in deltas for position in delta.logprobs or ())
    return replace(
        deltas[-1],
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=logprobs,
    )
