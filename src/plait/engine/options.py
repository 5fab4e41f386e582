"""What an engine is built from, fully decided: no `auto` is left in here."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from plait.errors import BadSetup
from plait.scheduling import StepLimits
from plait.units import format_bytes

# float64 is for exactness checks: rounding cannot change a token there.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DTYPE_ALIASES = {
    "float": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
}

# A CPU shares its memory with everything else on the machine: the cache takes a quarter of what is free,
# and never more than this unless it is asked for by size.
CPU_KV_CACHE_FRACTION = 0.25
CPU_KV_CACHE_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallel:
    """Over how many processes a model is divided, and which of them this one is; rank 0 has the engine.

    `address`: host and port at which rank 0 meets ranks on other hosts; None starts all of them on this one.
    `timeout_s`: how long a rank may leave the others waiting before it counts as lost.
    """

    size: int = 1
    rank: int = 0
    address: tuple[str, int] | None = None
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How one engine serves one model.

    `max_model_tokens` None takes the model's own limit, lowered to what the KV cache can hold.
    `quantization` is how the weights are packed for the CPU kernels: none, int8, int4 (groups of 32) or int4-g128.
    `kv_cache_dtype` auto is the dtype of the arithmetic. `packed_cache`: whether packed weights are kept on the disk.
    `swap_bytes` is host memory for preempted sequences (0: preemption always recomputes).
    `chat_template` replaces the checkpoint's own: the path of a file, or the template itself.
    """

    folder: Path
    chat_template: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    packed_cache: bool = True
    max_model_tokens: int | None = None
    kv_cache_bytes: int = 2**30
    swap_bytes: int = 0
    block_tokens: int = 16
    policy: str = "paged"
    limits: StepLimits = field(default_factory=StepLimits)
    prefix_caching: bool = True
    seed: int = 0
    threads: int = 0
    """CPU threads for tensor work, in each process; 0 shares out the cores that this process may use."""
    tensor_parallel: TensorParallel = TensorParallel()


def choose_device(asked: str) -> str:
    """Turn `auto` into the device to use, and check any other wish.

    Raises:
        BadSetup: CUDA was asked for and cannot be used; the message says why.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        return asked
    if asked == "cuda" or asked.startswith("cuda:"):
        if torch.cuda.is_available():
            return asked
        reason = (
            "this build of torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        )
        raise BadSetup(f"--device {asked}: {reason}; use --device cpu, or install a CUDA build of torch")
    raise BadSetup(f"--device {asked!r} is not known; choose auto, cpu or cuda")


def choose_dtype(asked: str, *, device: str, checkpoint_dtype: str) -> str:
    """Turn `auto` into the dtype of torch's arithmetic.

    On a CPU that is float32: plain torch is no faster in bfloat16 without AMX, and float32 keeps the
    tokens those of the reference. On a GPU it is the checkpoint's own type (float32 ones run in bfloat16).

    Raises:
        BadSetup: the dtype is not known.
    """
    name = DTYPE_ALIASES.get(asked, asked)
    if name == "auto":
        if device == "cpu":
            return "float32"
        return checkpoint_dtype if checkpoint_dtype in ("bfloat16", "float16") else "bfloat16"
    if name not in DTYPES:
        raise BadSetup(f"--dtype {asked!r} is not known; choose auto, {', '.join(DTYPES)}")
    return name


def choose_kv_cache_bytes(*, device: str, gpu_memory_fraction: float, weight_bytes: int) -> int:
    """How much memory the KV cache takes when nobody said: what is left beside weights that are yet to load.

    Raises:
        BadSetup: the weights alone do not fit.
    """
    if device == "cpu":
        free_bytes = available_memory_bytes() - weight_bytes
        if free_bytes <= 0:
            raise BadSetup(
                f"the weights need {format_bytes(weight_bytes)} and this machine has "
                f"{format_bytes(available_memory_bytes())} free; choose a smaller model or dtype"
            )
        return int(min(CPU_KV_CACHE_MAX_BYTES, CPU_KV_CACHE_FRACTION * free_bytes))
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # A tenth of the budget stays for activations.
    room_bytes = int(0.9 * (total_bytes * gpu_memory_fraction - (total_bytes - free_bytes) - weight_bytes))
    if room_bytes <= 0:
        raise BadSetup(
            f"the weights need {format_bytes(weight_bytes)} and {device} has {format_bytes(free_bytes)} free of "
            f"{format_bytes(total_bytes)}; choose a smaller model, or raise --gpu-memory-utilization"
        )
    return room_bytes


def available_memory_bytes() -> int:
    """Memory this process may still take: what the kernel calls available, within the cgroup's limit."""
    available_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available_bytes = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used_bytes = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available_bytes = min(available_bytes, int(limit) - used_bytes)
    except OSError:
        pass
    return available_bytes


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, within the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores
