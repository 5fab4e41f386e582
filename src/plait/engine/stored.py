# pyright: standard
"""One stored tensor at a time: mapped from its file, checked, unpacked.

A map is private to its tensor and goes with it, so a process never keeps more of a file in its memory than what it is
reading, however large the file is.
"""

import math
import mmap

import torch
from torch import Tensor

from plait.engine.checkpoint import StoredTensor
from plait.errors import BadSetup

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}

# The sixteen values of a 4-bit float with 2 exponent bits and 1 of mantissa: OCP Microscaling formats 1.0, 5.3.3.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127


def map_stored(stored: StoredTensor) -> Tensor:
    """The tensor in its file; reading has begun, and its pages are given back with the last view of it.

    Raises:
        BadSetup: the file cannot be read.
    """
    start_bytes = stored.offset_bytes // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    lead_bytes = stored.offset_bytes - start_bytes
    dtype = _DTYPES[stored.dtype]
    try:
        with stored.file.open("rb") as file:
            # Copied on write, so that torch takes it for memory of its own; nobody writes to it.
            pages = mmap.mmap(
                file.fileno(), lead_bytes + stored.size_bytes, access=mmap.ACCESS_COPY, offset=start_bytes
            )
    except (OSError, ValueError) as error:
        raise BadSetup(
            f"{stored.file}: tensor {stored.name!r} cannot be read: {error}; download it again"
        ) from None
    if hasattr(mmap, "MADV_WILLNEED"):
        pages.madvise(mmap.MADV_WILLNEED)
    raw = torch.frombuffer(pages, dtype=torch.uint8, offset=lead_bytes)
    if lead_bytes % dtype.itemsize:
        raw = raw.clone()  # old files do not align their tensors
    return raw.view(dtype).view(stored.shape)


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; there is at least one value."""
    # One pass, and NaN is passed on; `isfinite` would take twenty to forty times as long.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(values))


def check_finite(values: Tensor, stored: StoredTensor) -> None:
    """Refuse infinities and NaN, which would come out of every product.

    Raises:
        BadSetup: there is one.
    """
    if not all_finite(values):
        raise BadSetup(
            f"{stored.file}: tensor {stored.name!r} of shape {list(stored.shape)} holds values that are not finite; "
            "download the file again"
        )


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Float32 [..., columns] from bytes [..., columns / 32, 16], low half first, and exponents [..., columns / 32]."""
    values = torch.tensor(_FP4_VALUES, dtype=torch.float32)
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # [..., columns / 32, 32]
    return torch.ldexp(values[codes.int()], (scales.int() - _SCALE_BIAS)[..., None]).flatten(-2)
