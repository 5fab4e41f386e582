# pyright: standard
"""Attention of a sequence whose KV blocks lie partly on other machines.

A block table names borrowed blocks by numbers beyond the store's own. Per block of the model the query goes out to
their holders first; what is here is attended meanwhile; then the parts are merged, own blocks first, then holder by
holder in the order in which the table names them. Keys are stored rotated to their absolute positions, so a holder need
not know where in the sequence its blocks are except to hide what a window or a chunk excludes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.engine.attention import Reach, SequencePlace, attention_bias, page_index
from plait.engine.kv_store import KvStore
from plait.engine.partial import Partial, attend_partly, finish_partial, merge_partials, sink_part
from plait.engine.remote_kv import PartialAsk, PendingParts
from plait.model import AttentionSpec


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """KV blocks of a store that are a part of one sequence, as one reach sees them from consecutive positions.

    `pages` are those of the first hosted block; `keys` how many of their positions count; `bias` hides some of them.
    """

    pages: Tensor
    keys: int
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class SplitGroup:
    """A sequence's rows of the flat batch, its shard here, and the blocks that are elsewhere."""

    rows: slice
    position: int
    shard: Shard
    remote: tuple[int, ...]
    remote_starts: tuple[int, ...]


def plan_split(
    place: SequencePlace, reach: Reach, store: KvStore, kv_heads: int, dtype: torch.dtype
) -> SplitGroup:
    """Sort the blocks of a sequence's table into those here and those elsewhere, without those that it cannot see."""
    block_tokens, stop = store.block_tokens, place.start + place.tokens
    first = reach.first_key(place.start) // block_tokens
    seen = [
        (kv_block, index * block_tokens)
        for index, kv_block in enumerate(place.kv_blocks[: -(-stop // block_tokens)])
        if index >= first
    ]
    here = [each for each in seen if each[0] < store.kv_blocks]
    elsewhere = [each for each in seen if each[0] >= store.kv_blocks]
    return SplitGroup(
        rows=slice(place.row, place.row + place.tokens),
        position=place.start,
        shard=plan_shard(
            store,
            reach,
            kv_heads,
            dtype,
            [kv_block for kv_block, _ in here],
            [start for _, start in here],
            range(place.start, stop),
        ),
        remote=tuple(kv_block for kv_block, _ in elsewhere),
        remote_starts=tuple(start for _, start in elsewhere),
    )


def plan_shard(
    store: KvStore,
    reach: Reach,
    kv_heads: int,
    dtype: torch.dtype,
    kv_blocks: Sequence[int],
    starts: Sequence[int],
    positions: range,
) -> Shard:
    """Blocks of a store, in order, as queries at these positions see them."""
    device, block_tokens = store.pages.device, store.block_tokens
    keys = len(kv_blocks) * block_tokens
    if starts and starts[-1] + block_tokens > positions.stop:  # the block that is being filled
        keys -= starts[-1] + block_tokens - positions.stop
    first_keys = torch.tensor(starts, device=device, dtype=torch.int64)
    key_positions = (first_keys[:, None] + torch.arange(block_tokens, device=device)).flatten()[None, :keys]
    query_positions = torch.arange(positions.start, positions.stop, device=device)[:, None]
    hidden = key_positions > query_positions
    if reach.window_tokens is not None:
        hidden |= key_positions <= query_positions - reach.window_tokens
    if reach.chunk_tokens is not None:
        hidden |= key_positions < query_positions - query_positions % reach.chunk_tokens
    bias = None
    if reach.alibi is not None or bool(hidden.any()):
        bias = attention_bias(
            hidden[None, None, None], key_positions[None, None, None], reach, kv_heads, dtype
        )[0]
    return Shard(page_index(np.array([kv_blocks], dtype=np.int64), store), keys, bias)


def gather_shard(store: KvStore, shard: Shard, layer: int) -> Tensor:
    """What the shard holds of one hosted block, [planes * heads, keys, dim]."""
    found = store.pages.index_select(0, shard.pages + layer * store.pages_per_layer)
    return found.view(store.pages_per_layer, -1, store.dim)[:, : shard.keys]


def attend_shard(store: KvStore, shard: Shard, layer: int, query: Tensor, spec: AttentionSpec) -> Partial:
    """The part of a shard: query [tokens, heads, head_dim], for latents the absorbed one."""
    found = gather_shard(store, shard, layer)
    if spec.latent is not None:
        keys, values = found, found[..., : spec.latent.kv_rank]
    else:
        keys, values = found.split(spec.kv_heads)
    return attend_partly(query, keys, values, bias=shard.bias, scale=spec.scale, softcap=spec.softcap)


@dataclass(frozen=True, slots=True, eq=False)
class BegunSplit:
    """The attention of a split group in one hosted block, whose query has gone out."""

    store: KvStore
    group: SplitGroup
    layer: int
    query: Tensor
    pending: PendingParts | None

    def finish(self, spec: AttentionSpec, sinks: Tensor | None = None) -> Tensor:
        """Attend what is here, take what comes from elsewhere, and merge: [tokens, heads, value_dim]."""
        parts = [attend_shard(self.store, self.group.shard, self.layer, self.query, spec)]
        if self.pending is not None:
            parts += self.pending.take()
        if sinks is not None:
            parts.append(sink_part(sinks, parts[0]))
        return finish_partial(merge_partials(parts)).to(self.query.dtype)


def begin_split(store: KvStore, group: SplitGroup, layer: int, query: Tensor) -> BegunSplit:
    """Send the group's query [tokens, heads, dim] to the holders of what it sees of one hosted block."""
    pending = None
    if group.remote:
        assert store.remote is not None, (
            "a block table names borrowed blocks, and nobody knows where they are"
        )
        ask = PartialAsk(store.blocks[layer], group.remote, group.remote_starts, group.position, query)
        pending = store.remote.ask(ask)
    return BegunSplit(store, group, layer, query, pending)
