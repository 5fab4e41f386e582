# pyright: standard
"""What measured times depend on."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from plait.engine import usable_cores
from plait.kernels import current_isa, native_available

_CPU_WORDS = ("model name", "cpu family", "model", "stepping")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LIBRARIES = ("plait", "torch", "numpy")


def hardware_fingerprint(*, device: str, threads: int) -> Mapping[str, str]:
    """Words that are the same wherever a profile holds; `threads` 0 takes all cores."""
    words = {"device": device.partition(":")[0], "machine": platform.machine(), "processor": _processor()}
    if device == "cpu":
        words["threads"] = str(threads or usable_cores())
        words["caches"] = _caches()
        words["kernels"] = current_isa() if native_available else "torch"
    elif not torch.cuda.is_available():
        words["gpu"] = "none"
    else:
        words["gpu"] = torch.cuda.get_device_name(device)
        words["gpu_bytes"] = str(torch.cuda.get_device_properties(device).total_memory)
        words["cuda"] = str(torch.version.cuda)
    return words


def library_versions() -> Mapping[str, str]:
    """Versions of what computes; they are noted and need not be equal."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def _processor() -> str:
    words: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            words.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor()
    known = [words[name] for name in _CPU_WORDS if name in words]
    return " ".join(known) or platform.processor()


def _caches() -> str:
    """Sizes of the caches that one core sees, smallest level first."""
    try:
        names = sorted(name for name in os.listdir(_CACHES) if name.startswith("index"))
        return " ".join((_CACHES / name / "size").read_text().strip() for name in names)
    except OSError:
        return "unknown"
