"""Published figures of devices: dense peaks (without sparsity), memory, and power. Data, with its source.

A vendor's figure is what the silicon could do; what a model gets of it is the `Efficiency` of the roofline. Idle draws
are rarely published: they are ours where a device's entry says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from plait.costs.energy import PowerDraw
from plait.errors import BadSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Peaks of one device. `flops_per_s` are multiplications and additions counted apart, by the format multiplied.

    `interconnect` joins several of them in the machines they are sold in (`collectives.py`); None: nothing does.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bandwidth_bytes_per_s: float
    memory_bytes: int
    power: PowerDraw
    source: str
    interconnect: str | None = None


def _device(
    name: str,
    *,
    tflops: Mapping[str, float],
    gb_per_s: float,
    gb: float,
    idle_watts: float,
    board_watts: float,
    source: str,
    interconnect: str | None = None,
) -> Device:
    return Device(
        name=name,
        flops_per_s=MappingProxyType({format: value * 1e12 for format, value in tflops.items()}),
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        memory_bytes=round(gb * 1e9),
        power=PowerDraw(idle_watts=idle_watts, busy_watts=board_watts),
        source=source,
        interconnect=interconnect,
    )


# Peaks are the vendor's for tensor cores, dense; "fp32" is plain arithmetic. Where a data sheet prints only the value
# with sparsity, half of it is meant. Board watts are the data sheet's maximum, idle watts are typical readings.
_PUBLISHED = (
    _device(
        "h200",
        tflops={"bf16": 989.5, "fp8": 1979, "int8": 1979, "fp32": 67},
        gb_per_s=4800,
        gb=141,
        idle_watts=75,
        board_watts=700,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM), 2024",
        interconnect="nvlink4",
    ),
    _device(
        "h100",
        tflops={"bf16": 989.5, "fp8": 1979, "int8": 1979, "fp32": 67},
        gb_per_s=3350,
        gb=80,
        idle_watts=70,
        board_watts=700,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM5), 2023",
        interconnect="nvlink4",
    ),
    _device(
        "a100-80gb",
        tflops={"bf16": 312, "int8": 624, "fp32": 19.5},
        gb_per_s=2039,
        gb=80,
        idle_watts=55,
        board_watts=400,
        source="NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM), 2021",
        interconnect="nvlink3",
    ),
    _device(
        "a100-40gb",
        tflops={"bf16": 312, "int8": 624, "fp32": 19.5},
        gb_per_s=1555,
        gb=40,
        idle_watts=50,
        board_watts=400,
        source="NVIDIA A100 Tensor Core GPU data sheet (40 GB SXM), 2020",
        interconnect="nvlink3",
    ),
    _device(
        "a10",
        tflops={"bf16": 125, "int8": 250, "fp32": 31.2},
        gb_per_s=600,
        gb=24,
        idle_watts=20,
        board_watts=150,
        source="NVIDIA A10 Tensor Core GPU data sheet, 2021",
        interconnect="pcie4",
    ),
    _device(
        "l40s",
        tflops={"bf16": 362, "fp8": 733, "int8": 733, "fp32": 91.6},
        gb_per_s=864,
        gb=48,
        idle_watts=35,
        board_watts=350,
        source="NVIDIA L40S GPU data sheet, 2023",
        interconnect="pcie4",
    ),
    _device(
        "l4",
        tflops={"bf16": 121, "fp8": 242, "int8": 242, "fp32": 30.3},
        gb_per_s=300,
        gb=24,
        idle_watts=15,
        board_watts=72,
        source="NVIDIA L4 Tensor Core GPU data sheet, 2023",
        interconnect="pcie4",
    ),
    _device(
        # No bf16: fp16 has the same peak on Turing and is what models run in there.
        "t4",
        tflops={"fp16": 65, "bf16": 65, "int8": 130, "fp32": 8.1},
        gb_per_s=320,
        gb=16,
        idle_watts=10,
        board_watts=70,
        source="NVIDIA T4 Tensor Core GPU data sheet, 2019 (320 GB/s; 'bf16' stands for fp16)",
        interconnect="pcie3",
    ),
    _device(
        "v100",
        tflops={"fp16": 125, "bf16": 125, "fp32": 15.7},
        gb_per_s=900,
        gb=32,
        idle_watts=40,
        board_watts=300,
        source="NVIDIA V100 Tensor Core GPU data sheet (SXM2 32 GB), 2020 ('bf16' stands for fp16)",
        interconnect="nvlink2",
    ),
    _device(
        "rtx4090",
        tflops={"bf16": 165.2, "fp8": 330.3, "int8": 660.6, "fp32": 82.6},
        gb_per_s=1008,
        gb=24,
        idle_watts=20,
        board_watts=450,
        source="NVIDIA Ada GPU Architecture white paper v2.02, appendix A (fp32 accumulation)",
        interconnect="pcie4",
    ),
    _device(
        "rtx3090",
        tflops={"bf16": 71, "int8": 284, "fp32": 35.6},
        gb_per_s=936,
        gb=24,
        idle_watts=20,
        board_watts=350,
        source="NVIDIA Ampere GA102 GPU Architecture white paper v2.0, appendix A (fp32 accumulation)",
        interconnect="pcie4",
    ),
    _device(
        "m2",
        tflops={"bf16": 3.6, "fp32": 3.6},
        gb_per_s=100,
        gb=24,
        idle_watts=4,
        board_watts=20,
        source="Apple newsroom, M2, June 2022 (10-core GPU, 3.6 TFLOPS, 100 GB/s); watts are an estimate",
    ),
    _device(
        "m2-ultra",
        tflops={"bf16": 27.2, "fp32": 27.2},
        gb_per_s=800,
        gb=192,
        idle_watts=10,
        board_watts=150,
        source="Apple newsroom, M2 Ultra, June 2023 (76-core GPU, 27.2 TFLOPS, 800 GB/s); watts are an estimate",
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _PUBLISHED})


def device_named(name: str) -> Device:
    """A device with published figures.

    Raises:
        BadSetup: unknown name; the message lists the known ones.
    """
    device = DEVICES.get(name)
    if device is None:
        raise BadSetup(
            f"no device called {name!r} has published figures here; known are {', '.join(DEVICES)}"
        )
    return device
