# pyright: standard
"""The decoder over our own CPU kernels: the same interface as `decoder.Decoder`, one native call a step.

Results do not depend on what else is in the batch, on how a prompt is cut into chunks, or on the number of threads:
every sum has one order that follows from the sequence alone (docs/systems/cpu-inference.md says how).
"""

import time
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.engine.attention import Reach
from plait.engine.kernel_kv import attention_shape, l2_bytes, make_pool, part_arrays
from plait.engine.kv_store import KvExtents
from plait.engine.options import EngineOptions
from plait.engine.packed import PackedEntry, PackedWeights, WeightFormatName
from plait.engine.packed_layout import PANEL_COLUMNS, vocabulary_of
from plait.engine.remote_kv import PartialAsk, PendingParts
from plait.engine.step import SequenceChunk
from plait.errors import BadSetup, EngineFailure
from plait.kernels import use_native
from plait.model import (
    AttentionSpec,
    BlockSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
    SlotKey,
    TemperatureSpec,
    frequency_class,
    inverse_frequencies,
)

_PLACEMENTS = ("pre", "post", "sandwich", "parallel", "parallel_shared", "after_residual")
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
_ROPE_POSITIONS = 1024  # a table grows by whole multiples: always the same products, whatever asked for them
_BEST = np.dtype([("value", np.float32), ("id", np.int32)])
_NO_TOKEN = np.array((0.0, -1), dtype=_BEST)


def unsupported(spec: ModelSpec) -> str | None:
    """Why the kernels cannot run this model, as the end of a sentence; None if they can."""
    if spec.embedding_width != spec.hidden:
        return "its embedding is narrower than its hidden states"
    if len({(b.attention.kv_heads, b.attention.head_dim, b.attention.heads) for b in spec.blocks}) > 1:
        return "its blocks have different numbers of heads"
    for block in spec.blocks:
        attention = block.attention
        if attention.latent is not None:
            return "it uses latent attention"
        if attention.head_dim % 16 or attention.head_dim != attention.value_dim:
            return f"its heads have {attention.head_dim} dimensions, and the kernels want a multiple of 16"
        if attention.alibi is not None and attention.alibi.rounded:
            return "its position bias is rounded to bfloat16"
    return None


def uses_kernels(options: EngineOptions, spec: ModelSpec) -> bool:
    """Whether a model is served by the kernels (bfloat16 or quantised, on a CPU) or by torch.

    Raises:
        BadSetup: what was asked for needs the kernels, and they are not to be had.
    """
    wished = None
    if options.quantization != "none":
        wished = f"--quantization {options.quantization}"
    elif options.kv_cache_dtype == "int8":
        wished = "--kv-cache-dtype int8"
    if options.device != "cpu":
        reason = f"they are for CPUs, and the device is {options.device}"
    elif wished is None and options.dtype != "bfloat16":
        return False
    elif not use_native():
        reason = "plait was installed without a C++ compiler, or they are turned off"
    elif options.block_tokens % 16:
        reason = f"they want KV blocks of a multiple of 16 tokens, not {options.block_tokens}"
    else:
        reason = unsupported(spec)
    if reason is not None and wished is not None:
        raise BadSetup(f"{wished} needs plait's CPU kernels, which cannot be used here: {reason}")
    return reason is None


def weight_format(options: EngineOptions) -> WeightFormatName:
    """The format that the kernels' weights are packed in."""
    match options.quantization:
        case "int8" | "int4" | "int4-g128":
            return options.quantization
        case _:
            return "bf16"


def kernel_kv_format(options: EngineOptions) -> str:
    """The format of the kernels' keys and values."""
    return "int8" if options.kv_cache_dtype == "int8" else "bf16"


class NativeDecoder:
    """A span of a model's blocks on this machine's CPU cores; the span is that of the weights."""

    finds_best = True
    """Whether chunks may ask for their best tokens only (`SequenceChunk.top_logits`)."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: PackedWeights,
        *,
        threads: int,
        kv_format: str = "bf16",
        block_tokens: int = 16,
        token_limit: int | None = None,
        collective: Any = None,
        pool: Any = None,
        by_parts: bool = False,
    ) -> None:
        """`token_limit`: ids from there on pad the vocabulary and are never among the best. `pool`: threads that exist
        already. `by_parts`: attention is added up KV block by KV block, so that it does not show where those lie
        (csrc/attention.inl); without it all of them must lie here.

        Raises:
            BadSetup: the kernels cannot run this model.
        """
        from plait.kernels import _native  # absent where there was no compiler

        if (reason := unsupported(spec)) is not None:
            raise BadSetup(f"the CPU kernels cannot run this model: {reason}")
        self.spec = spec
        self.blocks = weights.blocks
        self.best: Sequence[Sequence[tuple[int, float]]] = []
        """Of the latest pass: for each chunk that asked for its best tokens, (id, logit), best first."""
        self.kernel_s = 0.0
        """Seconds spent inside the kernels so far."""
        self._weights = weights
        self._ropes: list[RopeSpec] = []
        self._tables: dict[tuple[int, int], int] = {}
        self._table_positions: dict[int, int] = {}
        self._temperature: TemperatureSpec | None = None
        self._decides = self.blocks.stop == len(spec.blocks)
        self._embeds = self.blocks.start == 0
        self._head = self._head_matrix() if self._decides else None
        self.head_columns = self._head["columns"] if self._head else 0
        attention = spec.blocks[self.blocks.start].attention
        ranks = weights.shard.ranks
        self._decoder = _native.Decoder(
            pool=pool or make_pool(threads),
            weights=weights.arena.memory,
            model=self._model(token_limit or spec.vocab_tokens),
            kv_format=kv_format,
            kv_heads=attention.kv_heads // ranks,
            dim=attention.head_dim,
            block_tokens=block_tokens,
            collective=collective,
            l2_bytes=l2_bytes(),
            by_parts=by_parts,
        )

    # -- one pass --------------------------------------------------------------------------------------

    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: KvExtents,
        hidden: Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> Tensor:
        """Run the chunks, writing their keys and values to the store; `blocks` are a part of the span, None all of it.

        `hidden` [tokens, hidden] float32, in chunk order, comes from the span before; the first span takes the token
        ids. A span that holds the last block returns logits, float32 [sum of logit_rows of chunks that want all of
        them, vocabulary of this shard], and sets `best`; another returns hidden states [tokens, hidden].

        Raises:
            EngineFailure: another rank of the tensor-parallel group failed.
        """
        blocks = self.blocks if blocks is None else blocks
        step = self._step(chunks, store, hidden, blocks)
        if any(max(chunk.kv_blocks) >= store.kv_blocks for chunk in chunks):
            self._forward_split(step, chunks, store, blocks)
        else:
            before_s = time.perf_counter()
            try:
                self._decoder.forward(step)
            except RuntimeError as error:
                raise EngineFailure(f"the tensor-parallel group failed: {error}") from None
            self.kernel_s += time.perf_counter() - before_s
        if step["out_hidden"] is not None:
            return torch.from_numpy(step["out_hidden"])
        asked = [top for top in step["logit_tops"].tolist() if top]
        best = step["tops"].view(_BEST)[..., 0] if asked else np.empty((0, 0), dtype=_BEST)
        self.best = [
            [(id, value) for value, id in row[:top].tolist() if id >= 0]  # a small vocabulary may have fewer
            for row, top in zip(best, asked, strict=True)
        ]
        return torch.from_numpy(step["logits"])

    def _forward_split(
        self, step: dict[str, Any], chunks: Sequence[SequenceChunk], store: KvExtents, blocks: range
    ) -> None:
        """A pass in which the contexts of some chunks lie partly elsewhere: it stops at each block's attention, sends
        the queries out, attends what is here, and goes on with what comes back.
        """
        assert store.remote is not None, (
            "a block table names borrowed blocks, and nobody knows where they are"
        )
        remote, decoder = store.remote, self._decoder
        started_s = time.perf_counter()
        waited_s = 0.0
        decoder.start(step)
        parts: list[list[tuple[np.ndarray, ...]]] = []
        for block in blocks:
            decoder.advance(parts)
            asked_s = time.perf_counter()
            pending: list[PendingParts | None] = []
            for share, chunk in enumerate(chunks):
                ask = self._ask(share, chunk, store, block)
                pending.append(None if ask is None else remote.ask(ask))
            waited_s += time.perf_counter() - asked_s
            decoder.attend()
            asked_s = time.perf_counter()
            parts = [[] if each is None else [part_arrays(part) for part in each.take()] for each in pending]
            waited_s += time.perf_counter() - asked_s
        decoder.advance(parts)
        self.kernel_s += time.perf_counter() - started_s - waited_s

    def _ask(self, share: int, chunk: SequenceChunk, store: KvExtents, block: int) -> PartialAsk | None:
        """What is to be asked of others for a chunk's attention in one block; None if it sees nothing of theirs."""
        spec, block_tokens = self.spec.blocks[block].attention, store.block_tokens
        first = Reach.of(spec).first_key(chunk.start) // block_tokens
        elsewhere = [
            (kv_block, index * block_tokens)
            for index, kv_block in enumerate(chunk.kv_blocks)
            if index >= first and kv_block >= store.kv_blocks
        ]
        if not elsewhere:
            return None
        query = torch.empty(len(chunk.token_ids), spec.heads, spec.head_dim)
        self._decoder.queries(share, query.numpy())
        kv_blocks, starts = zip(*elsewhere, strict=True)
        return PartialAsk(block, kv_blocks, starts, chunk.start, query)

    def _step(
        self, chunks: Sequence[SequenceChunk], store: KvExtents, hidden: Tensor | None, blocks: range
    ) -> dict[str, Any]:
        """A pass as the extension wants it, with room for what comes out."""
        counts = [len(chunk.token_ids) for chunk in chunks]
        firsts = [0, *accumulate(counts)]
        table_starts = [0, *accumulate(len(chunk.kv_blocks) for chunk in chunks)]
        parts = np.array(
            [
                (row, chunk.start, count, table)
                for row, chunk, count, table in zip(firsts, chunks, counts, table_starts, strict=False)
            ],
            dtype=np.int64,
        )
        tables = np.fromiter(
            chain.from_iterable(c.kv_blocks for c in chunks), np.int32, table_starts[len(chunks)]
        )
        token_ids = None
        if hidden is None:
            token_ids = np.fromiter(chain.from_iterable(c.token_ids for c in chunks), np.int32, firsts[-1])
        rows: list[int] = []
        tops: list[int] = []
        for chunk, end in zip(chunks, firsts[1:], strict=True):
            rows.extend(range(end - chunk.logit_rows, end))
            tops.extend([chunk.top_logits] * chunk.logit_rows)
        best_rows = sum(1 for top in tops if top)
        decides = blocks.stop == len(self.spec.blocks)
        # Arrays, not tensors: torch takes ten microseconds to hand one over.
        return {
            "token_ids": token_ids,
            "hidden": None if hidden is None else hidden.float().contiguous().numpy(),
            "parts": parts,
            "tables": tables,
            "rope_tables": self._rope_tables(chunks, counts),
            "temperatures": self._temperatures(parts),
            "kv": store.extents.numpy(),
            "logit_rows": np.array(rows, dtype=np.int32),
            "logit_tops": np.array(tops, dtype=np.int32),
            "out_hidden": None if decides else np.empty((firsts[-1], self.spec.hidden), dtype=np.float32),
            "logits": np.empty(
                (len(tops) - best_rows if decides else 0, self.head_columns), dtype=np.float32
            ),
            "tops": np.full((best_rows, max(tops, default=0)), _NO_TOKEN, dtype=_BEST)
            .view(np.int32)
            .reshape(best_rows, -1, 2)
            if best_rows
            else None,
            "first_block": blocks.start - self.blocks.start,
            "end_block": blocks.stop - self.blocks.start,
        }

    def non_finite(self) -> str:
        """Where the latest pass first met a value that is not finite (row and block); "" if nowhere."""
        return self._decoder.non_finite()

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of the latest pass by kind of work; waiting for parts of an attention is in none of them."""
        return self._decoder.seconds()

    def _rope_tables(self, chunks: Sequence[SequenceChunk], counts: Sequence[int]) -> np.ndarray:
        """For every chunk and rope, the table that it uses, [chunks, ropes]; makes or lengthens what is missing."""
        result = np.empty((len(chunks), len(self._ropes)), dtype=np.int32)
        for number, rope in enumerate(self._ropes):
            for row, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
                key = (number, frequency_class(rope, chunk.rope_tokens))
                index = self._tables.get(key)
                if index is None:
                    index = self._tables[key] = self._decoder.add_rope_table()
                    self._table_positions[index] = 0
                if self._table_positions[index] < chunk.start + count:
                    self._lengthen(index, number, key[1], chunk.start + count)
                result[row, number] = index
        return result

    def _lengthen(self, index: int, number: int, length_class: int, tokens: int) -> None:
        rope = self._ropes[number]
        positions = -(-max(tokens, 2 * self._table_positions[index]) // _ROPE_POSITIONS) * _ROPE_POSITIONS
        # The angle is rounded to float32, as the models were trained; cosine and sine are rounded once.
        frequencies = inverse_frequencies(rope, length_class).astype(np.float32)
        angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
        factor = np.float32(rope.attention_factor)
        cosines = np.cos(angles).astype(np.float32) * factor
        sines = np.sin(angles).astype(np.float32) * factor
        self._decoder.set_rope_table(index, number, cosines, sines)
        self._table_positions[index] = positions

    def _temperatures(self, parts: np.ndarray) -> np.ndarray | None:
        spec = self._temperature
        if spec is None:
            return None
        positions = np.concatenate([np.arange(start, start + count) for _, start, count, _ in parts])
        intervals = np.floor((positions + 1.0) / spec.interval_tokens)
        return (np.log1p(intervals) * spec.scale + 1.0).astype(np.float32)

    # -- the model as dictionaries ---------------------------------------------------------------------

    def _head_matrix(self) -> dict[str, Any]:
        """This rank's panels of the head; a tied head is part of the embedding, which every rank has whole."""
        if not self.spec.tied_head:
            return self._matrix(None, "head")
        mine = vocabulary_of(self.spec, self._weights.shard)
        whole = self._weights.matrices[(None, "embedding", None)]
        panel_bytes = whole.bytes // -(-whole.columns // PANEL_COLUMNS)
        offset = whole.offset + mine.start // PANEL_COLUMNS * panel_bytes
        return {
            "format": whole.format,
            "columns": len(mine),
            "depth": whole.depth,
            "offset": offset,
            "bias": None,
        }

    def _model(self, token_limit: int) -> dict[str, Any]:
        spec = self.spec
        positions = self._small(None, "positions")
        return {
            "hidden": spec.hidden,
            "vocab": spec.vocab_tokens,
            "blocks": [self._block(block) for block in self.blocks],
            "embedding": self._matrix(None, "embedding") if self._embeds else None,
            # Gemma rounds the scale to the model's dtype before it multiplies.
            "embedding_scale": torch.tensor(spec.embedding_scale, dtype=torch.bfloat16).item(),
            "positions": positions,
            "position_rows": 0 if positions is None else positions.shape[0],
            "position_offset": spec.positions.offset if spec.positions else 0,
            "embedding_norm": self._norm(None, "embedding_norm", spec.embedding_norm),
            "final_norm": self._norm(None, "final_norm", spec.final_norm) if self._decides else None,
            "head": self._head,
            "first_id": vocabulary_of(spec, self._weights.shard).start,
            "token_limit": token_limit,
            "logit_scale": spec.logit_scale,
            "logit_softcap": spec.logit_softcap or 0.0,
        }

    def _block(self, block: int) -> dict[str, Any]:
        spec = self.spec.blocks[block]
        before = spec.placement not in ("post", "after_residual")
        after = spec.placement in ("post", "sandwich", "after_residual")
        separate = before and spec.placement != "parallel_shared"
        return {
            "placement": _PLACEMENTS.index(spec.placement),
            "residual_scale": spec.residual_scale,
            "attention_in": self._norm(block, "attention_in_norm", spec.norm) if before else None,
            "attention_out_norm": self._norm(block, "attention_out_norm", spec.norm) if after else None,
            "mlp_in": self._norm(block, "mlp_in_norm", spec.norm) if separate else None,
            "mlp_out": self._norm(block, "mlp_out_norm", spec.norm) if after else None,
            **self._attention(block, spec.attention),
            **self._feed_forward(block, spec),
        }

    def _attention(self, block: int, spec: AttentionSpec) -> dict[str, Any]:
        shard = self._weights.shard
        heads = spec.heads // shard.ranks
        sinks = self._small(block, "sinks")
        if sinks is not None:
            sinks = np.ascontiguousarray(sinks[shard.rank * heads : (shard.rank + 1) * heads])
        if spec.temperature is not None:
            assert self._temperature in (None, spec.temperature)
            self._temperature = spec.temperature
        rope = -1
        if spec.rope is not None:
            if spec.rope not in self._ropes:
                self._ropes.append(spec.rope)
            rope = self._ropes.index(spec.rope)
        qk = spec.qk_norm
        if qk is not None and qk.over == "whole" and shard.ranks > 1:
            raise BadSetup(
                "this model normalises the queries of all heads together, which tensor parallelism cannot split"
            )
        return {
            **attention_shape(spec, shard.rank, shard.ranks),
            "sinks": sinks,
            "qkv": self._matrix(block, "qkv"),
            "out": self._matrix(block, "attention_out"),
            "rope": rope,
            "rotary_dim": spec.rope.rotary_dim if spec.rope else 0,
            "has_temperature": spec.temperature is not None,
            "norm_over_head": qk is None or qk.over == "head",
            "norm_after_rope": qk is not None and qk.after_rope,
            "query_norm": self._norm(block, "query_norm", qk.norm) if qk else None,
            "key_norm": self._norm(block, "key_norm", qk.norm) if qk else None,
        }

    def _feed_forward(self, block: int, spec: BlockSpec) -> dict[str, Any]:
        parts = spec.feed_forward
        if isinstance(parts, MlpSpec):
            return {
                "mlp": self._mlp(parts, (block, "up", None)),
                "up": self._matrix(block, "up"),
                "down": self._matrix(block, "down"),
            }
        assert isinstance(parts, MoeSpec)
        router = parts.router
        result: dict[str, Any] = {
            "mlp": self._mlp(parts.expert, (block, "experts_up", 0)),
            "experts_up": [self._matrix(block, "experts_up", expert) for expert in range(parts.experts)],
            "experts_down": [self._matrix(block, "experts_down", expert) for expert in range(parts.experts)],
            "chosen": parts.experts_per_token,
            "groups": router.groups,
            "kept_groups": router.kept_groups,
            "sigmoid": router.score == "sigmoid",
            "renormalises": router.renormalises,
            "best_two": router.group_rank == "best_two",
            "router_scale": router.scale,
            "correction": self._small(block, "router_correction"),
            "router": self._small(block, "router"),
            "router_bias": self._small(block, "router", "bias"),
            "weighs_input": router.weighs == "input",
        }
        if parts.shared is not None:
            result["shared"] = self._mlp(parts.shared, (block, "shared_up", None))
            result["shared_up"] = self._matrix(block, "shared_up")
            result["shared_down"] = self._matrix(block, "shared_down")
        return result

    def _mlp(self, spec: MlpSpec, up: tuple[int, str, int | None]) -> dict[str, Any]:
        columns = self._weights.matrices[up].columns
        return {
            "gated": spec.gated,
            "activation": _ACTIVATIONS.index(spec.activation),
            "swiglu_alpha": spec.swiglu_alpha,
            "swiglu_limit": spec.swiglu_limit,
            "inner": columns // 2 if spec.gated else columns,
        }

    def _matrix(self, block: int | None, slot: str, expert: int | None = None) -> dict[str, Any]:
        entry: PackedEntry = self._weights.matrices[(block, slot, expert)]
        bias = self._small(block, slot, "bias")
        if bias is not None and expert is not None:
            bias = bias[expert]
        return {
            "format": entry.format,
            "columns": entry.columns,
            "depth": entry.depth,
            "offset": entry.offset,
            "bias": None if bias is None else np.ascontiguousarray(bias),
        }

    def _norm(self, block: int | None, slot: str, spec: NormSpec | None) -> dict[str, Any] | None:
        if spec is None:
            return None
        weight = self._small(block, slot)
        if spec.kind == "rms1p" and weight is not None:
            weight = weight + np.float32(1.0)
        return {
            "kind": 1 if spec.kind == "layer" else 0,
            "eps": spec.eps,
            "weight": weight,
            "bias": self._small(block, slot, "bias"),
        }

    def _small(self, block: int | None, slot: str, kind: str = "weight") -> np.ndarray | None:
        tensor = self._weights.small.get(SlotKey(block, slot, "bias" if kind == "bias" else "weight"))
        return None if tensor is None else np.ascontiguousarray(tensor.numpy())
