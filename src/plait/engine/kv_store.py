# pyright: standard
"""The memory that KV blocks are made of: one tensor, one contiguous extent per KV block.

A KV block can therefore be copied, swapped or sent as one piece, whatever its extent holds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from plait.engine.remote_kv import RemoteKv
from plait.errors import BadSetup
from plait.model import ModelSpec
from plait.scheduling import ScheduledStep
from plait.units import format_bytes

BlockPairs = Sequence[tuple[int, int]]


def kv_extent_bytes(spec: ModelSpec, blocks: range, block_tokens: int, dtype: torch.dtype) -> int:
    """Memory of one KV block of this span."""
    return spec.kv_elements_per_token(blocks) * block_tokens * dtype.itemsize


class KvExtents:
    """KV memory of a span of a model's blocks as `extents` [kv_blocks, elements]; who uses which is decided elsewhere.

    What an extent holds is the business of the decoder that writes it.
    """

    def __init__(
        self,
        blocks: range,
        kv_blocks: int,
        block_tokens: int,
        elements: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.blocks = blocks
        self.kv_blocks = kv_blocks
        self.block_tokens = block_tokens
        self.remote: RemoteKv | None = None
        """Where blocks are whose numbers lie beyond `kv_blocks`."""
        try:
            self.extents = _zeros(kv_blocks, elements, dtype=dtype, device=torch.device(device))
        except (RuntimeError, MemoryError):
            size = format_bytes(kv_blocks * elements * dtype.itemsize)
            raise BadSetup(
                f"a KV cache of {size} does not fit into the memory of {device}; ask for a smaller one"
            ) from None

    @property
    def extent_bytes(self) -> int:
        """Memory of one KV block."""
        return self.extents.shape[1] * self.extents.element_size()

    def copy_blocks(self, pairs: BlockPairs) -> None:
        """Copy KV blocks, (source, target) each; no target is also a source."""
        if pairs:
            sources, targets = self._indices(pairs)
            self.extents.index_copy_(0, targets, self.extents.index_select(0, sources))

    def read_blocks(self, kv_blocks: Sequence[int]) -> Tensor:
        """A copy of these KV blocks, [len(kv_blocks), elements], on the store's device."""
        return self.extents.index_select(
            0, torch.tensor(kv_blocks, dtype=torch.int64, device=self.extents.device)
        )

    def write_blocks(self, kv_blocks: Sequence[int], contents: Tensor) -> None:
        """Overwrite these KV blocks with what `read_blocks` of a store of the same shape returned."""
        index = torch.tensor(kv_blocks, dtype=torch.int64, device=self.extents.device)
        self.extents.index_copy_(0, index, contents.to(self.extents.device))

    def swap_out(self, pairs: BlockPairs, host: "KvExtents") -> None:
        """Move KV blocks to host memory, (here, there) each."""
        if pairs:
            host.write_blocks([there for _, there in pairs], self.read_blocks([here for here, _ in pairs]))

    def swap_in(self, pairs: BlockPairs, host: "KvExtents") -> None:
        """Move KV blocks back from host memory, (there, here) each."""
        if pairs:
            self.write_blocks([here for _, here in pairs], host.read_blocks([there for there, _ in pairs]))

    def _indices(self, pairs: BlockPairs) -> Tensor:
        return torch.tensor(pairs, dtype=torch.int64, device=self.extents.device).t().contiguous()


class KvStore(KvExtents):
    """Extents as torch's decoder lays them out.

    An extent holds, for every hosted block of the model in order, the keys of each head, then the values of each head
    (MLA: the latents), `block_tokens` vectors each. What one head has of a KV block is one contiguous page, as
    gathering by block table and attending head by head want: `pages` is the memory as [kv_blocks * pages_per_kv_block,
    block_tokens * dim], with `pages_per_kv_block` = layers * planes * heads in that order; `vectors` is the same as
    [..., dim].
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: range,
        kv_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        attentions = [spec.blocks[block].attention for block in blocks]
        shapes = {(each.kv_planes, each.cached_heads, each.cached_dim) for each in attentions}
        assert len(shapes) == 1, "every supported family caches the same for each of its blocks"
        self.planes, self.heads, self.dim = shapes.pop()
        self.pages_per_layer = self.planes * self.heads
        self.pages_per_kv_block = len(blocks) * self.pages_per_layer
        elements = self.pages_per_kv_block * block_tokens * self.dim
        super().__init__(blocks, kv_blocks, block_tokens, elements, dtype, device)
        self.pages = self.extents.view(-1, block_tokens * self.dim)
        self.vectors = self.extents.view(-1, self.dim)

    def layer(self, block: int) -> Tensor:
        """One block's pages as a strided view [kv_blocks, planes, heads, block_tokens, dim]."""
        shape = (self.kv_blocks, len(self.blocks), self.planes, self.heads, self.block_tokens, self.dim)
        return self.extents.view(shape)[:, self.blocks.index(block)]


def move_blocks(step: ScheduledStep, store: KvExtents, host_store: KvExtents | None) -> None:
    """Make the copies that come before a step's forward pass."""
    if host_store is not None:
        if step.swap_out:
            store.swap_out(step.swap_out, host_store)
        if step.swap_in:
            store.swap_in(step.swap_in, host_store)
    if step.copies:
        store.copy_blocks(step.copies)


def _zeros(kv_blocks: int, elements: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory: positions that nothing wrote yet are read under a mask, and 0 * NaN is NaN.

    On a CPU it comes from numpy, whose zeros are pages that the kernel hands out on first touch: torch would
    write all of them at once, which takes seconds and memory that may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(kv_blocks, elements, dtype=dtype, device=device)
    memory = np.zeros(kv_blocks * elements * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(kv_blocks, elements)
