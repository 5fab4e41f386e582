# pyright: standard
"""KV memory as the CPU kernels lay it out, and attention over parts of it: what a machine needs that lends KV blocks,
which may have no weights.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.engine.kv_store import KvExtents
from plait.engine.partial import Partial
from plait.errors import BadRequest
from plait.model import AttentionSpec, ModelSpec

_DEFAULT_L2_BYTES = 2**20


def kv_extent_bytes(spec: ModelSpec, blocks: range, block_tokens: int, kv_format: str, ranks: int = 1) -> int:
    """Memory of one KV block in `kv_format` ("bf16" or "int8") on one of `ranks` machines that share the heads."""
    from plait.kernels import _native

    attention = spec.blocks[blocks.start].attention
    return _native.kv_extent_bytes(
        kv_format, len(blocks), attention.kv_heads // ranks, attention.head_dim, block_tokens
    )


class KernelKvStore(KvExtents):
    """KV memory as the kernels lay it out (csrc/table.h), and attention over it: what a lender needs, who may have no
    weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: range,
        kv_blocks: int,
        block_tokens: int,
        kv_format: str,
        *,
        ranks: int = 1,
    ) -> None:
        extent_bytes = kv_extent_bytes(spec, blocks, block_tokens, kv_format, ranks)
        super().__init__(blocks, kv_blocks, block_tokens, extent_bytes, torch.uint8, "cpu")
        self.kv_format = kv_format
        self._spec = spec
        self._lender: Any = None

    def attend(
        self, block: int, kv_blocks: Sequence[int], starts: Sequence[int], position: int, query: Tensor
    ) -> Partial:
        """Attend query [tokens, heads, head_dim], whose first row is at `position`, over KV blocks that hold the tokens
        from `starts` on, ascending; in float64, and `most` counts in powers of two.

        Raises:
            BadRequest: these are not blocks, or not places before the query.
        """
        tokens, heads, dim = query.shape
        wide = torch.float64
        part = Partial(
            torch.empty(tokens, heads, dtype=wide),
            torch.empty(tokens, heads, dtype=wide),
            torch.empty(tokens, heads, dim, dtype=wide),
        )
        try:
            self._attention().attend(
                self.extents.numpy(),
                self.blocks.index(block),
                np.array(kv_blocks, dtype=np.int32),
                np.array(starts, dtype=np.int64),
                position,
                query.float().contiguous().numpy(),
                part_arrays(part),
            )
        except ValueError as error:
            raise BadRequest(f"a part of an attention cannot be computed: {error}") from None
        return part

    def _attention(self) -> Any:
        if self._lender is None:
            from plait.kernels import _native

            attentions = [self._spec.blocks[block].attention for block in self.blocks]
            self._lender = _native.Lender(
                _native.Pool(1),  # the caller's thread: the decoder may be using its own meanwhile
                [attention_shape(each, 0, 1) for each in attentions],
                self.kv_format,
                attentions[0].kv_heads,
                attentions[0].head_dim,
                self.block_tokens,
                l2_bytes(),
            )
        return self._lender


def make_pool(threads: int) -> Any:
    """Threads for the kernels, the caller's among them, pinned where there are cores enough."""
    from plait.kernels import _native

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return _native.Pool(threads, cores[:threads] if threads <= len(cores) else [])


def attention_shape(spec: AttentionSpec, rank: int, ranks: int) -> dict[str, Any]:
    """What attention is done with, without sinks, for the heads of one of `ranks` machines."""
    heads, kv_heads = spec.heads // ranks, spec.kv_heads // ranks
    slopes = None
    if spec.alibi is not None:
        mine = slice(rank * heads, (rank + 1) * heads)
        slopes = np.array(spec.alibi.slopes, dtype=np.float32)[mine] * np.float32(spec.alibi.scale)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": spec.head_dim,
        "scale": spec.scale,
        "window_tokens": spec.window_tokens or 0,
        "chunk_tokens": spec.chunk_tokens or 0,
        "softcap": spec.softcap or 0.0,
        "slopes": slopes,
    }


def part_arrays(part: Partial) -> tuple[np.ndarray, ...]:
    """A part as the extension takes it: the same memory where it is float64 and contiguous."""
    return tuple(each.double().contiguous().numpy() for each in part)


def l2_bytes() -> int:
    """The second-level cache of a core."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(size.removesuffix("K")) * 1024 if size.endswith("K") else int(size)
    except (OSError, ValueError):
        return _DEFAULT_L2_BYTES
