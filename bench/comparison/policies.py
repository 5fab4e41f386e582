"""What is compared: a scheduling policy of plait, what clients ask room for, and who borrows from whom."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """A name and the scenario's words for it. `lending`: the policy of loans between machines, None without. `slow`:
    it may not sustain a quarter of what pages do, so low loads matter. Without `shares` equal beginnings of prompts are
    not known as such. `most_sequences` run side by side.
    """

    name: str
    scheduling: str
    asks: str = "answer"
    lending: str | None = None
    slow: bool = False
    shares: bool = True
    most_sequences: int = 256


STATIC = Policy("static", "static", slow=True)
STATIC_ONE = Policy("static, one at a time", "static", slow=True, most_sequences=1)
STATIC_EIGHT = Policy("static, eight at a time", "static", slow=True, most_sequences=8)
ORCA_MAX = Policy("orca, max", "orca", asks="context", slow=True)
ORCA_POWER = Policy("orca, pow2", "orca", asks="power-of-two")
ORCA_ORACLE = Policy("orca, oracle", "orca")
PAGED = Policy("paged", "paged")

BATCHING = (STATIC, ORCA_MAX, ORCA_POWER, ORCA_ORACLE, PAGED)
"""On one server. In the words of Kwon et al. 2023: a request-level baseline, Orca that reserves the model's context,
the next power of two, or the true length, and blocks on demand."""

LENDING = (
    ORCA_ORACLE,
    PAGED,
    Policy("distkv, pull", "paged", lending="pull", shares=False),
    Policy("distkv, plan", "paged", lending="plan", shares=False),
    Policy("distkv, oracle", "paged", lending="oracle", shares=False),
    Policy("hybrid", "paged", lending="plan"),
)
"""On several machines. Pages as in vLLM share prefixes, loans as in the papers (version 1, version 2, and version 1 by
somebody who knows the lengths of answers) do not; the hybrid is one allocator that pages, shares, and lends what it
shares, planned by version 2."""
