# pyright: standard
"""Reads the weights of a span of blocks: only its own tensors, each once, straight into its place in memory.

The files are memory-mapped. A stored tensor is copied (and converted) from the map into its slot, so the extra memory
at any moment is the pages of one tensor, plus one copy of it where its rows have to be reordered.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from plait.engine.checkpoint import Checkpoint, StoredTensor
from plait.errors import BadSetup
from plait.model import ModelSpec, PlannedTensor, SlotKey

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The tensors of a span of blocks, by slot; those of the model's ends have block None."""

    spec: ModelSpec
    blocks: range
    tensors: Mapping[SlotKey, Tensor]

    def get(self, block: int | None, slot: str, kind: str = "weight") -> Tensor | None:
        """The tensor of a slot, or None where this model (or span) has none."""
        return self.tensors.get(SlotKey(block, slot, "bias" if kind == "bias" else "weight"))

    @property
    def size_bytes(self) -> int:
        """Memory that the weights take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def load_weights(
    checkpoint: Checkpoint,
    blocks: range | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_progress: Progress | None = None,
) -> Weights:
    """Load a span (None: the whole model) in `dtype` on `device`; routers stay in float32.

    `on_progress` is told the bytes read and the bytes to read, after every tensor.

    Raises:
        BadSetup: a tensor is missing, superfluous, misshapen, unreadable or not finite; nothing stays loaded.
    """
    plan = checkpoint.plan(blocks)
    tensors: dict[SlotKey, Tensor] = {}
    try:
        for key, slot in plan.slots.items():
            slot_dtype = torch.float32 if slot.in_float32 and dtype != torch.float64 else dtype
            # Only biases may have parts that the checkpoint leaves out.
            allocate = torch.zeros if key.kind == "bias" else torch.empty
            tensors[key] = allocate(slot.shape, dtype=slot_dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        raise BadSetup(
            f"the weights of {checkpoint.folder} do not fit into the memory of {device}: {error}"
        ) from None
    by_place = sorted(
        ((checkpoint.tensors[planned.name], planned) for planned in plan.tensors),
        key=lambda pair: (pair[0].file.name, pair[0].offset_bytes),
    )
    total_bytes = sum(
        checkpoint.tensors[name].size_bytes for _, planned in by_place for name, _ in planned.stored()
    )
    done_bytes = 0
    if on_progress:
        on_progress(0, total_bytes)
    with ExitStack() as open_files:
        opened: dict[Path, safe_open] = {}

        def read(stored: StoredTensor) -> Tensor:
            nonlocal done_bytes
            if stored.file not in opened:
                opened[stored.file] = open_files.enter_context(_opened(stored))
            done_bytes += stored.size_bytes
            return _read(opened[stored.file], stored)

        for stored, planned in by_place:
            if planned.scales is None:
                _fill(tensors[planned.key], planned, read(stored), stored)
            else:
                _fill_packed(
                    tensors[planned.key], planned, read(stored), read(checkpoint.tensors[planned.scales])
                )
            if on_progress:
                on_progress(done_bytes, total_bytes)
    spec = checkpoint.spec
    return Weights(spec=spec, blocks=spec.all_blocks if blocks is None else blocks, tensors=tensors)


def _opened(stored: StoredTensor) -> safe_open:
    try:
        return safe_open(stored.file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BadSetup(f"{stored.file} cannot be read: {error}; download it again") from None


def _read(file: safe_open, stored: StoredTensor) -> Tensor:
    try:
        return file.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise BadSetup(
            f"{stored.file}: tensor {stored.name!r} cannot be read: {error}; download it again"
        ) from None


def _fill(slot: Tensor, planned: PlannedTensor, values: Tensor, stored: StoredTensor) -> None:
    """Copy one stored tensor to its place, in our row order."""
    # One pass in float32: the sum of finite weights is finite, and an infinity or NaN survives it.
    if not math.isfinite(float(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
        raise BadSetup(
            f"{stored.file}: tensor {stored.name!r} of shape {list(stored.shape)} holds values that are not finite; "
            "download the file again"
        )
    if planned.transposed:
        values = values.transpose(-1, -2)
    row_axis = -1 if planned.key.kind == "bias" or values.dim() == 1 else -2
    if planned.row_order is not None:
        values = values.index_select(row_axis, torch.from_numpy(planned.row_order))
    place = slot if planned.expert is None else slot[planned.expert]
    place.narrow(row_axis, planned.row_offset, planned.rows).copy_(values)


# The sixteen values of a 4-bit float with 2 exponent bits and 1 of mantissa: OCP Microscaling formats 1.0, 5.3.3.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Float32 [..., columns] from bytes [..., columns / 32, 16], low half first, and exponents [..., columns / 32]."""
    values = torch.tensor(_FP4_VALUES, dtype=torch.float32)
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # [..., columns / 32, 32]
    return torch.ldexp(values[codes.int()], (scales.int() - _SCALE_BIAS)[..., None]).flatten(-2)


def _fill_packed(slot: Tensor, planned: PlannedTensor, blocks: Tensor, scales: Tensor) -> None:
    """Unpack experts one by one, so that no more than one of them is ever held in float32."""
    order = None if planned.row_order is None else torch.from_numpy(planned.row_order)
    for expert in range(blocks.shape[0]):
        rows = unpack_mxfp4(blocks[expert], scales[expert])
        slot[expert].copy_(rows if order is None else rows[order])
