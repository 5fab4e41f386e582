"""Which part of every matrix a rank packs, and in which order its rows become columns of panels.

A packed matrix is a row of panels of 64 columns (csrc/table.h). Gate and up share panels, 32 columns each, so that the
kernel that finds both multiplies them at once. Under tensor parallelism a rank has whole heads, and whole runs of 32
inner columns of an MLP, so that nobody's panel holds another's column.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.errors import BadSetup
from plait.model import AttentionSpec, MlpSpec, ModelSpec, MoeSpec, SlotKey

Rows = np.ndarray[Any, np.dtype[np.int64]]

PANEL_COLUMNS = 64
GATE_COLUMNS = 32  # of a panel that gates and ups share
NO_ROW = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of tensor parallelism: its heads, its inner columns, its part of the vocabulary."""

    rank: int = 0
    ranks: int = 1


WHOLE = Shard()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """What a rank packs of a slot's matrix: packed column c is row `rows[c]` (none if negative), inputs `inputs`.

    `rows` covers whole panels; columns from `columns` on are padding.
    """

    rows: Rows
    columns: int
    inputs: range
    splits_inputs: bool = False
    """Whether the ranks' outputs have to be added up, since each has a part of the inputs only."""


def cut_of(spec: ModelSpec, key: SlotKey, rows: int, inputs: int, shard: Shard) -> Cut:
    """The cut of a slot whose matrix (or every expert's) is [rows, inputs]."""
    if key.block is None:
        taken = vocabulary_of(spec, shard) if key.slot == "head" else range(rows)
        return _plain(np.arange(taken.start, taken.stop), range(inputs))
    block, all_rows = spec.blocks[key.block], np.arange(rows)
    match key.slot:
        case "qkv":
            return _plain(_head_rows(block.attention, shard), range(inputs))
        case "attention_out":
            heads, width = _share(block.attention.heads, shard), block.attention.value_dim
            return _plain(all_rows, range(heads.start * width, heads.stop * width), splits_inputs=True)
        case "up" | "experts_up" | "shared_up":
            mlp = _mlp_of(block.feed_forward, key.slot)
            inner = inner_of(mlp, shard)
            taken_rows = _interleaved(inner, mlp.inner) if mlp.gated else np.arange(inner.start, inner.stop)
            return _plain(taken_rows, range(inputs))
        case "down" | "experts_down" | "shared_down":
            inner = inner_of(_mlp_of(block.feed_forward, key.slot), shard)
            return _plain(all_rows, inner, splits_inputs=True)
        case _:
            return _plain(all_rows, range(inputs))


def inner_of(mlp: MlpSpec, shard: Shard) -> range:
    """The inner columns of a rank: whole runs of 32, but for the end of the last."""
    runs = _share(-(-mlp.inner // GATE_COLUMNS), shard)
    return range(runs.start * GATE_COLUMNS, min(runs.stop * GATE_COLUMNS, mlp.inner))


def vocabulary_of(spec: ModelSpec, shard: Shard) -> range:
    """The token ids whose logits a rank computes: whole panels of the head, or of the embedding that it is tied to."""
    panels = _share(-(-spec.vocab_tokens // PANEL_COLUMNS), shard)
    return range(panels.start * PANEL_COLUMNS, min(panels.stop * PANEL_COLUMNS, spec.vocab_tokens))


def check_shard(spec: ModelSpec, blocks: range, shard: Shard) -> None:
    """Refuse a model that cannot be cut into so many parts.

    Raises:
        BadSetup: what cannot be divided, and by what it could be.
    """
    if not 0 <= shard.rank < shard.ranks:
        raise BadSetup(f"rank {shard.rank} is not one of {shard.ranks} ranks")
    if shard.ranks == 1:
        return
    over = f"tensor parallelism over {shard.ranks} ranks"
    if shard.ranks * PANEL_COLUMNS > spec.vocab_tokens:
        raise BadSetup(f"{over}: a vocabulary of {spec.vocab_tokens} tokens is too small; use fewer ranks")
    for block in blocks:
        attention, feed_forward = spec.blocks[block].attention, spec.blocks[block].feed_forward
        if attention.latent is not None:
            raise BadSetup(
                f"{over}: latent attention keeps one cache for all heads, which cannot be divided; use 1 rank"
            )
        if attention.qk_norm is not None and attention.qk_norm.over == "whole":
            raise BadSetup(
                f"{over}: block {block} normalises all heads at once, so they stay together; use 1 rank"
            )
        if attention.kv_heads % shard.ranks:
            raise BadSetup(
                f"{over}: block {block} has {attention.kv_heads} key-value heads, and every rank must get as many; "
                f"use a number of ranks that divides {attention.kv_heads}"
            )
        mlps = (
            [feed_forward]
            if isinstance(feed_forward, MlpSpec)
            else [feed_forward.expert, feed_forward.shared]
        )
        for mlp in mlps:
            if mlp is not None and mlp.inner < shard.ranks * GATE_COLUMNS:
                raise BadSetup(
                    f"{over}: block {block} has {mlp.inner} inner columns, and every rank must get at least "
                    f"{GATE_COLUMNS}; use fewer ranks"
                )


def _share(count: int, shard: Shard) -> range:
    """A rank's part of `count` things in order; parts differ by one at most."""
    return range(count * shard.rank // shard.ranks, count * (shard.rank + 1) // shard.ranks)


def _head_rows(attention: AttentionSpec, shard: Shard) -> Rows:
    """Rows of the fused projection (queries, then keys, then values) that belong to a rank's heads."""
    queries, kv_heads = _share(attention.heads, shard), _share(attention.kv_heads, shard)
    head_dim, value_dim = attention.head_dim, attention.value_dim
    keys_start = attention.heads * head_dim
    values_start = keys_start + attention.kv_heads * head_dim
    return np.concatenate(
        [
            np.arange(queries.start * head_dim, queries.stop * head_dim),
            keys_start + np.arange(kv_heads.start * head_dim, kv_heads.stop * head_dim),
            values_start + np.arange(kv_heads.start * value_dim, kv_heads.stop * value_dim),
        ]
    )


def _interleaved(inner: range, mlp_inner: int) -> Rows:
    """Rows [gates, ups] by turns of 32; the last turn of each is padded."""
    turns = -(-len(inner) // GATE_COLUMNS)
    gates = np.full(turns * GATE_COLUMNS, NO_ROW, np.int64)
    gates[: len(inner)] = np.arange(inner.start, inner.stop)
    ups = np.where(gates == NO_ROW, NO_ROW, gates + mlp_inner)
    return np.stack([gates.reshape(turns, -1), ups.reshape(turns, -1)], axis=1).ravel()


def _plain(rows: Rows, inputs: range, *, splits_inputs: bool = False) -> Cut:
    padded = np.full(-(-len(rows) // PANEL_COLUMNS) * PANEL_COLUMNS, NO_ROW, np.int64)
    padded[: len(rows)] = rows
    return Cut(rows=padded, columns=len(rows), inputs=inputs, splits_inputs=splits_inputs)


def _mlp_of(feed_forward: MlpSpec | MoeSpec, slot: str) -> MlpSpec:
    if isinstance(feed_forward, MlpSpec):
        return feed_forward
    mlp = feed_forward.shared if slot.startswith("shared") else feed_forward.expert
    assert mlp is not None
    return mlp
