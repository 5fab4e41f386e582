"""One flat batch: what a sequence gets does not depend on who shares its step, and nobody reads what is not theirs."""

import random

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import BLOCK_TOKENS, Paged, chunk, difference, prompt

from plait.engine.attention import CPU_GROUP_BYTES, Reach, SequencePlace, plan_attention
from plait.engine.decoder import SequenceChunk


def paged64(tiny, kv_blocks=512) -> Paged:
    """In float64 rounding cannot hide a wrong page."""
    decoder = zoo.decoder_of(tiny.checkpoint, torch.float64)
    return Paged(decoder, kv_blocks=kv_blocks, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen2_window", "llama4", "bloom", "deepseek_v3", "gpt_oss"]
)
def test_sixty_sequences_decoding_together_get_what_each_gets_alone(name, tiny_checkpoints):
    paged = paged64(tiny_checkpoints(name))
    lengths = random.Random(5).sample(range(1, 130), 60)
    prompts = [prompt(length, seed=length) for length in lengths]
    tables = [paged.table(length) for length in lengths]
    for ids, table in zip(prompts, tables, strict=True):
        if len(ids) > 1:
            paged.run(chunk(ids, 0, len(ids) - 1, table, rows=0))
    last = [chunk(ids, len(ids) - 1, len(ids), table) for ids, table in zip(prompts, tables, strict=True)]
    alone = torch.cat([paged.run(one) for one in last])
    together = paged.run(*last)
    assert difference(together, alone) < 1e-6


def test_other_sequences_garbage_never_leaks(tiny_checkpoints):
    for name in ("llama", "mistral", "deepseek_v3", "gemma2"):
        paged = Paged(tiny_checkpoints(name).decoder)
        short, long = prompt(20), prompt(120)
        tables = [paged.table(20), paged.table(120)]
        paged.run(chunk(short, 0, 19, tables[0], rows=0), chunk(long, 0, 119, tables[1], rows=0))
        own = tables[0] + tables[1]
        paged.store.extents[[block for block in range(paged.kv_blocks) if block not in own]] = torch.nan
        logits = paged.run(chunk(short, 19, 20, tables[0]), chunk(long, 119, 120, tables[1]))
        assert torch.isfinite(logits).all()


def test_a_window_reads_only_the_pages_it_sees(tiny_checkpoints):
    tiny = tiny_checkpoints("mistral")  # a window of 16 tokens in every block
    ids = prompt(120)
    for stop in (113, 120):  # a decoding token, and a chunk
        paged = Paged(tiny.decoder)
        table = paged.table(len(ids))
        paged.run(chunk(ids, 0, 112, table, rows=0))
        paged.store.extents[table[: (112 - 16 + 1) // BLOCK_TOKENS]] = torch.nan
        logits = paged.run(chunk(ids, 112, stop, table))
        assert difference(logits, tiny.reference_logits(ids)[112:stop]) < 1e-4


def test_logits_come_for_the_rows_asked_for_in_the_callers_order(tiny_checkpoints):
    tiny = tiny_checkpoints("llama")
    paged = Paged(tiny.decoder)
    prompts = [prompt(30), prompt(5), prompt(40)]
    rows = [3, 0, 40]
    chunks = [
        chunk(ids, 0, len(ids), paged.table(len(ids)), rows=count)
        for ids, count in zip(prompts, rows, strict=True)
    ]
    logits = paged.run(*chunks)
    assert logits.shape == (43, zoo.VOCAB)
    expected = torch.cat([tiny.reference_logits(prompts[0])[-3:], tiny.reference_logits(prompts[2])])
    assert difference(logits, expected) < 1e-4
    assert paged.run(chunk(prompts[1], 0, 5, paged.table(5), rows=0)).shape == (0, zoo.VOCAB)


def test_requests_of_different_maximum_lengths_rotate_differently_in_one_step(tiny_checkpoints):
    for name in ("phi3_longrope", "llama_longrope"):
        tiny = tiny_checkpoints(name)
        paged = Paged(tiny.decoder)
        short, long = prompt(40), prompt(150)
        tables = [paged.table(40), paged.table(150)]
        logits = paged.run(chunk(short, 0, 40, tables[0]), chunk(long, 0, 150, tables[1]))
        assert difference(logits[:40], tiny.reference_logits(short)) < 1e-4
        assert difference(logits[40:], tiny.reference_logits(long)) < 1e-4
        # The same tokens in a request that may become long rotate as the long one does.
        early = paged.run(chunk(long, 0, 40, paged.table(40), longest=150))
        assert difference(early, tiny.reference_logits(long)[:40]) < 1e-4


def test_hundreds_of_decoding_sequences_take_few_attention_calls(tiny_checkpoints):
    paged = Paged(tiny_checkpoints("llama").decoder, kv_blocks=4096)
    draw = random.Random(1)
    starts = sorted((draw.randint(20, 400) for _ in range(256)), reverse=True)
    places = [SequencePlace(row, start, 1, paged.table(start + 1)) for row, start in enumerate(starts)]
    groups = plan_attention(places, Reach(None, None, None), paged.store, 2, torch.float32)
    assert len(groups) < 24
    assert [group.rows.start for group in groups] == [0, *(group.rows.stop for group in groups[:-1])]
    real_pages = sum(-(-(start + 1) // BLOCK_TOKENS) for start in starts)
    gathered_pages = sum(group.pages.numel() // paged.store.pages_per_layer for group in groups)
    assert gathered_pages < 1.3 * real_pages


class LinearCalls(TorchDispatchMode):
    """Counts the multiplications of a step that read a weight: those of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (
            torch.ops.aten.linear,
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
        )
        return func(*args, **(kwargs or {}))


def test_a_step_reads_each_weight_once_however_many_sequences_share_it(tiny_checkpoints):
    tiny = tiny_checkpoints("llama")
    paged = Paged(tiny.decoder)
    counts = []
    for sequences in (1, 9):
        chunks = [chunk(ids := prompt(20, seed=n), 0, len(ids), paged.table(20)) for n in range(sequences)]
        with LinearCalls() as calls:
            paged.run(*chunks)
        counts.append(calls.count)
    # Queries, keys and values are one matrix, gates and ups another; the head is the last.
    assert counts == [4 * len(tiny.checkpoint.spec.blocks) + 1] * 2


def test_a_large_context_is_gathered_in_pieces_of_bounded_size(tiny_checkpoints):
    paged = Paged(tiny_checkpoints("llama").decoder, kv_blocks=4096)
    places = [SequencePlace(row, 2000, 1, paged.table(2001)) for row in range(30)]
    groups = plan_attention(places, Reach(None, None, None), paged.store, 2, torch.float32)
    page_bytes = paged.store.pages.shape[1] * 4
    assert all(
        group.sequences == 1 or group.pages.numel() * page_bytes <= CPU_GROUP_BYTES for group in groups
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_float32_in_every_dtype(dtype, tiny_checkpoints):
    tiny = tiny_checkpoints("llama")
    paged = Paged(zoo.decoder_of(tiny.checkpoint, dtype), dtype=dtype)
    ids = prompt(40)
    logits = paged.run(chunk(ids, 0, 40, paged.table(40)))
    assert logits.dtype == torch.float32
    assert difference(logits, tiny.reference_logits(ids)) < {torch.float16: 0.05, torch.bfloat16: 0.3}.get(
        dtype, 1e-4
    )


def test_a_store_of_another_span_or_dtype_is_a_bug_of_ours(tiny_checkpoints):
    tiny = tiny_checkpoints("llama")
    other = Paged(zoo.decoder_of(tiny.checkpoint, blocks=range(1)))
    with pytest.raises(AssertionError):
        tiny.decoder.forward([SequenceChunk(0, [5], [0], 1, 1)], other.store)
