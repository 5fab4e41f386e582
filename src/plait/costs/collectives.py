"""What devices in one machine pay to compute one span together: tensor parallelism's sums and gathers.

Each device holds a part of the heads and of the inner width, so that every block adds up partial results twice (once
where attention and feed forward run side by side), the embedding once, and the head gathers the parts of its rows:
Shoeybi et al. 2019 (Megatron-LM), section 3. A sum goes round a ring, every device sending 2 (n - 1) / n of the bytes
in 2 (n - 1) hops; a gather half of that (Patarasuk and Yuan 2009).

Start and hop latencies are those with which NCCL chooses among the three protocols of its rings (NVIDIA NCCL 2.10,
src/graph/tuning.cc); here too the quickest is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from plait.costs.formats import ACTIVATION_BYTES
from plait.costs.shape import SpanShape
from plait.costs.work import StepWork
from plait.errors import BadSetup

Wires = Literal["nvlink", "pcie"]

REACHED_FRACTION = 235 / 300
"""Of a link's peak that a ring's bytes get: NCCL expects 235 of 300 GB/s on A100s."""
_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Protocol:
    """One of NCCL's: faster to start, or faster once it runs. Bytes reach `bandwidth_fraction` of what others do."""

    start_s: float
    hop_s: Mapping[Wires, float]
    bandwidth_fraction: float


_PROTOCOLS = (
    _Protocol(start_s=3.6e-6, hop_s={"nvlink": 0.47e-6, "pcie": 1.0e-6}, bandwidth_fraction=0.25),  # LL
    _Protocol(start_s=10.0e-6, hop_s={"nvlink": 1.9e-6, "pcie": 2.5e-6}, bandwidth_fraction=0.92),  # LL128
    _Protocol(start_s=8.4e-6, hop_s={"nvlink": 3.4e-6, "pcie": 5.7e-6}, bandwidth_fraction=1.0),  # Simple
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """What joins the devices of one machine: bytes per second that one of them sends, while it receives as many."""

    name: str
    wires: Wires
    bandwidth_bytes_per_s: float
    source: str

    def sum_s(self, payload_bytes: float, devices: int) -> float:
        """Seconds until every device has the sum of what all hold (all-reduce)."""
        return self._ring_s(payload_bytes / devices, 2 * (devices - 1))

    def gather_s(self, payload_bytes: float, devices: int) -> float:
        """Seconds until every device has the parts of all, together so many bytes (all-gather)."""
        return self._ring_s(payload_bytes / devices, devices - 1)

    def _ring_s(self, part_bytes: float, hops: int) -> float:
        if not hops or part_bytes <= 0:
            return 0.0
        part_s = part_bytes / (self.bandwidth_bytes_per_s * REACHED_FRACTION)
        return min(
            each.start_s + hops * (each.hop_s[self.wires] + part_s / each.bandwidth_fraction)
            for each in _PROTOCOLS
        )


def _interconnect(name: str, wires: Wires, *, gb_per_s: float, source: str) -> Interconnect:
    return Interconnect(name=name, wires=wires, bandwidth_bytes_per_s=gb_per_s * 1e9, source=source)


# Vendors print the sum of both directions for NVLink; half of it is meant here.
_PUBLISHED = (
    _interconnect("nvlink2", "nvlink", gb_per_s=150, source="NVIDIA V100 data sheet (SXM2: 300 GB/s), 2020"),
    _interconnect("nvlink3", "nvlink", gb_per_s=300, source="NVIDIA A100 data sheet (SXM: 600 GB/s), 2021"),
    _interconnect("nvlink4", "nvlink", gb_per_s=450, source="NVIDIA H100 data sheet (SXM5: 900 GB/s), 2023"),
    _interconnect(
        "nvlink3-bridge",
        "nvlink",
        gb_per_s=56.25,
        source="NVIDIA Ampere GA102 white paper v2.0 (two RTX 3090: 112.5 GB/s)",
    ),
    _interconnect("pcie3", "pcie", gb_per_s=15.75, source="PCI Express 3.0, 16 lanes of 8 GT/s, 128b/130b"),
    _interconnect("pcie4", "pcie", gb_per_s=31.5, source="PCI Express 4.0, 16 lanes of 16 GT/s, 128b/130b"),
    _interconnect("pcie5", "pcie", gb_per_s=63.0, source="PCI Express 5.0, 16 lanes of 32 GT/s, 128b/130b"),
)

INTERCONNECTS: Mapping[str, Interconnect] = MappingProxyType({each.name: each for each in _PUBLISHED})


def interconnect_named(name: str) -> Interconnect:
    """An interconnect with published figures.

    Raises:
        BadSetup: unknown name; the message lists the known ones.
    """
    found = INTERCONNECTS.get(name)
    if found is None:
        raise BadSetup(f"no interconnect is called {name!r}; known are {', '.join(INTERCONNECTS)}")
    return found


def collectives_s(shape: SpanShape, work: StepWork, devices: int, interconnect: Interconnect) -> float:
    """Seconds of a step in which the devices that share a span exchange results, one collective after the other."""
    tokens, model = work.features.tokens, shape.model
    sums = sum(count * _sums(block.placement) for block, count in shape.kinds()) + shape.embeds
    hidden_bytes = tokens * model.hidden * ACTIVATION_BYTES[shape.formats.activations]
    seconds = sums * interconnect.sum_s(hidden_bytes, devices)
    if shape.decides:
        seconds += interconnect.gather_s(work.sampled * model.vocab_tokens * _LOGIT_BYTES, devices)
    return seconds


def _sums(placement: str) -> int:
    return 1 if placement in ("parallel", "parallel_shared") else 2
