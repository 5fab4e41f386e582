# pyright: standard
"""One forward pass as data: the flat batch that chunks make, and what all blocks share while it runs.

Inside, the batch is ordered for attention: sequences that bring one token first, longest context first, and last those
that have KV blocks on other machines. Callers see chunk order only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from plait.engine.attention import KeyGroup, Reach, Scratch, SequencePlace, plan_attention
from plait.engine.kv_store import KvStore
from plait.engine.rotary import FrequencyTables, Rotation
from plait.engine.split_attention import SplitGroup, plan_split
from plait.model import RopeSpec, TemperatureSpec


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """What one sequence brings to a step."""

    start: int
    """Tokens of it already in the cache: the position of the first new token."""
    token_ids: Sequence[int]
    kv_blocks: Sequence[int]
    """Block table that covers start + len(token_ids) tokens."""
    rope_tokens: int
    """The longest this request may become: chooses among the frequencies of longrope and dynamic NTK."""
    logit_rows: int
    """How many of its last rows need logits: 0 for a chunk of a longer prompt, usually 1."""
    top_logits: int = 0
    """0: those rows need all their logits; k: the k best tokens will do, from a decoder that finds them itself."""


class Step:
    """The flat batch of one forward pass: token ids, positions, cache rows, attention plans and rotations.

    `token_ids` and `positions` are [tokens], in batch order.
    """

    def __init__(
        self, chunks: Sequence[SequenceChunk], store: KvStore, tables: FrequencyTables, dtype: torch.dtype
    ) -> None:
        assert chunks and all(chunk.token_ids for chunk in chunks)
        self.store = store
        self.scratch = Scratch(dtype, store.pages.device)
        self._tables, self._dtype = tables, dtype
        remote = store.remote is not None
        split = [remote and max(chunk.kv_blocks) >= store.kv_blocks for chunk in chunks]
        self._order = sorted(
            range(len(chunks)),
            key=lambda i: (split[i], len(chunks[i].token_ids) > 1, -(chunks[i].start // store.block_tokens)),
        )
        self._whole = len(chunks) - sum(split)
        self._chunks = chunks
        self._sorted = [chunks[index] for index in self._order]
        self._counts = [len(chunk.token_ids) for chunk in self._sorted]
        self._rows = [0, *accumulate(self._counts)]
        self.places = [
            SequencePlace(row, chunk.start, count, chunk.kv_blocks)
            for row, chunk, count in zip(self._rows, self._sorted, self._counts, strict=False)
        ]
        positions, kv_blocks = self._positions_and_blocks()
        token_ids = np.fromiter(
            chain.from_iterable(c.token_ids for c in self._sorted), np.int64, len(positions)
        )
        block_tokens = store.block_tokens
        first_vectors = kv_blocks * (store.pages_per_kv_block * block_tokens) + positions % block_tokens
        # Per layer and plane: where each token's heads go, token by token, as the projections lay them out.
        page_vectors = np.arange(store.pages_per_kv_block).reshape(-1, 1, store.heads) * block_tokens
        places = (first_vectors[:, None] + page_vectors).reshape(-1, len(positions) * store.heads)
        packed = torch.from_numpy(np.concatenate([token_ids, positions, places.ravel()])).to(
            store.pages.device
        )
        tokens = len(positions)  # one transfer for all, cut here
        self.token_ids, self.positions = packed[:tokens], packed[tokens : 2 * tokens]
        self._write_places = packed[2 * tokens :].view(places.shape).unbind()
        self._groups: dict[tuple[Reach, int], list[KeyGroup]] = {}
        self._split_groups: dict[tuple[Reach, int], list[SplitGroup]] = {}
        self._rotations: dict[RopeSpec, Rotation] = {}
        self._temperatures: dict[TemperatureSpec, Tensor] = {}

    def _positions_and_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Position and KV block of every token; decoding sequences, of which there may be hundreds, in one go."""
        block_tokens = self.store.block_tokens
        decoding = self._counts[: self._whole].count(1)
        positions = [np.array([c.start for c in self._sorted[:decoding]], dtype=np.int64)]
        kv_blocks = [
            np.array([c.kv_blocks[c.start // block_tokens] for c in self._sorted[:decoding]], dtype=np.int64)
        ]
        for chunk, count in zip(self._sorted[decoding:], self._counts[decoding:], strict=True):
            span = np.arange(chunk.start, chunk.start + count)
            first = chunk.start // block_tokens
            table = np.array(
                chunk.kv_blocks[first : (chunk.start + count - 1) // block_tokens + 1], dtype=np.int64
            )
            positions.append(span)
            kv_blocks.append(table[span // block_tokens - first])
        return np.concatenate(positions), np.concatenate(kv_blocks)

    def write(self, layer: int, plane: int, vectors: Tensor) -> None:
        """Store the new tokens' keys, values or latents, [tokens, heads, dim], of the layer-th hosted block."""
        place = self._write_places[layer * self.store.planes + plane]
        self.store.vectors.index_copy_(0, place, vectors.reshape(-1, self.store.dim))

    def groups(self, reach: Reach, kv_heads: int) -> list[KeyGroup]:
        """The attention plan for blocks of this reach: of sequences whose KV blocks are all here; they come first."""
        key = (reach, kv_heads)
        if key not in self._groups:
            here = self.places[: self._whole]
            self._groups[key] = plan_attention(here, reach, self.store, kv_heads, self._dtype)
        return self._groups[key]

    def split_groups(self, reach: Reach, kv_heads: int) -> list[SplitGroup]:
        """The plan for the other sequences, one group each."""
        key = (reach, kv_heads)
        if key not in self._split_groups:
            split = self.places[self._whole :]
            self._split_groups[key] = [
                plan_split(place, reach, self.store, kv_heads, self._dtype) for place in split
            ]
        return self._split_groups[key]

    def rotation(self, rope: RopeSpec) -> Rotation:
        """Cosines and sines of the step's tokens."""
        if rope not in self._rotations:
            lengths = [chunk.rope_tokens for chunk in self._sorted]
            self._rotations[rope] = self._tables.rotation(
                rope, self.positions, lengths, self._counts, self._dtype
            )
        return self._rotations[rope]

    def temperature(self, spec: TemperatureSpec) -> Tensor:
        """The factor on the step's queries, [tokens, 1, 1]."""
        if spec not in self._temperatures:
            intervals = torch.floor((self.positions.float() + 1.0) / spec.interval_tokens)
            factor = torch.log1p(intervals) * spec.scale + 1.0
            self._temperatures[spec] = factor.to(self._dtype)[:, None, None]
        return self._temperatures[spec]

    def logit_rows(self) -> Tensor:
        """Batch rows that need logits, in chunk order."""
        ends: dict[int, int] = dict(zip(self._order, self._rows[1:], strict=True))
        rows = [
            row
            for index, chunk in enumerate(self._chunks)
            for row in range(ends[index] - chunk.logit_rows, ends[index])
        ]
        return torch.tensor(rows, dtype=torch.int64, device=self.store.pages.device)

    def to_batch_order(self, hidden: Tensor) -> Tensor:
        """Rows [tokens, hidden] from chunk order."""
        return hidden if self._in_order() else hidden.index_select(0, self._permutation())

    def to_chunk_order(self, hidden: Tensor) -> Tensor:
        """Rows [tokens, hidden] back in chunk order."""
        return (
            hidden
            if self._in_order()
            else torch.empty_like(hidden).index_copy_(0, self._permutation(), hidden)
        )

    def _in_order(self) -> bool:
        return self._order == sorted(self._order)

    def _permutation(self) -> Tensor:
        """For every batch row, its row in chunk order."""
        firsts = [0, *accumulate(len(chunk.token_ids) for chunk in self._chunks)]
        rows = [row for index in self._order for row in range(firsts[index], firsts[index + 1])]
        return torch.tensor(rows, dtype=torch.int64, device=self.store.pages.device)
