"""What there is to know about this machine, without torch."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

# What each CPU flag of /proc/cpuinfo is worth to inference, slowest first.
ISA_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "neon-dotprod",
    "bf16": "neon-bf16",
    "i8mm": "neon-i8mm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as its operating system describes it; 0 bytes and None mean not known."""

    system: str
    processor: str
    cores: int
    usable_cores: int
    core_limit: str | None
    isa: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    memory_limit_bytes: int | None


def this_machine() -> Machine:
    """Look at /proc and the control groups."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags", "Features").split())
    meminfo = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_cores = _quota_cores()
    free_bytes = _kibibytes(meminfo.get("MemAvailable"))
    limit_bytes, used_bytes = _memory_limit_bytes()
    usable_cores = affinity if quota_cores is None else min(affinity, max(1, round(quota_cores)))
    limits = [
        f"a quota of {quota_cores:g} cores" if quota_cores is not None and quota_cores < affinity else ""
    ]
    limits += [f"an affinity mask of {affinity}" if affinity < (os.cpu_count() or 1) else ""]
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_field(cpuinfo, "model name") or platform.processor() or "unknown",
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores,
        core_limit=" and ".join(limit for limit in limits if limit) or None,
        isa=tuple(name for flag, name in ISA_FLAGS.items() if flag in flags),
        memory_bytes=_kibibytes(meminfo.get("MemTotal")),
        free_memory_bytes=free_bytes if limit_bytes is None else min(free_bytes, limit_bytes - used_bytes),
        memory_limit_bytes=limit_bytes,
    )


def free_disk_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _quota_cores() -> float | None:
    """The control group's CPU quota (cgroup v2, then v1), in cores."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_limit_bytes() -> tuple[int | None, int]:
    """The control group's memory limit, if it has one, and what it uses."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(limit_file).strip(), _read(used_file).strip()
        # Version 1 says "no limit" with a number near 2**63.
        if limit.isdigit() and int(limit) < 2**60:
            return int(limit), int(used or 0)
    return None, 0


def _field(cpuinfo: str, *names: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _kibibytes(text: str | None) -> int:
    return int(text.split()[0]) * 1024 if text else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
