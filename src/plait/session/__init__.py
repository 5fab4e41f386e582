"""One request: what was asked and what was answered.

sampling_params.py   how to turn logits into tokens, and constraints on the output
request.py           a request, and the deltas that answer it
"""

from plait.session.request import (
    FinishReason,
    GenerationRequest,
    PositionLogprobs,
    RequestDelta,
    RequestTiming,
    SequenceDelta,
    TokenLogprob,
    merge_deltas,
)
from plait.session.sampling_params import (
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    Constraint,
    SamplingParams,
)

__all__ = [
    "MAX_LOGPROBS",
    "MAX_SAMPLES",
    "MAX_STOP_STRINGS",
    "MIN_REPETITION_PENALTY",
    "Constraint",
    "FinishReason",
    "GenerationRequest",
    "PositionLogprobs",
    "RequestDelta",
    "RequestTiming",
    "SamplingParams",
    "SequenceDelta",
    "TokenLogprob",
    "merge_deltas",
]
