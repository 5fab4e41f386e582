"""What is compared: a scheduling policy of plait, what clients ask room for, and who borrows from whom."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """A name and the scenario's words for it. `lending`: the policy of loans between machines, None without. `slow`:
    it may not sustain a quarter of what pages do, so low loads matter."""

    name: str
    scheduling: str
    asks: str = "answer"
    lending: str | None = None
    slow: bool = False


STATIC = Policy("static", "static", slow=True)
ORCA_MAX = Policy("orca, max", "orca", asks="context", slow=True)
ORCA_POWER = Policy("orca, pow2", "orca", asks="power-of-two")
ORCA_ORACLE = Policy("orca, oracle", "orca")
PAGED = Policy("paged", "paged")

BATCHING = (STATIC, ORCA_MAX, ORCA_POWER, ORCA_ORACLE, PAGED)
"""On one server. In the words of Kwon et al. 2023: a request-level baseline, Orca that reserves the model's context,
the next power of two, or the true length, and blocks on demand."""
