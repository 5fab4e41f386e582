"""What a session at a hop wants done: by the engine (feed, forget) and by the network (forward, tell, cut off)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.ids import PeerId
from plait.wire import Fault, Fenced, Step, Taken, Tokens

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Hidden states that came and are none."""

    reason: str


@dataclass(frozen=True, slots=True)
class Feed:
    """Give the engine inputs for positions from `start`; `rows` [tokens, hidden] where they are not token ids alone."""

    start: int
    token_ids: tuple[int, ...]
    rows: Rows | None
    sample_rows: int
    draft_tokens: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Let the engine know no more than `known` positions, fed or computed."""

    known: int


@dataclass(frozen=True, slots=True)
class Forward:
    """Send a step to the next hop, with its hidden states [tokens, hidden]."""

    peer: PeerId
    step: Step
    rows: Rows


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message without tensors."""

    peer: PeerId
    message: Fenced | Fault | Taken | Tokens


@dataclass(frozen=True, slots=True)
class CutOff:
    """The peer broke the protocol: do not listen to it any more."""

    peer: PeerId
    reason: str


HopAction = Feed | Forget | Forward | Tell | CutOff
