"""The first of the cost models: an operation takes as long as its arithmetic or its memory traffic, whichever is more.

    seconds of an operation = max(flops / (peak * e(rows)), bytes / (bandwidth * e)) + launch

with the efficiencies `e` of the device, measured at a few shapes or assumed (`Efficiency`). A lower bound where they
are 1. Williams, Waterman and Patterson 2009. Several equal devices share every operation evenly, and pay for their
collectives.
"""

from bisect import bisect_right
from dataclasses import dataclass

from plait.costs.collectives import Interconnect, collectives_s, interconnect_named
from plait.costs.devices import Device
from plait.costs.model import NO_OVERHEAD, HostOverhead, IdealSeconds
from plait.costs.shape import OperationWork, SpanShape
from plait.costs.work import StepWork
from plait.errors import BadSetup, MissingCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Which part of a device's published peaks operations reach.

    `compute_fractions` at `rows` rows of a product, blended between them and constant outside; `attention_fractions`
    of attention with so many rows of a sequence, the same where there are none.
    """

    rows: tuple[int, ...] = (1,)
    compute_fractions: tuple[float, ...] = (1.0,)
    attention_fractions: tuple[float, ...] = ()
    bandwidth_fraction: float = 1.0
    launch_s: float = 0.0

    def __post_init__(self) -> None:
        wrong = not self.rows or list(self.rows) != sorted(self.rows) or len(set(self.rows)) < len(self.rows)
        if wrong or len(self.compute_fractions) != len(self.rows):
            raise BadSetup("an efficiency has as many fractions as rows, and its rows ascend")
        if self.attention_fractions and len(self.attention_fractions) != len(self.rows):
            raise BadSetup("an efficiency has as many fractions of attention as rows, or none")
        fractions = (*self.compute_fractions, *self.attention_fractions, self.bandwidth_fraction)
        if not all(0 < fraction <= 1 for fraction in fractions):
            raise BadSetup("an efficiency is a fraction above 0 and up to 1")

    def compute_fraction(self, rows: int, *, attention: bool = False) -> float:
        """Of the peak, for a product of so many rows."""
        fractions = (self.attention_fractions if attention else ()) or self.compute_fractions
        place = bisect_right(self.rows, rows)
        if place == 0 or place == len(self.rows):
            return fractions[max(place - 1, 0)]
        low, high = self.rows[place - 1], self.rows[place]
        part = (rows - low) / (high - low)
        return fractions[place - 1] * (1 - part) + fractions[place] * part


PERFECT = Efficiency()
ASSUMED = Efficiency(bandwidth_fraction=0.8, compute_fractions=(0.8,))
"""What vendors' libraries reach at large shapes on data-centre GPUs; an assumption wherever nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCosts:
    """The `CostModel` of a span on one device, or on `devices` equal ones in one machine, by arithmetic alone.

    `interconnect` joins them; None is the one that the device is known for.
    """

    shape: SpanShape
    device: Device
    efficiency: Efficiency = ASSUMED
    host: HostOverhead = NO_OVERHEAD
    devices: int = 1
    interconnect: Interconnect | None = None

    def __post_init__(self) -> None:
        if self.shape.formats.compute not in self.device.flops_per_s:
            raise MissingCost(
                f"there is no peak of {self.device.name!r} for {self.shape.formats.compute!r} arithmetic; known are "
                f"{', '.join(self.device.flops_per_s)}"
            )
        if self.devices < 1:
            raise BadSetup(f"{self.devices} devices compute nothing; take at least 1")
        for block, _ in self.shape.kinds():
            if block.attention.heads % self.devices:
                raise BadSetup(
                    f"{self.devices} devices cannot divide {block.attention.heads} heads evenly; take a number that "
                    "divides them"
                )
        if self.devices > 1 and self.interconnect is None:
            if self.device.interconnect is None:
                raise MissingCost(
                    f"it is not known what joins several {self.device.name!r}; name an interconnect"
                )
            object.__setattr__(self, "interconnect", interconnect_named(self.device.interconnect))

    @property
    def memory_bytes(self) -> int:
        """Of all devices together."""
        return self.device.memory_bytes * self.devices

    @property
    def weight_bytes(self) -> int:
        return self.shape.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return round(self.shape.kv_bytes_per_token * self._kv_copies)

    @property
    def hidden_bytes_per_token(self) -> int:
        return self.shape.hidden_bytes_per_token

    @property
    def idle_watts(self) -> float:
        return self.device.power.idle_watts * self.devices

    @property
    def extrapolated_steps(self) -> int:
        return 0

    def step_s(self, work: StepWork) -> float:
        seconds = sum(self.operation_s(operation) for operation in self.shape.operations(work))
        return seconds + self.collectives_s(work)

    def attention_s(self, work: StepWork) -> float:
        return sum(self.operation_s(operation) for operation in self.shape.attention(work))

    def collectives_s(self, work: StepWork) -> float:
        """The part of a step in which the devices exchange results; 0 for one."""
        if self.interconnect is None or self.devices == 1:
            return 0.0
        return collectives_s(self.shape, work, self.devices, self.interconnect)

    def host_s(self, work: StepWork) -> float:
        return self.host.of(work)

    def energy_j(self, work: StepWork) -> float:
        operations = self.shape.operations(work)
        busy_s = sum(self.operation_s(operation) for operation in operations) + self.collectives_s(work)
        return self.device.power.step_j(busy_s * self.devices, sum(self._bytes(each) for each in operations))

    def ideal(self, work: StepWork) -> IdealSeconds:
        operations = self.shape.operations(work)
        peak = self.device.flops_per_s[self.shape.formats.compute]
        return IdealSeconds(
            compute_s=sum(each.flops for each in operations) / (peak * self.devices),
            memory_s=sum(self._bytes(each) for each in operations)
            / (self.device.bandwidth_bytes_per_s * self.devices),
        )

    def operation_s(self, operation: OperationWork) -> float:
        """Seconds of one operation."""
        peak = self.device.flops_per_s[self.shape.formats.compute] * self.devices
        fraction = self.efficiency.compute_fraction(operation.rows, attention=_is_attention(operation))
        compute_s = operation.flops / (peak * fraction)
        bandwidth = self.device.bandwidth_bytes_per_s * self.efficiency.bandwidth_fraction * self.devices
        return max(compute_s, self._bytes(operation) / bandwidth) + self.efficiency.launch_s

    def _bytes(self, operation: OperationWork) -> float:
        """What all devices read and write together."""
        return operation.bytes * self._kv_copies if _is_attention(operation) else operation.bytes

    @property
    def _kv_copies(self) -> float:
        """Devices beyond the heads that the cache keeps apart hold copies of them."""
        cached_heads = min(block.attention.cached_heads for block, _ in self.shape.kinds())
        return max(1.0, self.devices / cached_heads)


def _is_attention(operation: OperationWork) -> bool:
    return operation.name.endswith("attention")
