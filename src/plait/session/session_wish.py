"""What a session is to do, and how patient it is."""

from dataclasses import dataclass

from plait.ids import SessionId
from plait.wire import HiddenFormat, WireSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionWish:
    """What a session is to do: continue the prompt to at most `max_tokens` tokens, prompt and answer together."""

    id: SessionId
    model: str
    blocks: range
    vocab_tokens: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: WireSampling
    arrived_unix_s: float = 0.0
    draft_tokens: int = 0
    wire_format: HiddenFormat = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimes:
    """How long a session waits: for its first chain, for answers of hops, for the next token, for a repaired chain.

    `avoid_s`: how long a lost hop is not asked again, twice as long after each further loss; `retry_s`: how often a
    missing route is looked for though nothing seems to have changed.
    """

    opening_s: float = 20.0
    answer_s: float = 15.0
    token_s: float = 30.0
    recovery_s: float = 120.0
    avoid_s: float = 1.0
    retry_s: float = 1.0
