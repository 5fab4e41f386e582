"""What became of a trial."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from plait.simulator.fault_schedule import FaultKind

Ending = Literal["answered", "failed", "cancelled", "lost with its gateway", "never ended"]
MOST_VIOLATIONS = 20
"""More are not written down: they follow from the first."""


@dataclass(slots=True, kw_only=True)
class RequestReport:
    """How a request ended: its error, if it failed, as class name and message."""

    ending: Ending = "never ended"
    error: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A session that went on in a later epoch, and the faults that struck in the seconds before.

    `noticed_s`: from the latest of these faults until the gateway began the new epoch; `gathered_s`: from there until
    it told the hops to go on; `stalled_s`: from the token before to the token after.
    """

    after: tuple[FaultKind, ...]
    noticed_s: float
    gathered_s: float
    stalled_s: float


@dataclass(slots=True, kw_only=True)
class TrialReport:
    """What became of a schedule; it is right if there are no `violations`, each of which names its event and time.

    `digest` is that of all that happened: the same for the same seed. `events` have run, and after `checks` of them a
    machine was checked. `struck` are the faults that found a victim. `replayed_tokens`: positions that hops were told
    to compute again. `computed_block_tokens` is the work of all engines, `needed_block_tokens` what the tokens that
    clients got needed: the rest are replays, wrong guesses and tokens that nobody heard of.
    """

    seed: int
    digest: str = ""
    events: int = 0
    checks: int = 0
    virtual_s: float = 0.0
    struck: Counter[FaultKind] = field(default_factory=Counter[FaultKind])
    requests: list[RequestReport] = field(default_factory=list[RequestReport])
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    replayed_tokens: int = 0
    computed_block_tokens: int = 0
    needed_block_tokens: int = 0
    violations: list[str] = field(default_factory=list[str])
