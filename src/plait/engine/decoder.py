# pyright: standard
"""The decoder: one forward pass of a span of blocks over a flat batch of chunks, with paged keys and values.

All tokens of a step share every matrix product; attention is planned once a step and run by every block. What a family
does differently is data in the `ModelSpec`: this file knows no family.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from plait.engine.kv_store import KvStore
from plait.engine.layers import Attention, FeedForward, LatentAttention, Linear, Norm, linear_of, norm_of
from plait.engine.loader import Weights
from plait.engine.rotary import FrequencyTables
from plait.engine.step import SequenceChunk, Step
from plait.model import BlockSpec, ModelSpec

__all__ = ["Decoder", "SequenceChunk", "SpanDecoder"]


class SpanDecoder(Protocol):
    """What the engine needs of a decoder, whatever computes it."""

    spec: ModelSpec
    blocks: range
    finds_best: bool
    """Whether chunks may ask for their best tokens only (`SequenceChunk.top_logits`)."""
    best: Sequence[Sequence[tuple[int, float]]]
    """Of the latest pass: for each chunk that asked for its best tokens, (id, logit), best first."""

    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: Any,
        hidden: Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> Tensor:
        """Run the chunks over KV memory of this decoder's own layout; see `Decoder.forward`."""
        ...

    def non_finite(self) -> str:
        """Where the latest pass first met a value that is not finite; "" if nowhere, or if it does not look."""
        ...


class Decoder:
    """A span of a model's blocks, ready to run; the span is that of the weights.

    Several decoders over consecutive spans, each fed with the hidden states of the one before, compute exactly what one
    over all blocks does.
    """

    finds_best = False
    best: Sequence[Sequence[tuple[int, float]]] = ()

    def __init__(
        self, spec: ModelSpec, weights: Weights, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.blocks = weights.blocks
        self._dtype = dtype
        self._tables = FrequencyTables(torch.device(device))
        self._embedding = weights.get(None, "embedding")
        self._embedding_in = linear_of(weights, None, "embedding_in")
        self._positions = weights.get(None, "positions")
        # Gemma rounds the scale to the model's dtype before it multiplies.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype, device=device)
        self._embedding_norm = norm_of(weights, None, "embedding_norm", spec.embedding_norm, dtype)
        self._layers = [
            Block(spec.blocks[block], weights, block, layer, dtype) for layer, block in enumerate(self.blocks)
        ]
        self._final_norm = norm_of(weights, None, "final_norm", spec.final_norm, dtype)
        self._embedding_out = linear_of(weights, None, "embedding_out")
        head = weights.get(None, "embedding" if spec.tied_head else "head")
        decides = self.blocks.stop == len(spec.blocks)
        self._head = Linear(head, None) if decides and head is not None else None

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: KvStore,
        hidden: Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> Tensor:
        """Run the chunks, writing their keys and values to the store; `blocks` are a part of the span, None all of it.

        `hidden` [tokens, hidden], in chunk order, comes from the span before, in any float type and on any device; the
        first span takes the token ids. A span that holds the last block returns logits, float32 [sum of logit_rows,
        vocab] in chunk order; another returns hidden states [tokens, hidden] in chunk order, in this decoder's type.
        """
        assert store.blocks == self.blocks and store.extents.dtype == self._dtype
        blocks = self.blocks if blocks is None else blocks
        step = Step(chunks, store, self._tables, self._dtype)
        if blocks.start == 0:
            flat = self._embed(step)
        else:
            assert hidden is not None
            flat = step.to_batch_order(hidden.to(store.extents.device, self._dtype))
        for block in blocks:
            flat = self._layers[block - self.blocks.start](flat, step)
        if blocks.stop < len(self.spec.blocks):
            return step.to_chunk_order(flat)
        return self._logits(flat.index_select(0, step.logit_rows()))

    def non_finite(self) -> str:
        """Nothing: what is not finite shows in the logits."""
        return ""

    def _embed(self, step: Step) -> Tensor:
        assert self._embedding is not None
        flat = functional.embedding(step.token_ids, self._embedding)
        if self._embedding_in is not None:
            flat = self._embedding_in(flat)
        if self.spec.embedding_scale != 1.0:
            flat = flat * self._embedding_scale
        if self._positions is not None and self.spec.positions is not None:
            flat = flat + functional.embedding(step.positions + self.spec.positions.offset, self._positions)
        return flat if self._embedding_norm is None else self._embedding_norm(flat)

    def _logits(self, rows: Tensor) -> Tensor:
        assert self._head is not None
        if self._final_norm is not None:
            rows = self._final_norm(rows)
        if self._embedding_out is not None:
            rows = self._embedding_out(rows)
        logits = self._head(rows).float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits = torch.tanh(logits / self.spec.logit_softcap) * self.spec.logit_softcap
        return logits


class Block:
    """One transformer block; `layer` is its place among the hosted ones."""

    def __init__(self, spec: BlockSpec, weights: Weights, block: int, layer: int, dtype: torch.dtype) -> None:
        def norm(slot: str) -> Norm | None:
            return norm_of(weights, block, slot, spec.norm, dtype)

        self._spec = spec
        attention_class = LatentAttention if spec.attention.latent else Attention
        self._attention = attention_class(spec.attention, weights, block, layer, dtype)
        self._feed_forward = FeedForward(spec.feed_forward, weights, block)
        placement = spec.placement
        before = placement not in ("post", "after_residual")
        after = placement in ("post", "sandwich", "after_residual")
        self._attention_in = norm("attention_in_norm") if before else None
        self._attention_out = norm("attention_out_norm") if after else None
        self._mlp_in = norm("mlp_in_norm") if before and placement != "parallel_shared" else None
        self._mlp_out = norm("mlp_out_norm") if after else None

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        """Hidden states after the block, [tokens, hidden]."""
        scale, placement = self._spec.residual_scale, self._spec.placement
        normed = hidden if self._attention_in is None else self._attention_in(hidden)
        attended = self._attention(normed, step)
        if placement in ("parallel", "parallel_shared"):
            fed = self._feed_forward(normed if self._mlp_in is None else self._mlp_in(hidden))
            return hidden + (fed + attended) * scale if scale != 1.0 else hidden + (fed + attended)
        if placement == "after_residual":
            assert self._attention_out is not None and self._mlp_out is not None
            hidden = self._attention_out(_added(hidden, attended, scale))
            return self._mlp_out(_added(hidden, self._feed_forward(hidden), scale))
        hidden = _added(
            hidden, attended if self._attention_out is None else self._attention_out(attended), scale
        )
        fed = self._feed_forward(hidden if self._mlp_in is None else self._mlp_in(hidden))
        return _added(hidden, fed if self._mlp_out is None else self._mlp_out(fed), scale)


def _added(hidden: Tensor, branch: Tensor, scale: float) -> Tensor:
    return hidden + branch if scale == 1.0 else hidden + branch * scale
