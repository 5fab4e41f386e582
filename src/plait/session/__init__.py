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
)
from plait.session.sampling_params import Constraint, SamplingParams

__all__ = [
    "Constraint",
    "FinishReason",
    "GenerationRequest",
    "PositionLogprobs",
    "RequestDelta",
    "RequestTiming",
    "SamplingParams",
    "SequenceDelta",
    "TokenLogprob",
]
