"""Which tensors of a checkpoint a span of blocks needs, their stored shapes, and where they go in memory.

`plan_tensors` is pure: it is compared with the checkpoint's index before a single weight is read, so that a checkpoint
that does not fit is refused whole. Projections that read the same input become one slot (queries, keys and values;
gate and up), experts are stacked, and rows are reordered where the stored order is not ours.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from plait.errors import BadSetup
from plait.model.names import Names, RowOrder, Stored
from plait.model.spec import AttentionSpec, BlockSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec

Rows = np.ndarray[Any, np.dtype[np.int64]]

MXFP4_BLOCK = 32  # numbers that share an exponent


@dataclass(frozen=True, slots=True)
class SlotKey:
    """One tensor in memory: of a block, or of the model's ends (`block` None)."""

    block: int | None
    slot: str
    kind: Literal["weight", "bias"] = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlot:
    """A tensor in memory; routers stay in float32 whatever the model's dtype is."""

    shape: tuple[int, ...]
    in_float32: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedTensor:
    """One stored tensor and its place: `key[expert, row_offset : row_offset + rows]`.

    The loader swaps the last two axes of a matrix if `transposed`, takes its rows in `row_order`, then copies. With
    `scales` the tensor is packed as MXFP4 (OCP Microscaling formats, 1.0): blocks [..., rows, columns / 32, 16] of two
    4-bit floats a byte, and the named tensor holds the exponent of each block, [..., rows, columns / 32].
    """

    name: str
    stored_shape: tuple[int, ...]
    key: SlotKey
    expert: int | None
    row_offset: int
    rows: int
    transposed: bool
    row_order: Rows | None
    scales: str | None = None

    def stored(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of what has to be in the checkpoint."""
        own = (self.name, self.stored_shape)
        return (own,) if self.scales is None else (own, (self.scales, self.stored_shape[:-1]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorPlan:
    """All that a span needs: the tensors in memory, and the stored tensors that fill them."""

    slots: Mapping[SlotKey, PlannedSlot]
    tensors: tuple[PlannedTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Slot:
    """Shape of a slot's weight, [n], [rows, columns] or [experts, rows, columns], and the rows that each part fills.

    A bias drops the columns; `biased` says which parts have one. `row_order` is applied after the stored order has been
    made plain.
    """

    name: str
    shape: tuple[int, ...]
    part_rows: tuple[int, ...]
    biased: tuple[bool, ...]
    row_order: Rows | None = None
    stored_as: str = ""
    in_float32: bool = False
    kv_heads: int = 0
    """For `grouped` rows only."""


def plan_tensors(spec: ModelSpec, names: Names, blocks: range, stored_names: Collection[str]) -> TensorPlan:
    """Plan the loading of `blocks`; the embedding comes with block 0, final norm and head with the last block.

    Raises:
        BadSetup: the span is not one of the model's.
    """
    if not blocks or blocks.step != 1 or blocks.start < 0 or blocks.stop > len(spec.blocks):
        raise BadSetup(f"blocks {blocks.start}:{blocks.stop} do not lie in the model's 0:{len(spec.blocks)}")
    prefix = name_prefix(names, stored_names)
    slots: dict[SlotKey, PlannedSlot] = {}
    tensors: list[PlannedTensor] = []

    def add(block: int | None, slot: _Slot, stored: Stored, before: str) -> None:
        for planned in _planned_tensors(block, slot, stored, before, stored_names):
            tensors.append(planned)
            shape = slot.shape if planned.key.kind == "weight" else _without_columns(slot.shape)
            slots[planned.key] = PlannedSlot(shape=shape, in_float32=slot.in_float32)

    last = blocks.stop == len(spec.blocks)
    for slot in _outside_slots(spec, first=blocks.start == 0, last=last):
        add(None, slot, names.outside[slot.name], prefix)
    if last and not spec.tied_head:
        head = _matrix("head", (spec.vocab_tokens,), spec.embedding_width)
        add(None, head, names.head, head_prefix(names, stored_names))
    for block in blocks:
        for slot in _block_slots(spec.blocks[block], spec.hidden):
            stored = names.block[slot.stored_as or slot.name]
            add(block, slot, stored, prefix + names.block_prefix.format(block=block))
    return TensorPlan(slots=slots, tensors=tuple(tensors))


def name_prefix(names: Names, stored_names: Collection[str]) -> str:
    """What this checkpoint writes before the family's names (it varies with the software that saved it)."""
    probe = names.outside["embedding"].parts[0] + ".weight"
    return next((prefix for prefix in names.prefixes if prefix + probe in stored_names), names.prefixes[0])


def head_prefix(names: Names, stored_names: Collection[str]) -> str:
    """What this checkpoint writes before the head's name."""
    probe = names.head.parts[0] + ".weight"
    return next((prefix for prefix in names.head_prefixes if prefix + probe in stored_names), "")


def _without_columns(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 1 else shape[:-1]


def _planned_tensors(
    block: int | None, slot: _Slot, stored: Stored, before: str, stored_names: Collection[str]
) -> Iterator[PlannedTensor]:
    """The stored tensors of one slot: every part of it, for every expert stored by itself, weight and bias."""
    part_rows = slot.part_rows if len(stored.parts) == len(slot.part_rows) else (sum(slot.part_rows),)
    biased = slot.biased if len(stored.parts) == len(slot.part_rows) else (any(slot.biased),)
    experts = slot.shape[0] if len(slot.shape) == 3 else 0
    each_expert: list[int | None] = (
        list(range(experts)) if experts and "{expert}" in stored.parts[0] else [None]
    )
    stacked = (experts,) if experts and each_expert == [None] else ()
    order = _composed(_plain_order(stored.rows, slot), slot.row_order)
    for expert in each_expert:
        offset = 0
        for part, rows, has_bias in zip(stored.parts, part_rows, biased, strict=True):
            columns = slot.shape[-1:] if len(slot.shape) > 1 else ()
            matrix = (*columns, rows) if stored.transposed else (rows, *columns)
            part_order = None if order is None else order[offset : offset + rows] - offset
            identity = part_order is None or bool(np.all(part_order == np.arange(rows)))
            name = before + part.replace("{expert}", str(expert))
            weight = PlannedTensor(
                name=name + stored.weight,
                stored_shape=stacked + matrix,
                key=SlotKey(block, slot.name, "weight"),
                expert=expert,
                row_offset=offset,
                rows=rows,
                transposed=stored.transposed,
                row_order=None if identity else part_order,
            )
            if f"{weight.name}_blocks" in stored_names:
                yield _packed(weight, (*stacked, rows, *columns))
            else:
                yield weight
            if has_bias:
                yield replace(
                    weight,
                    name=name + stored.bias,
                    stored_shape=(*stacked, rows),
                    key=SlotKey(block, slot.name, "bias"),
                    transposed=False,
                )
            offset += rows


def _packed(weight: PlannedTensor, shape: tuple[int, ...]) -> PlannedTensor:
    """The same tensor in MXFP4, which is always stored [..., rows, columns]."""
    return replace(
        weight,
        name=f"{weight.name}_blocks",
        scales=f"{weight.name}_scales",
        stored_shape=(*shape[:-1], shape[-1] // MXFP4_BLOCK, MXFP4_BLOCK // 2),
        transposed=False,
    )


def _plain_order(rows: RowOrder, slot: _Slot) -> Rows | None:
    """Where each of our rows is in the stored order."""
    match rows:
        case "plain":
            return None
        case "alternating":
            total = sum(slot.part_rows)
            return np.concatenate([np.arange(0, total, 2), np.arange(1, total, 2)])
        case "grouped":
            kv_heads = slot.kv_heads
            grouped = np.arange(sum(slot.part_rows)).reshape(
                kv_heads, -1
            )  # [kv_heads, queries then key then value]
            head_dim = slot.part_rows[1] // kv_heads
            queries, keys, values = np.split(grouped, [-2 * head_dim, -head_dim], axis=1)
            return np.concatenate([queries.ravel(), keys.ravel(), values.ravel()])


def _composed(first: Rows | None, second: Rows | None) -> Rows | None:
    if first is None or second is None:
        return second if first is None else first
    return first[second]


def _halves_order(heads: int, head_dim: int, start: int, rotary_dim: int) -> Rows:
    """Rows of `heads` heads with the rotary pairs (2j, 2j+1) from `start` on brought to (j, j + rotary_dim/2)."""
    within = np.arange(head_dim)
    pairs = within[start : start + rotary_dim].copy()
    within[start : start + rotary_dim] = np.concatenate([pairs[0::2], pairs[1::2]])
    return (np.arange(heads)[:, None] * head_dim + within[None, :]).ravel()


# ---- slots ----------------------------------------------------------------------------------------------------------


def _vector(name: str, size: int) -> _Slot:
    return _Slot(name=name, shape=(size,), part_rows=(size,), biased=(False,))


def _norm(name: str, norm: NormSpec, size: int) -> Iterator[_Slot]:
    if norm.weighted:
        yield _Slot(name=name, shape=(size,), part_rows=(size,), biased=(norm.kind == "layer",))


def _matrix(name: str, part_rows: tuple[int, ...], columns: int, bias: bool = False) -> _Slot:
    biased = (bias,) * len(part_rows)
    return _Slot(name=name, shape=(sum(part_rows), columns), part_rows=part_rows, biased=biased)


def _outside_slots(spec: ModelSpec, *, first: bool, last: bool) -> Iterator[_Slot]:
    if first or (last and spec.tied_head):
        yield _matrix("embedding", (spec.vocab_tokens,), spec.embedding_width)
    if first:
        if spec.embedding_width != spec.hidden:
            yield _matrix("embedding_in", (spec.hidden,), spec.embedding_width)
        if spec.positions:
            yield _matrix("positions", (spec.positions.rows,), spec.hidden)
        if spec.embedding_norm:
            yield from _norm("embedding_norm", spec.embedding_norm, spec.hidden)
    if last:
        if spec.final_norm:
            yield from _norm("final_norm", spec.final_norm, spec.hidden)
        if spec.embedding_width != spec.hidden:
            yield _matrix("embedding_out", (spec.embedding_width,), spec.hidden)


def _block_slots(block: BlockSpec, hidden: int) -> Iterator[_Slot]:
    match block.placement:
        case "pre" | "parallel":
            used = ("attention_in_norm", "mlp_in_norm")
        case "parallel_shared":
            used = ("attention_in_norm",)
        case "post" | "after_residual":
            used = ("attention_out_norm", "mlp_out_norm")
        case "sandwich":
            used = ("attention_in_norm", "attention_out_norm", "mlp_in_norm", "mlp_out_norm")
    for name in used:
        yield from _norm(name, block.norm, hidden)
    yield from _attention_slots(block.attention, hidden)
    match block.feed_forward:
        case MlpSpec() as mlp:
            yield from _mlp_slots(mlp, hidden, "up", "down")
        case MoeSpec() as moe:
            yield from _moe_slots(moe, hidden)


def _attention_slots(attention: AttentionSpec, hidden: int) -> Iterator[_Slot]:
    heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
    yield _matrix("attention_out", (hidden,), heads * attention.value_dim, attention.output_bias)
    if attention.sinks:
        yield _vector("sinks", heads)
    if attention.latent:
        yield from _latent_slots(attention, hidden)
        return
    order = None
    if attention.rope and attention.rope.interleaved:
        rotated = _halves_order(heads + kv_heads, head_dim, 0, attention.rope.rotary_dim)
        values = np.arange(kv_heads * attention.value_dim) + len(rotated)
        order = np.concatenate([rotated, values])
    part_rows = (heads * head_dim, kv_heads * head_dim, kv_heads * attention.value_dim)
    yield _Slot(
        name="qkv",
        shape=(sum(part_rows), hidden),
        part_rows=part_rows,
        biased=(attention.qkv_bias,) * 3,
        row_order=order,
        kv_heads=kv_heads,
    )
    if attention.qk_norm and attention.qk_norm.norm.weighted:
        whole = attention.qk_norm.over == "whole"
        yield from _norm("query_norm", attention.qk_norm.norm, heads * head_dim if whole else head_dim)
        yield from _norm("key_norm", attention.qk_norm.norm, kv_heads * head_dim if whole else head_dim)


def _latent_slots(attention: AttentionSpec, hidden: int) -> Iterator[_Slot]:
    """MLA: whatever reads the block's input is one slot, `latent_in` (queries or their latent; key-value latent)."""
    latent, heads = attention.latent, attention.heads
    assert latent is not None
    interleaved = attention.rope is not None and attention.rope.interleaved
    rope_start, query_dim = latent.nope_dim, latent.nope_dim + latent.rope_dim
    queries = _halves_order(heads, query_dim, rope_start, latent.rope_dim if interleaved else 0)
    kv_rows = latent.kv_rank + latent.rope_dim
    key = _halves_order(1, kv_rows, latent.kv_rank, latent.rope_dim if interleaved else 0)
    if latent.query_rank:
        part_rows = (latent.query_rank, kv_rows)
        order = np.concatenate([np.arange(latent.query_rank), latent.query_rank + key])
        biased, stored_as = (attention.qkv_bias, attention.qkv_bias), "latent_in"
        yield from _norm("query_latent_norm", latent.norm, latent.query_rank)
        yield _Slot(
            name="query_up",
            shape=(heads * query_dim, latent.query_rank),
            part_rows=(heads * query_dim,),
            biased=(False,),
            row_order=queries,
        )
    else:
        part_rows = (heads * query_dim, kv_rows)
        order = np.concatenate([queries, heads * query_dim + key])
        biased, stored_as = (False, attention.qkv_bias), "latent_in_direct"
    yield _Slot(
        name="latent_in",
        shape=(sum(part_rows), hidden),
        part_rows=part_rows,
        biased=biased,
        row_order=order,
        stored_as=stored_as,
    )
    yield from _norm("latent_norm", latent.norm, latent.kv_rank)
    yield _matrix("latent_up", (heads * (latent.nope_dim + attention.value_dim),), latent.kv_rank)


def _mlp_slots(mlp: MlpSpec, hidden: int, up: str, down: str) -> Iterator[_Slot]:
    yield _matrix(up, (mlp.inner, mlp.inner) if mlp.gated else (mlp.inner,), hidden, mlp.bias)
    yield _matrix(down, (hidden,), mlp.inner, mlp.bias)


def _moe_slots(moe: MoeSpec, hidden: int) -> Iterator[_Slot]:
    experts, expert = moe.experts, moe.expert
    biased = (expert.bias,)
    yield _Slot(
        name="router",
        shape=(experts, hidden),
        part_rows=(experts,),
        biased=(moe.router.bias,),
        in_float32=True,
    )
    if moe.router.correction:
        yield _Slot(
            name="router_correction", shape=(experts,), part_rows=(experts,), biased=(False,), in_float32=True
        )
    up_rows = (expert.inner, expert.inner) if expert.gated else (expert.inner,)
    yield _Slot(
        name="experts_up",
        shape=(experts, sum(up_rows), hidden),
        part_rows=up_rows,
        biased=biased * len(up_rows),
    )
    yield _Slot(
        name="experts_down", shape=(experts, hidden, expert.inner), part_rows=(hidden,), biased=biased
    )
    if moe.shared:
        yield from _mlp_slots(moe.shared, hidden, "shared_up", "shared_down")
