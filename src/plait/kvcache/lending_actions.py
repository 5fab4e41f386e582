"""How one instance lends and borrows, what it wants done about it, and what has come of it."""

from dataclasses import dataclass, field
from typing import Literal

from plait.ids import PeerId
from plait.kvcache.lending_plan import LendingRules
from plait.wire import BlockContent, BlockTold, LoanBooking

LendingPolicy = Literal["pull", "plan"]
"""`pull`: who is short asks the manager whom to ask (version 1). `plan`: the manager orders moves that serve more
(version 2); who cannot go on without memory asks as in `pull`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingOptions:
    """Policies and times of one instance.

    `moved_tokens_per_step`: tokens whose blocks may leave, or come home, with a step in which others decode; other
    steps leave it to the link. `heartbeat_s`: how often it tells the manager, and its creditors, how it is.
    `answer_within_s`: how long others may take to answer. `return_after_s`: how long borrowed blocks may stay empty.
    `spare_fraction`: free part of the pool beyond which blocks are taken home. `manage_s`: between two plans.
    """

    policy: LendingPolicy = "pull"
    moved_tokens_per_step: int = 16
    heartbeat_s: float = 0.5
    answer_within_s: float = 1.0
    return_after_s: float = 1.0
    spare_fraction: float = 0.125
    manage_s: float = 2.0
    rules: LendingRules = field(default_factory=lambda: LendingRules(small_batch=8))


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a peer, after all before it."""

    peer: PeerId
    message: LoanBooking


@dataclass(frozen=True, slots=True)
class SendContent:
    """Read an own block now, and send what it holds with the message."""

    peer: PeerId
    message: BlockContent | BlockTold
    kv_block: int


@dataclass(frozen=True, slots=True)
class WriteContent:
    """Write what came with the message that is being handled into an own block, now."""

    kv_block: int


@dataclass(frozen=True, slots=True)
class LoansChanged:
    """Blocks were borrowed, moved, returned or lost: who stood still for want of blocks may go on."""


LendingAction = Send | SendContent | WriteContent | LoansChanged


@dataclass(slots=True, kw_only=True)
class LendingCounts:
    """Blocks since the start, but for reservations, which count once each."""

    moved_out_total: int = 0
    moved_home_total: int = 0
    lost_total: int = 0
    given_up_total: int = 0
    recalled_total: int = 0
    expired_total: int = 0
    granted_total: int = 0
    refused_total: int = 0
    hunts_in_vain_total: int = 0
