# pyright: standard
"""Reads the weights of a span of blocks: only its own tensors, each once, straight into its place in memory.

A stored tensor is mapped, copied (and converted) into its slot, and unmapped, so the extra memory at any moment is the
pages of one tensor, plus one copy of it where its rows have to be reordered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.engine.checkpoint import Checkpoint, StoredTensor
from plait.engine.stored import check_finite, map_stored, unpack_mxfp4
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
    for stored, planned in by_place:
        if planned.scales is None:
            fill_slot(tensors[planned.key], planned, stored)
        else:
            scales = checkpoint.tensors[planned.scales]
            _fill_packed(tensors[planned.key], planned, map_stored(stored), map_stored(scales))
        done_bytes += sum(checkpoint.tensors[name].size_bytes for name, _ in planned.stored())
        if on_progress:
            on_progress(done_bytes, total_bytes)
    spec = checkpoint.spec
    return Weights(spec=spec, blocks=spec.all_blocks if blocks is None else blocks, tensors=tensors)


def fill_slot(slot: Tensor, planned: PlannedTensor, stored: StoredTensor) -> None:
    """Read one stored tensor to its place, in our row order.

    Raises:
        BadSetup: it cannot be read, or holds values that are not finite.
    """
    values = map_stored(stored)
    check_finite(values, stored)
    place_rows(slot if planned.expert is None else slot[planned.expert], planned, values)


def place_rows(place: Tensor, planned: PlannedTensor, values: Tensor) -> None:
    """Copy a stored tensor's rows, or those of one expert of a stack, to where they belong in theirs."""
    if planned.transposed:
        values = values.transpose(-1, -2)
    row_axis = -1 if planned.key.kind == "bias" or values.dim() == 1 else -2
    if planned.row_order is not None:
        values = values.index_select(row_axis, torch.from_numpy(planned.row_order))
    place.narrow(row_axis, planned.row_offset, planned.rows).copy_(values)


def _fill_packed(slot: Tensor, planned: PlannedTensor, blocks: Tensor, scales: Tensor) -> None:
    """Unpack experts one by one, so that no more than one of them is ever held in float32."""
    for expert in range(blocks.shape[0]):
        place_rows(slot[expert], planned, unpack_mxfp4(blocks[expert], scales[expert]))
