"""Memory that a span of a model's blocks takes, known before it is loaded: how many blocks a machine can serve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plait.engine import kernel_kv, native
from plait.engine.checkpoint import Checkpoint
from plait.engine.options import DTYPES, EngineOptions
from plait.engine.packed import packed_weight_bytes
from plait.engine.span_inputs import INPUTS_PER_KV_TOKEN, SpanInputs
from plait.errors import BadSetup
from plait.model import ModelSpec, PlannedSlot
from plait.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSizes:
    """What each block takes: its weights, and its part of the KV cache for every token of context.

    `first_bytes` and `last_bytes` come with the model's first and last block: embedding, final norm, head.
    `input_bytes_per_token` comes with every span but that of the first block alone: a chain may also enter behind it
    (`SpanInputs`).
    """

    block_bytes: tuple[int, ...]
    kv_bytes_per_token: tuple[float, ...]
    first_bytes: int
    last_bytes: int
    input_bytes_per_token: float

    def weight_bytes(self, blocks: range) -> int:
        """Weights of a span."""
        ends_bytes = self.first_bytes if blocks.start == 0 else 0
        ends_bytes += self.last_bytes if blocks.stop == len(self.block_bytes) else 0
        return sum(self.block_bytes[block] for block in blocks) + ends_bytes

    def kv_bytes(self, blocks: range, context_tokens: int) -> int:
        """KV cache of a span, with the inputs that are kept beside it."""
        token_bytes = sum(self.kv_bytes_per_token[block] for block in blocks)
        token_bytes += self.input_bytes_per_token if blocks != range(1) else 0
        return math.ceil(token_bytes * context_tokens)

    def longest_span(self, memory_bytes: int, context_tokens: int) -> int:
        """The most blocks such that every span of so many fits, wherever it begins.

        Raises:
            BadSetup: not even every single block fits.
        """

        def fits(length: int) -> bool:
            return all(
                self.weight_bytes(span) + self.kv_bytes(span, context_tokens) <= memory_bytes
                for span in _windows(len(self.block_bytes), length)
            )

        if not fits(1):
            largest = max(
                self.weight_bytes(span) + self.kv_bytes(span, context_tokens)
                for span in _windows(len(self.block_bytes), 1)
            )
            raise BadSetup(
                f"{format_bytes(memory_bytes)} of memory hold not even one block of this model anywhere in it (up to "
                f"{format_bytes(largest)} with the cache of {context_tokens} tokens); raise --memory, choose --blocks, "
                "quantise, or lower --set swarm.context_tokens"
            )
        low, high = 1, len(self.block_bytes)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


def read_span_sizes(checkpoint: Checkpoint, options: EngineOptions) -> SpanSizes:
    """Sizes in the formats of decided options.

    Raises:
        BadSetup: the checkpoint is not what its configuration says.
    """
    spec = checkpoint.spec
    slots = checkpoint.plan().slots
    item_bytes = DTYPES[options.dtype].itemsize
    scale = 1.0
    kernels = native.uses_kernels(options, spec)
    if kernels:
        packed = packed_weight_bytes(checkpoint, format=native.weight_format(options))
        scale = packed / sum(_slot_bytes(slot, item_bytes) for slot in slots.values())
    block_bytes = [0.0] * len(spec.blocks)
    first_bytes = last_bytes = 0.0
    for key, slot in slots.items():
        size_bytes = scale * _slot_bytes(slot, item_bytes)
        if key.block is not None:
            block_bytes[key.block] += size_bytes
            continue
        of_last = key.slot in ("head", "final_norm", "embedding_out")
        if of_last:
            last_bytes += size_bytes
        else:
            first_bytes += size_bytes
        if key.slot == "embedding" and spec.tied_head:
            last_bytes += size_bytes
    return SpanSizes(
        block_bytes=tuple(math.ceil(size) for size in block_bytes),
        kv_bytes_per_token=tuple(
            _kv_block_bytes(checkpoint, options, range(block, block + 1), kernels=kernels)
            / options.block_tokens
            for block in spec.all_blocks
        ),
        first_bytes=math.ceil(first_bytes),
        last_bytes=math.ceil(last_bytes),
        input_bytes_per_token=INPUTS_PER_KV_TOKEN * SpanInputs.page_bytes(1, spec.hidden),
    )


def computing_format(options: EngineOptions, spec: ModelSpec) -> tuple[str, str]:
    """How decided options keep weights, and keys and values, in words: machines with the same compute the same."""
    if native.uses_kernels(options, spec):
        return native.weight_format(options), native.kernel_kv_format(options)
    return f"torch-{options.dtype}", options.dtype


def _kv_block_bytes(checkpoint: Checkpoint, options: EngineOptions, blocks: range, *, kernels: bool) -> int:
    if kernels:
        kv_format = native.kernel_kv_format(options)
        return kernel_kv.kv_extent_bytes(checkpoint.spec, blocks, options.block_tokens, kv_format)
    elements = checkpoint.spec.kv_elements_per_token(blocks)
    return elements * options.block_tokens * DTYPES[options.dtype].itemsize


def _slot_bytes(slot: PlannedSlot, item_bytes: int) -> int:
    return math.prod(slot.shape) * (4 if slot.in_float32 else item_bytes)


def _windows(blocks: int, length: int) -> Sequence[range]:
    return [range(start, start + length) for start in range(blocks - length + 1)]
