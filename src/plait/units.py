"""Sizes and durations as people write them; inside, size is bytes and time is seconds."""

import re

from plait.errors import BadRequest

_BYTES_PER_UNIT = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str | int) -> int:
    """Read a size such as `"16GiB"`, `"512 MB"` or `4096`.

    Raises:
        BadRequest: the text is not a non-negative size.
    """
    if isinstance(text, int):
        if text < 0:
            raise BadRequest(f"a size cannot be negative: {text}")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _BYTES_PER_UNIT:
        raise BadRequest(f"{text!r} is not a size; write for example '16GiB', '512MB' or '4096'")
    return int(float(match[1]) * _BYTES_PER_UNIT[match[2].lower()])


def format_bytes(size_bytes: float) -> str:
    """Print a size in the largest binary unit that keeps it at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def format_s(seconds: float) -> str:
    """Print a duration with the unit a person would choose."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min"
