"""What every cost model answers, and the part of a step that is not the device's."""

from dataclasses import dataclass
from typing import Protocol

from plait.costs.work import StepWork


@dataclass(frozen=True, slots=True)
class IdealSeconds:
    """How long a step would take if only its arithmetic, or only its memory traffic, took time, at the device's peaks.

    Over the seconds that it took, they are MFU and MBU.
    """

    compute_s: float
    memory_s: float


class CostModel(Protocol):
    """Estimated costs of running one span of a model's blocks on one device.

    The time of a step is `step_s + host_s`, unless its driver overlaps the two.
    """

    @property
    def weight_bytes(self) -> int:
        """Memory of the span's weights."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values in the span's blocks."""
        ...

    @property
    def hidden_bytes_per_token(self) -> int:
        """What one token of a step sends on to the next span."""
        ...

    @property
    def idle_watts(self) -> float:
        """What the device draws while it computes nothing; 0 where it is not known."""
        ...

    @property
    def extrapolated_steps(self) -> int:
        """How many answers so far lay outside of what was measured; 0 for ever unless that was allowed."""
        ...

    def step_s(self, work: StepWork) -> float:
        """Seconds of the device for one forward pass over the span.

        Raises:
            MissingCost: there is no measurement for a part of the work.
            OutsideDomain: the work is larger than everything that was measured.
        """
        ...

    def attention_s(self, work: StepWork) -> float:
        """The part of `step_s` that attention takes: what another device does for a sequence whose keys it holds.

        Raises:
            MissingCost: there is no measurement for it.
        """
        ...

    def host_s(self, work: StepWork) -> float:
        """Seconds around the pass: scheduling, inputs, sampling, handing out."""
        ...

    def ideal(self, work: StepWork) -> IdealSeconds | None:
        """The least that the pass could take; None where the device's peaks are not known."""
        ...

    def energy_j(self, work: StepWork) -> float:
        """Joules of the pass, beyond what the device draws when idle."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOverhead:
    """Time of the host around a pass, linear in what it handles."""

    per_step_s: float = 0.0
    per_sequence_s: float = 0.0
    per_token_s: float = 0.0
    per_sample_s: float = 0.0

    def of(self, work: StepWork) -> float:
        """Seconds around this pass."""
        features = work.features
        return (
            self.per_step_s
            + self.per_sequence_s * features.sequences
            + self.per_token_s * features.tokens
            + self.per_sample_s * work.sampled
        )


NO_OVERHEAD = HostOverhead()
