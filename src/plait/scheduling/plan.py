"""What a policy sees and what it may decide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from plait.scheduling.limits import StepLimits
from plait.scheduling.request import ScheduledRequest


class KvBlocks(Protocol):
    """What may be asked of a block pool while deciding."""

    @property
    def kv_blocks(self) -> int:
        """Blocks in total."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens that a block holds."""
        ...

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated."""
        ...

    @property
    def promised_blocks(self) -> int:
        """Blocks in use that will be free soon, since there is room elsewhere for what they hold."""
        ...

    def is_own(self, kv_block: int) -> bool:
        """Whether a block is memory of this machine, so that letting go of it frees something here."""
        ...

    def references(self, kv_block: int) -> int:
        """How many hold this block."""
        ...

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one sequence."""
        ...

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a chain."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerView:
    """The state before a step; policies read it and everything in it, and change nothing.

    `running` and `waiting` (new and preempted requests alike) are sorted by `order`. `running_sequences`
    counts each running request with its full fan-out.
    """

    running: Sequence[ScheduledRequest]
    waiting: Sequence[ScheduledRequest]
    running_sequences: int
    pool: KvBlocks
    host_pool: KvBlocks | None
    limits: StepLimits


class Grant(NamedTuple):
    """Tokens that a request computes in this step; `gang.split_tokens` says which sequence how many."""

    request: ScheduledRequest
    tokens: int


class Victim(NamedTuple):
    """A running request that gives its blocks back, to be swapped to the host or recomputed."""

    request: ScheduledRequest
    swap: bool


class Admission(NamedTuple):
    """A waiting request that starts or resumes.

    `reserved_blocks` are set aside for it at once; otherwise `prefixes` are cached blocks that its live
    sequences start with, in their order, and `stem_tokens` the part that its first sequence computes for
    all.
    """

    request: ScheduledRequest
    reserved_blocks: int = 0
    prefixes: Sequence[Sequence[int]] = ()
    stem_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A policy's decision: victims leave first, then admissions enter, then grants are computed.

    Grants may name requests that ran before or that are admitted here, never victims. Nobody is admitted in a
    step with victims.
    """

    grants: Sequence[Grant]
    victims: Sequence[Victim] = ()
    admissions: Sequence[Admission] = ()


class SchedulingPolicy(Protocol):
    """Decides each step; keeps no state of its own.

    `reserves`: room for every sequence at its maximum length is set aside at admission, and prefixes are
    not shared between requests.
    """

    @property
    def name(self) -> str:
        """What it is called on the command line."""
        ...

    @property
    def reserves(self) -> bool:
        """Whether admission reserves the maximum."""
        ...

    def plan_step(self, view: SchedulerView) -> StepPlan:
        """Choose what the next step does."""
        ...
