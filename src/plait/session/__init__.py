"""Requests and sessions: what was asked, what was answered, and how one sequence runs over a chain of workers.

sampling_params.py   how to turn logits into tokens, and constraints on the output
request.py           a request, and the deltas that answer it; route_ask.py: the machines it would like

One sequence over a chain; events in, actions out, nothing performed:

session_wish.py      what a session is to do, and how long it waits for others
chain_session.py     as its gateway drives it: opening, tokens, losses, recovery, deadlines; chain_events.py: in and out
hop_session.py       as one worker of the chain sees it: inputs, outputs, what is kept; hop_actions.py: what it wants
resume_plan.py       where each hop goes on after the chain has changed
row_buffer.py        hidden states of consecutive positions
prompt_lookup.py     guesses of the next tokens, from the text itself
wire_sampling.py     sampling parameters as they travel
"""

from plait.session.chain_events import (
    Ban,
    Begun,
    Cancelled,
    Emit,
    Ended,
    Fail,
    FindRoute,
    Heard,
    Leaving,
    Lost,
    Routed,
    Send,
    SessionAction,
    SessionEvent,
    TimePassed,
    Unroutable,
    ViewChanged,
)
from plait.session.chain_session import ChainSession
from plait.session.hop_actions import CutOff, Feed, Forget, Forward, HopAction, Rows, Tell, Unreadable
from plait.session.hop_session import HopFacts, HopSession, SampledRow
from plait.session.prompt_lookup import PromptLookup
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
from plait.session.resume_plan import plan_resume
from plait.session.route_ask import MAX_ASKED_DRAFT_TOKENS, RouteAsk
from plait.session.row_buffer import RowBuffer
from plait.session.sampling_params import (
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    Constraint,
    SamplingParams,
)
from plait.session.session_wish import SessionTimes, SessionWish
from plait.session.wire_sampling import from_wire_sampling, to_wire_sampling

__all__ = [
    "MAX_ASKED_DRAFT_TOKENS",
    "MAX_LOGPROBS",
    "MAX_SAMPLES",
    "MAX_STOP_STRINGS",
    "MIN_REPETITION_PENALTY",
    "Ban",
    "Begun",
    "Cancelled",
    "ChainSession",
    "Constraint",
    "CutOff",
    "Emit",
    "Ended",
    "Fail",
    "Feed",
    "FindRoute",
    "FinishReason",
    "Forget",
    "Forward",
    "GenerationRequest",
    "Heard",
    "HopAction",
    "HopFacts",
    "HopSession",
    "Leaving",
    "Lost",
    "PositionLogprobs",
    "PromptLookup",
    "RequestDelta",
    "RequestTiming",
    "RouteAsk",
    "Routed",
    "RowBuffer",
    "Rows",
    "SampledRow",
    "SamplingParams",
    "Send",
    "SequenceDelta",
    "SessionAction",
    "SessionEvent",
    "SessionTimes",
    "SessionWish",
    "Tell",
    "TimePassed",
    "TokenLogprob",
    "Unreadable",
    "Unroutable",
    "ViewChanged",
    "from_wire_sampling",
    "merge_deltas",
    "plan_resume",
    "to_wire_sampling",
]
