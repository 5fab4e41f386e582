"""What cost models made of measurements have in common: facts of the span, and how far the measurements reach."""

from dataclasses import dataclass, field

from plait.costs.energy import PowerDraw
from plait.costs.model import HostOverhead, IdealSeconds
from plait.costs.work import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanFacts:
    """What is known of a span without measuring: its memory, and what its device draws."""

    weight_bytes: int
    kv_bytes_per_token: int
    hidden_bytes_per_token: int
    power: PowerDraw = field(default_factory=PowerDraw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """The largest work that was measured; None where that was not measured at all, which is another error.

    `context_tokens`: of all sequences of a step together; `longest_context_tokens`: of one.
    """

    tokens: float
    context_tokens: float
    sampled: float | None
    decodes: float | None
    longest_context_tokens: float

    def beyond(self, work: StepWork) -> str | None:
        """What of this work is larger than everything measured, in words."""
        features = work.features
        for name, value, most in (
            ("tokens", features.tokens, self.tokens),
            ("tokens of context", features.context_tokens, self.context_tokens),
            ("sampled rows", work.sampled, self.sampled),
            ("decoding sequences", features.decodes, self.decodes),
        ):
            if most is not None and value > most:
                return f"{value} {name} and the table ends at {most:.0f}"
        longest = max(work.context_tokens, default=0)
        if longest > self.longest_context_tokens:
            return f"a context of {longest} tokens and the table ends at {self.longest_context_tokens:.0f}"
        return None


class MeasuredCosts:
    """The part of a `CostModel` that does not depend on how measurements are turned into seconds.

    `block_share`: the span's blocks over those that were measured. Who answers beyond what was measured counts it.
    """

    def __init__(self, facts: SpanFacts, host: HostOverhead, *, block_share: float) -> None:
        self._facts = facts
        self._host = host
        self._block_share = block_share
        self._extrapolated = 0

    @property
    def weight_bytes(self) -> int:
        return self._facts.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self._facts.kv_bytes_per_token

    @property
    def hidden_bytes_per_token(self) -> int:
        return self._facts.hidden_bytes_per_token

    @property
    def idle_watts(self) -> float:
        return self._facts.power.idle_watts

    @property
    def extrapolated_steps(self) -> int:
        return self._extrapolated

    def host_s(self, work: StepWork) -> float:
        return self._host.of(work)

    def ideal(self, work: StepWork) -> IdealSeconds | None:
        """Not known: what was measured is what the machine does, not what it could do."""
        del work
        return None
