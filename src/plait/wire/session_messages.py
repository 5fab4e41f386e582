"""Messages of sessions: one sequence, between a gateway and the workers of its chain (session/ says what they do).

    gateway → hops      OpenSession, Fence, Resume, CloseSession; Step to the first
    hop → next hop      Step, with hidden states as its tensors
    hop → hop before    Taken
    last hop            Tokens, to the gateway and to the first hop
    hop → gateway       Opened, Refused, Fenced, Fault

`epoch` grows with every change of the chain; what belongs to an older one is dropped. `number` counts the messages of
one kind from one sender in an epoch, from 1 without gaps: what comes twice is dropped, what is missing is noticed.
"""

from typing import Annotated, Literal

from msgspec import Meta

from plait.wire.bounded import Bounded, PeerIdField, Reason, SessionIdField
from plait.wire.hidden import HiddenFormat

MAX_HOPS = 256
MAX_SESSION_TOKENS = 2**24
MAX_STEP_TOKENS = 8192
"""Token ids in one message: a longer prompt comes in several."""
MAX_DRAFT_TOKENS = 32
MAX_REPORTED_LOGPROBS = 64
_MAX_BLOCK = 4096
_MAX_STOP_TOKEN_IDS = 2048
_MAX_BIASES = 4096
_MAX_CONSTRAINT_CHARACTERS = 1 << 18

Epoch = Annotated[int, Meta(ge=1, le=2**31)]
Number = Annotated[int, Meta(ge=1, le=2**53)]
Position = Annotated[int, Meta(ge=0, le=MAX_SESSION_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STEP_TOKENS)]
Block = Annotated[int, Meta(ge=0, le=_MAX_BLOCK)]
DraftTokens = Annotated[int, Meta(ge=0, le=MAX_DRAFT_TOKENS)]

RefusalCode = Literal["no_capacity", "bad_request", "not_served", "unknown_session"]
"""Nothing free now; it can never run there; those blocks or that model are not there; nothing to fence."""
FaultCode = Literal["unreachable", "misbehaved", "gap", "engine", "no_capacity", "bad_request"]
"""A peer cannot be reached; it sent nonsense; messages are missing; the sender's own engine failed, ran out of room, or
says that this can never run."""
FinishCode = Literal["", "stop", "length"]


class ChainHop(Bounded, frozen=True):
    """One peer runs one span of blocks, half open."""

    peer: PeerIdField
    first_block: Block
    end_block: Block

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.end_block)


Hops = Annotated[tuple[ChainHop, ...], Meta(min_length=1, max_length=MAX_HOPS)]


class WireConstraint(Bounded, frozen=True):
    """A language that the answer must belong to; `session.Constraint` says which kinds there are."""

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    text: Annotated[str, Meta(max_length=_MAX_CONSTRAINT_CHARACTERS)]


class WireSampling(Bounded, frozen=True, kw_only=True):
    """How the last hop chooses tokens; `session.SamplingParams` has the same names and checks the values again.

    `stop_token_ids` are all that end the answer, the model's own end tokens included.
    """

    seed: Annotated[int, Meta(ge=0)]
    sample_index: Annotated[int, Meta(ge=0, le=1024)]
    temperature: float
    top_k: Annotated[int, Meta(ge=0, lt=2**31)]
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Annotated[dict[TokenId, float], Meta(max_length=_MAX_BIASES)]
    min_tokens: Position
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=_MAX_STOP_TOKEN_IDS)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_REPORTED_LOGPROBS)] | None
    constraint: WireConstraint | None


class OpenSession(Bounded, frozen=True, tag="open_session", kw_only=True):
    """Take a session in, as the `index`-th of `hops`; one of an older epoch is forgotten first.

    `max_tokens`: prompt and answer together, at most. `sampling` goes to the last hop, `draft_tokens` (how many tokens
    it may guess ahead) counts for the first. `arrived_unix_s`: when the request came, by the gateway's clock; where
    memory is short, the earlier one goes first at every hop. A `held` session runs nothing before its `Resume`.
    """

    session: SessionIdField
    epoch: Epoch
    index: Annotated[int, Meta(ge=0, lt=MAX_HOPS)]
    hops: Hops
    model: Annotated[str, Meta(max_length=256)]
    prompt_tokens: Position
    max_tokens: Position
    wire_format: HiddenFormat
    sampling: WireSampling | None
    draft_tokens: DraftTokens
    arrived_unix_s: Annotated[float, Meta(ge=0, lt=2**36)]
    held: bool


class Opened(Bounded, frozen=True, tag="opened"):
    session: SessionIdField
    epoch: Epoch


class Refused(Bounded, frozen=True, tag="refused"):
    """The answer to `OpenSession` or `Fence` where there will be no session."""

    session: SessionIdField
    epoch: Epoch
    code: RefusalCode
    message: Reason


class Step(Bounded, frozen=True, tag="step"):
    """Inputs for positions from `start`; what was known from there on is forgotten first.

    Tensors: the hidden states of these positions (`encode_hidden`), none into the first hop. The last `sample_rows`
    positions are to be sampled; the last `draft_tokens` inputs are guesses, to be checked against the samples.
    """

    session: SessionIdField
    epoch: Epoch
    number: Number
    start: Position
    token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]
    sample_rows: Annotated[int, Meta(ge=0, le=MAX_DRAFT_TOKENS + 1)]
    draft_tokens: DraftTokens


class Taken(Bounded, frozen=True, tag="taken"):
    """The sender has computed all positions below `known`: the hop before may send further ahead."""

    session: SessionIdField
    epoch: Epoch
    known: Position


class TokenReport(Bounded, frozen=True):
    """Natural-log probability of a chosen token, and the most likely ones with theirs, best first."""

    logprob: float
    top: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=MAX_REPORTED_LOGPROBS)]


class Tokens(Bounded, frozen=True, tag="tokens"):
    """Sampled tokens for positions from `position`; `reports` runs parallel to them, if they were asked for."""

    session: SessionIdField
    epoch: Epoch
    number: Number
    position: Position
    token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_DRAFT_TOKENS + 1)]
    reports: Annotated[tuple[TokenReport, ...], Meta(max_length=MAX_DRAFT_TOKENS + 1)] | None
    finished: FinishCode


class Fence(Bounded, frozen=True, tag="fence"):
    """Stop, and say what is known. The gateway has `tokens` tokens, of which the last is `last_token_id`."""

    session: SessionIdField
    epoch: Epoch
    tokens: Position
    last_token_id: TokenId


class Fenced(Bounded, frozen=True, tag="fenced"):
    """The sender has computed the positions below `known`, and keeps its outputs for those from `kept_from` on."""

    session: SessionIdField
    epoch: Epoch
    known: Position
    kept_from: Position


class Resume(Bounded, frozen=True, tag="resume"):
    """Go on as the `index`-th of `hops`: know `own_known` positions, send the next hop those from `next_known` on.

    Position `tokens` - 1 is the one to be sampled next.
    """

    session: SessionIdField
    epoch: Epoch
    index: Annotated[int, Meta(ge=0, lt=MAX_HOPS)]
    hops: Hops
    tokens: Position
    own_known: Position
    next_known: Position


class Fault(Bounded, frozen=True, tag="fault"):
    """The session cannot go on as it is; `peer` is the one that the sender holds responsible."""

    session: SessionIdField
    epoch: Epoch
    peer: PeerIdField
    code: FaultCode
    reason: Reason


class CloseSession(Bounded, frozen=True, tag="close_session"):
    """The session has ended, or goes on without the receiver: free what it holds, unless its epoch is a later one."""

    session: SessionIdField
    epoch: Epoch


SessionMessage = (
    OpenSession | Opened | Refused | Step | Taken | Tokens | Fence | Fenced | Resume | Fault | CloseSession
)


def reason_text(text: str) -> str:
    """Cut a sentence to what a message may carry."""
    return text if len(text) <= 400 else text[:399] + "…"
