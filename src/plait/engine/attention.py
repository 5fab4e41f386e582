# pyright: standard
"""Attention over paged keys and values, in plain torch.

A step is planned once for each `Reach` (how far back a block sees) and then run by every block that has it:

- sequences that bring one token (decoding) are gathered in groups of similar length, so that hundreds of them cost a
  few calls a block; the shorter ones of a group are padded with their own last page, under a mask;
- a sequence that brings more (prefill) is attended by itself, over its fresh keys if it starts at 0, else over its
  gathered pages.

Group queries share their key-value head by reshaping, never by repeating keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from plait.engine.kv_store import KvStore
from plait.model import AlibiSpec, AttentionSpec

# Keys and values that one gather brings together, which bounds the memory beside the cache. On a CPU anything from 1 to
# 16 MiB was equally fast, and less was slower.
CPU_GROUP_BYTES = 2**22
GPU_GROUP_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Reach:
    """Which keys a query may see, and what distance costs it."""

    window_tokens: int | None
    chunk_tokens: int | None
    alibi: AlibiSpec | None

    @staticmethod
    def of(attention: AttentionSpec) -> "Reach":
        return Reach(attention.window_tokens, attention.chunk_tokens, attention.alibi)

    def first_key(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        first = 0
        if self.window_tokens is not None:
            first = max(first, position - self.window_tokens + 1)
        if self.chunk_tokens is not None:
            first = max(first, position - position % self.chunk_tokens)
        return first


@dataclass(frozen=True, slots=True, eq=False)
class KeyGroup:
    """Rows of the flat batch that are attended in one call, and the keys that they see.

    `pages` [sequences * planes * heads * pages] are the pages of the first hosted block, or None where the keys are the
    rows' own. Keys are cut to `keys` of the gathered positions. `bias` is added to the scores: [sequences, kv_heads or
    1, queries per kv head or 1, new tokens, keys].
    """

    rows: slice
    sequences: int
    pages: Tensor | None
    keys: slice
    bias: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class SequencePlace:
    """Where one sequence's tokens lie: in the flat batch, in its context, in the cache."""

    row: int
    start: int
    tokens: int
    kv_blocks: Sequence[int]


def plan_attention(
    places: Sequence[SequencePlace], reach: Reach, store: KvStore, kv_heads: int, dtype: torch.dtype
) -> list[KeyGroup]:
    """Groups that cover the flat batch in order; sequences of one token come first, longest context first."""
    groups: list[KeyGroup] = []
    decoding = [place for place in places if place.tokens == 1]
    page_bytes = store.pages_per_layer * store.pages.shape[1] * store.pages.element_size()
    on_cpu = store.pages.device.type == "cpu"
    group_pages = max(1, (CPU_GROUP_BYTES if on_cpu else GPU_GROUP_BYTES) // page_bytes)
    counts = [_page_count(place, reach, store.block_tokens) for place in decoding]
    start = 0
    while start < len(decoding):
        # Under a window, counts are not quite sorted: the longest of a group may come late.
        stop, longest, shortest = start + 1, counts[start], counts[start]
        while stop < len(decoding):
            longest_then, shortest_then = max(longest, counts[stop]), min(shortest, counts[stop])
            # A padded page costs as much as a real one, a call as much as a few pages.
            wasteful = longest_then - shortest_then > max(4, longest_then // 4)
            if wasteful or longest_then * (stop + 1 - start) > group_pages:
                break
            stop, longest, shortest = stop + 1, longest_then, shortest_then
        groups.append(_decoding_group(decoding[start:stop], longest, reach, store, kv_heads, dtype))
        start = stop
    groups.extend(
        _prefill_group(place, reach, store, kv_heads, dtype) for place in places if place.tokens > 1
    )
    return groups


def _first_page(place: SequencePlace, reach: Reach, block_tokens: int) -> int:
    return reach.first_key(place.start) // block_tokens


def _page_count(place: SequencePlace, reach: Reach, block_tokens: int) -> int:
    return -(-(place.start + place.tokens) // block_tokens) - _first_page(place, reach, block_tokens)


def page_index(tables: np.ndarray, store: KvStore) -> Tensor:
    """Pages of the first hosted block for KV blocks [sequences, pages]: [sequences, planes * heads, pages], flat.

    Another hosted block's pages lie a constant further.
    """
    heads = np.arange(store.pages_per_layer)[:, None]
    index = (tables * store.pages_per_kv_block)[:, None] + heads
    return torch.from_numpy(index).flatten().to(store.pages.device)


def _decoding_group(
    members: Sequence[SequencePlace],
    pages: int,
    reach: Reach,
    store: KvStore,
    kv_heads: int,
    dtype: torch.dtype,
) -> KeyGroup:
    block_tokens, device = store.block_tokens, store.pages.device
    tables = np.empty((len(members), pages), dtype=np.int64)
    firsts = np.empty(len(members), dtype=np.int64)
    for row, place in enumerate(members):
        first = _first_page(place, reach, block_tokens)
        own = place.kv_blocks[first : -(-(place.start + 1) // block_tokens)]
        tables[row, : len(own)] = own
        tables[row, len(own) :] = own[-1]
        firsts[row] = first * block_tokens
    positions = np.array([place.start for place in members])
    visible_from = np.array([reach.first_key(place.start) for place in members]) - firsts
    visible_to = positions + 1 - firsts
    longest = int(visible_to.max())
    alike = bool((visible_to == longest).all()) and bool((visible_from == visible_from[0]).all())
    keys = slice(int(visible_from[0]) if alike else 0, longest)
    bias = None
    if not alike or reach.alibi:
        key_index = torch.arange(keys.start, keys.stop, device=device)[None]
        bounds = torch.from_numpy(np.stack([visible_from, visible_to, firsts])).to(device)[:, :, None]
        hidden = (key_index < bounds[0]) | (key_index >= bounds[1])
        bias = attention_bias(
            hidden[:, None, None, None], (key_index + bounds[2])[:, None, None, None], reach, kv_heads, dtype
        )
    rows = slice(members[0].row, members[0].row + len(members))
    return KeyGroup(rows, len(members), page_index(tables, store), keys, bias, causal=False)


def _prefill_group(
    place: SequencePlace, reach: Reach, store: KvStore, kv_heads: int, dtype: torch.dtype
) -> KeyGroup:
    block_tokens, device = store.block_tokens, store.pages.device
    rows = slice(place.row, place.row + place.tokens)
    stop = place.start + place.tokens
    reaches_all = reach.first_key(stop - 1) == 0
    if place.start == 0 and reaches_all and reach.alibi is None:
        return KeyGroup(rows, 1, None, slice(0, stop), None, causal=True)
    first = 0 if place.start == 0 else _first_page(place, reach, block_tokens)
    pages = None
    if place.start > 0:
        table = np.array(place.kv_blocks[first : -(-stop // block_tokens)], dtype=np.int64)[None]
        pages = page_index(table, store)
    key_positions = torch.arange(first * block_tokens, stop, device=device)[None]
    positions = torch.arange(place.start, stop, device=device)[:, None]
    hidden = key_positions > positions
    if reach.window_tokens is not None:
        hidden |= key_positions <= positions - reach.window_tokens
    if reach.chunk_tokens is not None:
        hidden |= key_positions < positions - positions % reach.chunk_tokens
    bias = attention_bias(hidden[None, None, None], key_positions[None, None, None], reach, kv_heads, dtype)
    return KeyGroup(rows, 1, pages, slice(0, stop - first * block_tokens), bias, causal=False)


def attention_bias(
    hidden: Tensor, key_positions: Tensor, reach: Reach, kv_heads: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores: minus infinity where hidden, and ALiBi's slope times the key's position."""
    if reach.alibi is None:
        zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))
    alibi = reach.alibi
    working = torch.bfloat16 if alibi.rounded else torch.float32
    slopes = torch.tensor(alibi.slopes, dtype=torch.float32, device=hidden.device).to(working)
    slopes = slopes.view(1, kv_heads, -1, 1, 1)
    distances = (slopes * key_positions.to(working)).to(dtype) * alibi.scale
    return distances.masked_fill(hidden, float("-inf"))


def gather(store: KvStore, group: KeyGroup, layer: int, scratch: "Scratch") -> Tensor:
    """What the group sees of one layer, [sequences, planes * heads, keys, dim]; valid until the next gather."""
    assert group.pages is not None
    index = group.pages + layer * store.pages_per_layer if layer else group.pages
    out = scratch.take(index.shape[0] * store.pages.shape[1]).view(index.shape[0], store.pages.shape[1])
    torch.index_select(store.pages, 0, index, out=out)
    return out.view(group.sequences, store.pages_per_layer, -1, store.dim)[:, :, group.keys]


class Scratch:
    """Memory for gathered pages, kept between calls: fresh memory would cost a page fault for every 4 KiB."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def take(self, elements: int) -> Tensor:
        """A flat tensor over the memory; the previous one's contents are lost."""
        if self._memory.numel() < elements:
            self._memory = torch.empty(elements, dtype=self._memory.dtype, device=self._memory.device)
        return self._memory[:elements]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    group: KeyGroup,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend `query` [sequences, new, heads, head_dim] over keys [sequences, kv_heads, keys, head_dim].

    Returns [sequences * new, heads, value_dim].
    """
    sequences, new, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    if softcap is not None or sinks is not None:
        return _attend_explicitly(query, keys, values, group, scale, softcap, sinks)
    bias = group.bias
    if new == 1:
        attended = functional.scaled_dot_product_attention(
            query.view(sequences, kv_heads, shared, head_dim),
            keys,
            values,
            attn_mask=None if bias is None else bias.squeeze(3),
            scale=scale,
        )
        return attended.reshape(sequences, heads, -1)
    attended = functional.scaled_dot_product_attention(
        query.view(new, kv_heads, shared, head_dim).permute(1, 2, 0, 3),
        keys[0][:, None].expand(-1, shared, -1, -1),
        values[0][:, None].expand(-1, shared, -1, -1),
        attn_mask=None if bias is None else bias.squeeze(0),
        is_causal=group.causal,
        scale=scale,
    )
    return attended.permute(2, 0, 1, 3).reshape(new, heads, -1)


def _attend_explicitly(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    group: KeyGroup,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with softcap and sinks, which fused attention lacks.

    Scores are [sequences, kv_heads, shared, new, keys].
    """
    sequences, new, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.view(sequences, new, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    queries = grouped.reshape(sequences, kv_heads, -1, head_dim)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).view(*grouped.shape[:-1], -1)
    scores = (scores if scores.dtype == torch.float64 else scores.float()).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if group.causal:
        later = torch.ones(new, scores.shape[-1], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(later, float("-inf"))
    elif group.bias is not None:
        scores += group.bias
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = weights.to(values.dtype).reshape(sequences, kv_heads, -1, weights.shape[-1])
    attended = torch.matmul(weights, values).view(*grouped.shape[:-1], -1)
    return attended.permute(0, 3, 1, 2, 4).reshape(sequences * new, heads, -1)
