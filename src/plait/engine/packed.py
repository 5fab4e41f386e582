# pyright: standard
"""Weights for the CPU kernels: packed once from the checkpoint, or read back from the disk as they were packed.

All of a span lies in one arena of huge pages: every matrix in the panels of its format (csrc/table.h), and whatever is
small (norms, biases, routers, positions, sinks) in float32 between them. The arena is what the disk cache keeps.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from plait.engine.checkpoint import Checkpoint
from plait.engine.loader import Progress, fill_slot, place_rows
from plait.engine.packed_cache import LAYOUT_VERSION, SUFFIX, PackedFile, packed_cache_folder
from plait.engine.packed_layout import NO_ROW, WHOLE, Cut, Shard, check_shard, cut_of
from plait.engine.stored import check_finite, map_stored, unpack_mxfp4
from plait.errors import BadSetup
from plait.model import ModelSpec, PlannedSlot, PlannedTensor, SlotKey, TensorPlan
from plait.units import format_bytes

if TYPE_CHECKING:
    from plait.kernels._native import Arena

__all__ = [
    "WEIGHT_FORMATS",
    "MatrixKey",
    "PackedEntry",
    "PackedWeights",
    "Shard",
    "WeightFormatName",
    "load_packed",
    "packed_cache_folder",
    "packed_weight_bytes",
]

WeightFormatName = Literal["bf16", "int8", "int4", "int4-g128"]
"""`int4` has groups of 32 inputs that share a scale."""

WEIGHT_FORMATS: Mapping[WeightFormatName, int] = {"bf16": 0, "int8": 1, "int4": 2, "int4-g128": 3}
"""The numbers of csrc/table.h."""

# With embedding and head in int4 too, `tiny` is twice as far from its bfloat16 self (docs/systems/cpu-inference.md).
_EMBEDDING_FORMATS: Mapping[WeightFormatName, WeightFormatName] = {
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int8",
    "int4-g128": "int8",
}

MatrixKey = tuple[int | None, str, int | None]
"""Block (None: the model's ends), slot, expert (None: there are none)."""

# Panels are read in units of a cache line.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEntry:
    """A packed matrix: `columns` outputs of `depth` inputs, from byte `offset` of the arena on."""

    format: int
    columns: int
    depth: int
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeights:
    """A rank's weights of a span of blocks; entries and tensors lie in the arena.

    `small` is float32 as the checkpoint has it, but for the biases of matrices: those have a value for each packed
    column, padded to whole panels ([experts, columns] for a stack), and are missing on every rank but the first where
    the ranks' outputs are added up.
    """

    spec: ModelSpec
    blocks: range
    shard: Shard
    arena: "Arena"
    matrices: Mapping[MatrixKey, PackedEntry]
    small: Mapping[SlotKey, Tensor]

    @property
    def size_bytes(self) -> int:
        """Memory that the weights take."""
        return self.arena.memory.size


def load_packed(
    checkpoint: Checkpoint,
    *,
    blocks: range | None = None,
    format: WeightFormatName,
    embedding_format: WeightFormatName | None = None,
    shard: Shard = WHOLE,
    threads: int,
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> PackedWeights:
    """Pack a span (None: the whole model), or read it from the folder `cache` if it was packed before.

    `embedding_format` (None: `format`, but int8 beside int4) is that of the embedding and of the head, which some
    models have in one matrix. At most the source of one matrix, or of one expert, is held beside the packed weights. A
    cache that is missing is written; one that does not fit the checkpoint, or is damaged, is replaced, and the log says
    so. `on_progress` is told bytes read and bytes to read; it begins anew where a cache turns out to be of no use.

    Raises:
        BadSetup: a tensor is missing, superfluous, misshapen, unreadable or not finite, the model cannot be cut so, or
            there is not enough memory; nothing stays loaded.
    """
    selection = _Selection.of(checkpoint, blocks, format, embedding_format, shard)
    plan = checkpoint.plan(selection.blocks)
    layout = _lay_out(checkpoint.spec, plan, selection)
    file = None
    if cache is not None:
        file = PackedFile(
            folder=cache,
            name=_cache_name(checkpoint, selection),
            model_folder=checkpoint.folder,
            content=_content(checkpoint, selection, layout),
        )
    arena = _arena(checkpoint, layout)
    if file is None or not file.read(arena.memory, threads=threads, on_progress=on_progress):
        arena = _arena(checkpoint, layout)  # the cache may have left something in the other one
        _Packing(checkpoint, layout, arena, on_progress).run(plan, threads)
        if file is not None:
            file.write(arena.memory, threads=threads)
    return PackedWeights(
        spec=checkpoint.spec,
        blocks=selection.blocks,
        shard=shard,
        arena=arena,
        matrices=layout.matrices,
        small={key: place.view_in(arena.memory) for key, place in layout.small.items()},
    )


def packed_weight_bytes(
    checkpoint: Checkpoint,
    *,
    blocks: range | None = None,
    format: WeightFormatName,
    embedding_format: WeightFormatName | None = None,
    shard: Shard = WHOLE,
) -> int:
    """Memory that the weights take once they are packed.

    Raises:
        BadSetup: as for `load_packed`, as far as it can be known without reading a tensor.
    """
    selection = _Selection.of(checkpoint, blocks, format, embedding_format, shard)
    return _lay_out(checkpoint.spec, checkpoint.plan(selection.blocks), selection).size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selection:
    """Which part of a model is packed, and how."""

    blocks: range
    format: WeightFormatName
    embedding_format: WeightFormatName
    shard: Shard

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        blocks: range | None,
        format: WeightFormatName,
        embedding_format: WeightFormatName | None,
        shard: Shard,
    ) -> Self:
        """What was asked for, checked against the model."""
        blocks = checkpoint.spec.all_blocks if blocks is None else blocks
        check_shard(checkpoint.spec, blocks, shard)
        return cls(
            blocks=blocks,
            format=format,
            embedding_format=embedding_format or _EMBEDDING_FORMATS[format],
            shard=shard,
        )

    def format_of(self, slot: str) -> int:
        """The number of the format that a slot is packed in."""
        return WEIGHT_FORMATS[self.embedding_format if slot in ("embedding", "head") else self.format]


# ---- where everything lies ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _SmallPlace:
    offset: int
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def view_in(self, memory: np.ndarray) -> Tensor:
        """Float32 tensor of these bytes of the arena, which it keeps."""
        part = torch.from_numpy(memory[self.offset : self.offset + self.size_bytes])
        return part.view(torch.float32).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layout:
    """Every slot's place in the arena, and how its matrix is cut."""

    cuts: Mapping[SlotKey, Cut]
    matrices: Mapping[MatrixKey, PackedEntry]
    small: Mapping[SlotKey, _SmallPlace]
    size_bytes: int


def _lay_out(spec: ModelSpec, plan: TensorPlan, selection: _Selection) -> _Layout:
    from plait.kernels._native import packed_bytes

    cuts: dict[SlotKey, Cut] = {}
    matrices: dict[MatrixKey, PackedEntry] = {}
    small: dict[SlotKey, _SmallPlace] = {}
    end = 0

    def take(size_bytes: int) -> int:
        nonlocal end
        offset = end
        end += -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return offset

    for key, slot in plan.slots.items():
        if _is_matrix(key, slot):
            cut = cuts[key] = cut_of(spec, key, slot.shape[-2], slot.shape[-1], selection.shard)
            number = selection.format_of(key.slot)
            size_bytes = packed_bytes(number, cut.columns, len(cut.inputs))
            for expert in _experts(slot):
                matrices[key.block, key.slot, expert] = PackedEntry(
                    format=number,
                    columns=cut.columns,
                    depth=len(cut.inputs),
                    offset=take(size_bytes),
                    bytes=size_bytes,
                )
            continue
        shape = _small_shape(key, slot, cuts, selection.shard)
        if shape is not None:
            small[key] = _SmallPlace(offset=take(4 * math.prod(shape)), shape=shape)
    return _Layout(cuts=cuts, matrices=matrices, small=small, size_bytes=end)


def _is_matrix(key: SlotKey, slot: PlannedSlot) -> bool:
    """Whether a slot is multiplied with; routers and position tables stay as they are."""
    return key.kind == "weight" and len(slot.shape) > 1 and not slot.in_float32 and key.slot != "positions"


def _experts(slot: PlannedSlot) -> Sequence[int | None]:
    return range(slot.shape[0]) if len(slot.shape) == 3 else [None]


def _small_shape(
    key: SlotKey, slot: PlannedSlot, cuts: Mapping[SlotKey, Cut], shard: Shard
) -> tuple[int, ...] | None:
    """The shape of what this rank keeps of a small slot, None for nothing."""
    cut = cuts.get(SlotKey(key.block, key.slot))
    if key.kind == "weight" or cut is None:
        return slot.shape
    if cut.splits_inputs and shard.rank:
        return None
    return (*slot.shape[:-1], len(cut.rows))


def _arena(checkpoint: Checkpoint, layout: _Layout) -> "Arena":
    from plait.kernels._native import Arena

    try:
        return Arena(layout.size_bytes)
    except MemoryError:
        raise BadSetup(
            f"the packed weights of {checkpoint.folder} need {format_bytes(layout.size_bytes)}, more than this machine "
            "gives; choose a smaller model or --quantization"
        ) from None


# ---- packing --------------------------------------------------------------------------------------------------------


class _Packing:
    """Fills an arena from the checkpoint, slot by slot."""

    def __init__(
        self, checkpoint: Checkpoint, layout: _Layout, arena: "Arena", on_progress: Progress | None
    ) -> None:
        self._stored, self._layout, self._memory = checkpoint.tensors, layout, arena.memory
        self._on_progress = on_progress
        self._done_bytes = self._total_bytes = 0

    def run(self, plan: TensorPlan, threads: int) -> None:
        by_slot: dict[SlotKey, list[PlannedTensor]] = {}
        for planned in plan.tensors:
            if planned.key in self._layout.cuts or planned.key in self._layout.small:
                by_slot.setdefault(planned.key, []).append(planned)
        self._total_bytes = sum(self._size_bytes(part) for parts in by_slot.values() for part in parts)
        if self._on_progress is not None:
            self._on_progress(0, self._total_bytes)
        for key, parts in by_slot.items():
            if key in self._layout.cuts:
                self._pack_matrix(key, plan.slots[key], parts, threads)
            else:
                self._keep_small(key, plan.slots[key], parts)

    def _pack_matrix(
        self, key: SlotKey, slot: PlannedSlot, parts: Sequence[PlannedTensor], threads: int
    ) -> None:
        from plait.kernels._native import pack_into

        cut = self._layout.cuts[key]
        # A stack of all experts is mapped once, and its experts are taken from it one by one.
        stacks = {
            part.name: self._mapped(part) for part in parts if len(slot.shape) == 3 and part.expert is None
        }
        for expert in _experts(slot):
            own = [part for part in parts if part.expert in (None, expert)]
            entry = self._layout.matrices[key.block, key.slot, expert]
            source: Any = self._source(slot.shape[-2:], own, expert, stacks)  # numpy has no bfloat16
            pack_into(
                out=self._memory,
                offset=entry.offset,
                source=source,
                rows=cut.rows,
                depth_begin=cut.inputs.start,
                depth=entry.depth,
                format=entry.format,
                threads=threads,
            )

    def _source(
        self,
        shape: tuple[int, ...],
        parts: Sequence[PlannedTensor],
        expert: int | None,
        stacks: Mapping[str, Sequence[Tensor]],
    ) -> Tensor:
        """The matrix of a slot, or of an expert, in our row order; bfloat16 or float32, [rows, inputs]."""
        all_bfloat16 = all(self._stored[part.name].dtype == "BF16" for part in parts)
        dtype = torch.bfloat16 if all_bfloat16 else torch.float32
        if len(parts) == 1 and not parts[0].transposed and parts[0].row_order is None:
            return self._values(parts[0], expert, stacks).to(dtype)  # straight from the map if it can be
        source = torch.empty(shape, dtype=dtype)
        for part in parts:
            place_rows(source, part, self._values(part, expert, stacks))
        return source

    def _values(
        self, part: PlannedTensor, expert: int | None, stacks: Mapping[str, Sequence[Tensor]]
    ) -> Tensor:
        """A stored tensor, or one expert's part of it."""
        stack = stacks.get(part.name)
        values = self._mapped(part) if stack is None else [tensor[expert] for tensor in stack]
        return values[0] if part.scales is None else unpack_mxfp4(values[0], values[1])

    def _mapped(self, part: PlannedTensor) -> Sequence[Tensor]:
        """A stored tensor in its file, and its scales if it has some."""
        tensors = [map_stored(self._stored[name]) for name, _ in part.stored()]
        if part.scales is None:
            check_finite(tensors[0], self._stored[part.name])
        self._count(part)
        return tensors

    def _keep_small(self, key: SlotKey, slot: PlannedSlot, parts: Sequence[PlannedTensor]) -> None:
        values = torch.zeros(slot.shape, dtype=torch.float32)
        for part in parts:
            fill_slot(values, part, self._stored[part.name])
            self._count(part)
        cut = self._layout.cuts.get(SlotKey(key.block, key.slot))
        if cut is not None:
            rows = torch.from_numpy(cut.rows)
            values = torch.where(rows == NO_ROW, 0.0, values[..., rows.clamp(min=0)])
        self._layout.small[key].view_in(self._memory).copy_(values)

    def _count(self, part: PlannedTensor) -> None:
        self._done_bytes += self._size_bytes(part)
        if self._on_progress is not None:
            self._on_progress(self._done_bytes, self._total_bytes)

    def _size_bytes(self, part: PlannedTensor) -> int:
        return sum(self._stored[name].size_bytes for name, _ in part.stored())


# ---- what a cache must have been made from --------------------------------------------------------------------------


def _cache_name(checkpoint: Checkpoint, selection: _Selection) -> str:
    words = [checkpoint.fingerprint, selection.format]
    if selection.embedding_format != selection.format:
        words.append(f"ends-{selection.embedding_format}")
    if selection.blocks != checkpoint.spec.all_blocks:
        words.append(f"blocks-{selection.blocks.start}-{selection.blocks.stop}")
    if selection.shard.ranks > 1:
        words.append(f"rank-{selection.shard.rank}-of-{selection.shard.ranks}")
    return "-".join([*words, str(LAYOUT_VERSION)]) + SUFFIX


def _content(checkpoint: Checkpoint, selection: _Selection, layout: _Layout) -> dict[str, object]:
    """All that the bytes of the arena depend on."""
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    numbers = sorted({entry.format for entry in layout.matrices.values()})
    return {
        "layout_version": LAYOUT_VERSION,
        "format": selection.format,
        "embedding_format": selection.embedding_format,
        "blocks": [selection.blocks.start, selection.blocks.stop],
        "shard": [selection.shard.rank, selection.shard.ranks],
        "fingerprint": checkpoint.fingerprint,
        "files": [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files],
        "packing": [[number, _packing_digest(number)] for number in numbers],
        "size_bytes": layout.size_bytes,
        "matrices": [[*key, *asdict(entry).values()] for key, entry in layout.matrices.items()],
        "small": [
            [key.block, key.slot, key.kind, place.offset, list(place.shape)]
            for key, place in layout.small.items()
        ],
    }


def _packing_digest(number: int) -> str:
    """What the kernels make of a fixed matrix: it changes whenever the codes or their order do."""
    from plait.kernels._native import Arena, pack_into, packed_bytes

    columns, depth = 64, 256
    spread = np.arange(columns * depth, dtype=np.int64) * 40503 % 65536  # Knuth's multiplicative hash
    source = (spread.astype(np.float32) / 65536 - 0.5).reshape(columns, depth)
    arena = Arena(packed_bytes(number, columns, depth))
    pack_into(
        out=arena.memory,
        offset=0,
        source=source,
        rows=np.arange(columns),
        depth_begin=0,
        depth=depth,
        format=number,
        threads=1,
    )
    return hashlib.sha256(arena.memory.data).hexdigest()[:32]
