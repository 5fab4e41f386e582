"""Packed weights are the checkpoint's, whatever the format, the rank, or how often they were on the disk."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.loader import Weights, load_weights
from plait.engine.packed import MatrixKey, PackedWeights, Shard, load_packed, packed_weight_bytes
from plait.engine.packed_layout import vocabulary_of
from plait.errors import BadSetup
from plait.kernels import native_available
from plait.model import MlpSpec, ModelSpec

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)

from plait.kernels._native import unpack_from

FORMATS = ("bf16", "int8", "int4", "int4-g128")
WITH_RANKS = ("llama_biased", "falcon_new", "mixtral", "gpt_oss", "llama4", "qwen2", "gpt2")
UPS, DOWNS = ("up", "experts_up", "shared_up"), ("down", "experts_down", "shared_down")


def packed(checkpoint: Checkpoint, format: str = "bf16", **options: Any) -> PackedWeights:
    return load_packed(checkpoint, format=format, threads=2, **options)


def unpacked(weights: PackedWeights, key: MatrixKey) -> torch.Tensor:
    """What a packed matrix means, float32 [columns, depth]."""
    entry = weights.matrices[key]
    values = unpack_from(weights.arena.memory, entry.offset, entry.columns, entry.depth, entry.format)
    return torch.from_numpy(values)


def mlp_of(spec: ModelSpec, key: MatrixKey) -> MlpSpec:
    block, slot, _ = key
    assert block is not None
    feed_forward = spec.blocks[block].feed_forward
    if isinstance(feed_forward, MlpSpec):
        return feed_forward
    mlp = feed_forward.shared if slot.startswith("shared") else feed_forward.expert
    assert mlp is not None
    return mlp


def plain_rows(spec: ModelSpec, key: MatrixKey, columns: torch.Tensor) -> torch.Tensor:
    """Packed columns in the order of the plan's rows: gates and ups taken apart, padding checked and cut off.

    Works for anything with a value a column; the ranks' parts of an MLP are [gates, ups] each.
    """
    if key[1] not in UPS or not mlp_of(spec, key).gated:
        return columns
    panels = columns.unflatten(0, (-1, 2, 32))  # [panels, gate or up, 32, ...]
    return torch.cat((panels[:, 0].flatten(0, 1), panels[:, 1].flatten(0, 1)))


def source_of(weights: Weights, key: MatrixKey) -> torch.Tensor:
    source = weights.get(key[0], key[1])
    assert source is not None
    return source if key[2] is None else source[key[2]]


def without_padding(spec: ModelSpec, key: MatrixKey, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the plan from those of `plain_rows`; what pads them must be zero."""
    if key[1] not in UPS or not mlp_of(spec, key).gated:
        return rows
    inner = mlp_of(spec, key).inner
    gates, ups = rows.chunk(2)
    assert not gates[inner:].any() and not ups[inner:].any()
    return torch.cat((gates[:inner], ups[:inner]))


def in_groups(format: str, matrix: torch.Tensor) -> torch.Tensor:
    """[rows, groups that share a scale, inputs], zeros after the last input."""
    group = {"int8": matrix.shape[-1], "int4": 32, "int4-g128": 128}[format]
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % group)).unflatten(-1, (-1, group))


def rounded(format: str, matrix: torch.Tensor) -> torch.Tensor:
    """The simplest quantisation: the largest value of a group takes the last code, and all are rounded to nearest."""
    grouped, last = in_groups(format, matrix), 127 if format == "int8" else 7
    scale = grouped.abs().amax(-1, keepdim=True) / last
    if format != "int8":
        scale = scale.bfloat16().float()
    codes = (grouped / scale).nan_to_num().round().clamp(-last, last)
    return (codes * scale).flatten(-2)[..., : matrix.shape[-1]]


# ---- what is packed -------------------------------------------------------------------------------------------------


def test_bfloat16_matrices_are_the_checkpoints_rounded_once(tiny):
    spec, reference = tiny.checkpoint.spec, load_weights(tiny.checkpoint)
    weights = packed(tiny.checkpoint)
    sources = {
        (key.block, key.slot): tensor
        for key, tensor in reference.tensors.items()
        if key.kind == "weight" and tensor.dim() > 1 and key.slot not in ("router", "positions")
    }
    assert {key[:2] for key in weights.matrices} == set(sources)
    for key in weights.matrices:
        rows = without_padding(spec, key, plain_rows(spec, key, unpacked(weights, key)))
        assert torch.equal(rows, source_of(reference, key).bfloat16().float())
    stacked = [key for key, tensor in sources.items() if tensor.dim() == 3]
    for block, slot in stacked:
        experts = {key[2] for key in weights.matrices if key[:2] == (block, slot)}
        assert experts == set(range(len(sources[block, slot])))


@pytest.mark.parametrize("format", ["int8", "int4", "int4-g128"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4", "deepseek_v3", "gpt2"])
def test_quantised_matrices_are_no_worse_than_rounded_ones(name, format, tiny_checkpoints):
    checkpoint = tiny_checkpoints(name).checkpoint
    reference, weights = load_weights(checkpoint), packed(checkpoint, format)
    for key in weights.matrices:
        source = source_of(reference, key)
        rows = without_padding(checkpoint.spec, key, plain_rows(checkpoint.spec, key, unpacked(weights, key)))
        ours, simplest = (
            in_groups(format, matrix - source).square().sum(-1) for matrix in (rows, rounded(format, source))
        )
        # A matrix as a whole: a group whose scale is rounded to bfloat16 may be worse off.
        assert ours.sum() <= simplest.sum() * 1.01 + 1e-9, key


def test_small_tensors_are_the_checkpoints_in_float32(tiny):
    spec, reference = tiny.checkpoint.spec, load_weights(tiny.checkpoint)
    weights = packed(tiny.checkpoint, "int8")
    assert {(key.block, key.slot) for key in weights.small if key.kind == "weight"}.isdisjoint(
        key[:2] for key in weights.matrices
    )
    matrices = {key[:2]: entry for key, entry in weights.matrices.items()}
    for key, source in reference.tensors.items():
        if key.kind == "weight" and (key.block, key.slot) in matrices:
            continue
        tensor = weights.small[key]
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
        entry = matrices.get((key.block, key.slot))
        if entry is None:
            assert torch.equal(tensor, source)
            continue
        assert tensor.shape == (*source.shape[:-1], -(-entry.columns // 64) * 64)
        assert not tensor[..., entry.columns :].any()
        for ours, theirs, expert in zip(
            tensor.reshape(-1, tensor.shape[-1]),
            source.reshape(-1, source.shape[-1]),
            range(10**6),
            strict=False,
        ):
            matrix = (key.block, key.slot, expert)
            columns = ours[: entry.columns]
            assert torch.equal(without_padding(spec, matrix, plain_rows(spec, matrix, columns)), theirs)


def test_every_entry_has_a_place_of_its_own_in_the_arena(tiny):
    weights = packed(tiny.checkpoint, "int4", embedding_format="int8")
    start = weights.arena.memory.ctypes.data
    places = [(entry.offset, entry.bytes) for entry in weights.matrices.values()]
    places += [(tensor.data_ptr() - start, tensor.numel() * 4) for tensor in weights.small.values()]
    end = 0
    for offset, size_bytes in sorted(places):
        assert offset >= end and offset % 64 == 0
        end = offset + size_bytes
    assert end <= weights.size_bytes < end + 64
    formats = {key: entry.format for key, entry in weights.matrices.items()}
    assert all(number == (1 if key[1] in ("embedding", "head") else 2) for key, number in formats.items())
    assert weights.size_bytes == packed_weight_bytes(tiny.checkpoint, format="int4", embedding_format="int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_checkpoints_of_every_dtype_are_packed(dtype, tiny_checkpoints, tmp_path):
    folder = zoo.copy_of(tiny_checkpoints("llama").folder, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    reference, weights = load_weights(checkpoint), packed(checkpoint)
    for key in weights.matrices:
        rows = plain_rows(checkpoint.spec, key, unpacked(weights, key))
        assert torch.equal(rows, source_of(reference, key).bfloat16().float())


def test_tensors_that_are_not_aligned_in_their_file_are_read(tiny_checkpoints, tmp_path):
    tiny = tiny_checkpoints("llama")
    folder = zoo.copy_of(tiny.folder, tmp_path / "odd")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + header_bytes].rstrip()
    padded = header + b" " * ((1 - len(header)) % 8)  # the data begin one byte after a multiple of eight
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + header_bytes :])
    weights, original = packed(open_checkpoint(folder)), packed(tiny.checkpoint)
    assert np.array_equal(weights.arena.memory, original.arena.memory)


def test_mxfp4_experts_are_packed_one_by_one(tiny_checkpoints, tmp_path):
    folder = zoo.copy_of(
        tiny_checkpoints("gpt_oss").folder, tmp_path / "mx", quantization_config={"quant_method": "mxfp4"}
    )
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for block in range(2):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{block}.mlp.experts.{part}"
            columns, rows = tensors.pop(name).shape[1:]
            shape = (4, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    reference, weights = load_weights(checkpoint), packed(checkpoint)
    for key in weights.matrices:
        rows = plain_rows(checkpoint.spec, key, unpacked(weights, key))
        assert torch.equal(rows, source_of(reference, key).bfloat16().float())


def test_spans_are_parts_of_the_whole(tiny_checkpoints):
    checkpoint = tiny_checkpoints("qwen3_moe").checkpoint
    whole = packed(checkpoint, "int8")
    spans = [packed(checkpoint, "int8", blocks=blocks) for blocks in (range(1), range(1, 3))]
    together = [key for span in spans for key in span.matrices]
    assert sorted(together, key=str) == sorted(whole.matrices, key=str)
    for span in spans:
        assert all(torch.equal(unpacked(span, key), unpacked(whole, key)) for key in span.matrices)
        assert all(torch.equal(tensor, whole.small[key]) for key, tensor in span.small.items())


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_the_bytes_do_not_depend_on_the_number_of_threads(threads, tiny_checkpoints):
    checkpoint = tiny_checkpoints("llama4").checkpoint
    one = load_packed(checkpoint, format="int4", threads=1)
    others = load_packed(checkpoint, format="int4", threads=threads)
    assert np.array_equal(one.arena.memory, others.arena.memory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tiny_checkpoints, tmp_path):
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        folder = zoo.copy_of(tiny_checkpoints("llama").folder, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        tensors[name].flatten()[17] = value
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BadSetup, match=f"tensor '{name}' of shape .* not finite"):
            packed(open_checkpoint(folder), "int8", cache=tmp_path / "cache")
        assert not (tmp_path / "cache").exists()


def test_progress_counts_what_is_read(tiny_checkpoints, tmp_path):
    checkpoint = tiny_checkpoints("mixtral").checkpoint
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        packed(
            checkpoint, on_progress=lambda done, total: seen.append((done, total)), cache=tmp_path / "cache"
        )
        total = seen[-1][1]
        assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
        stored = sum(
            checkpoint.tensors[name].size_bytes
            for planned in checkpoint.plan().tensors
            for name, _ in planned.stored()
        )
        assert total == (stored if len(seen) > 3 else packed_weight_bytes(checkpoint, format="bf16"))
        seen.clear()


# ---- shards ---------------------------------------------------------------------------------------------------------


def together(spec: ModelSpec, key: MatrixKey, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole matrix from the ranks' parts, whose rows are in the plan's order."""
    block, slot, _ = key
    if slot in ("attention_out", *DOWNS):
        return torch.cat(parts, dim=1)
    if slot == "qkv":
        assert block is not None
        attention, ranks = spec.blocks[block].attention, len(parts)
        sizes = [
            heads * attention.head_dim // ranks for heads in (attention.heads, *[attention.kv_heads] * 2)
        ]
        return torch.cat(
            [torch.cat(each) for each in zip(*(part.split(sizes) for part in parts), strict=True)]
        )
    if slot in UPS and mlp_of(spec, key).gated:
        return torch.cat([torch.cat(each) for each in zip(*(part.chunk(2) for part in parts), strict=True)])
    return torch.cat(parts) if slot == "head" or slot in UPS else parts[0]


@pytest.mark.parametrize("name", WITH_RANKS)
def test_shards_put_together_are_the_whole(name, tiny_checkpoints):
    checkpoint, ranks = tiny_checkpoints(name).checkpoint, 2
    spec, whole = checkpoint.spec, packed(checkpoint)
    shards = [packed(checkpoint, shard=Shard(rank=rank, ranks=ranks)) for rank in range(ranks)]
    for key in whole.matrices:
        parts = [plain_rows(spec, key, unpacked(shard, key)) for shard in shards]
        expected = plain_rows(spec, key, unpacked(whole, key))
        assert torch.equal(together(spec, key, parts), expected), key
    for key, tensor in whole.small.items():
        matrix = (key.block, key.slot, 0 if tensor.dim() == 2 else None)
        if key.kind == "weight" or matrix not in whole.matrices:
            assert all(torch.equal(shard.small[key], tensor) for shard in shards)
        elif key.slot in ("attention_out", *DOWNS):
            assert torch.equal(shards[0].small[key], tensor)
            assert all(key not in shard.small for shard in shards[1:])
        else:
            columns = [
                shard.small[key].reshape(-1, shard.small[key].shape[-1])[0, : shard.matrices[matrix].columns]
                for shard in shards
            ]
            parts = [plain_rows(spec, matrix, column) for column in columns]
            first = tensor.reshape(-1, tensor.shape[-1])[0, : whole.matrices[matrix].columns]
            assert torch.equal(together(spec, matrix, parts), plain_rows(spec, matrix, first))


def test_rows_cut_between_ranks_are_quantised_as_the_whole(tiny_checkpoints):
    checkpoint = tiny_checkpoints("llama").checkpoint
    whole = packed(checkpoint, "int8")
    shards = [packed(checkpoint, "int8", shard=Shard(rank=rank, ranks=2)) for rank in range(2)]
    for key in whole.matrices:
        if key[1] in ("qkv", "up", "head"):
            parts = [plain_rows(checkpoint.spec, key, unpacked(shard, key)) for shard in shards]
            expected = plain_rows(checkpoint.spec, key, unpacked(whole, key))
            assert torch.equal(together(checkpoint.spec, key, parts), expected)


@pytest.mark.parametrize("vocab_tokens", [1000, 64 * 7, 64 * 7 + 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_share_the_vocabulary_in_whole_panels(ranks, vocab_tokens, tiny_checkpoints):
    spec = replace(tiny_checkpoints("llama").checkpoint.spec, vocab_tokens=vocab_tokens)
    parts = [vocabulary_of(spec, Shard(rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert [token for part in parts for token in part] == list(range(vocab_tokens))
    assert all(part.start % 64 == 0 and len(part) for part in parts)


@pytest.mark.parametrize(
    ("name", "shard", "said"),
    [
        ("llama", Shard(rank=2, ranks=2), "rank 2 is not one of 2"),
        ("llama_tied", Shard(rank=0, ranks=2), "1 key-value heads.*a number of ranks that divides 1"),
        ("llama_biased", Shard(rank=0, ranks=3), "4 key-value heads.*a number of ranks that divides 4"),
        ("llama_biased", Shard(rank=0, ranks=4), "96 inner columns.*use fewer ranks"),
        ("llama", Shard(rank=0, ranks=16), "a vocabulary of 512 tokens is too small"),
        ("deepseek_v3", Shard(rank=0, ranks=2), "latent attention"),
        ("olmo2", Shard(rank=0, ranks=2), "normalises all heads at once"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(name, shard, said, tiny_checkpoints):
    with pytest.raises(BadSetup, match=said):
        packed(tiny_checkpoints(name).checkpoint, shard=shard)


# ---- memory ---------------------------------------------------------------------------------------------------------

LARGE_CONFIG: Mapping[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)

MEASURE = """
import sys
from pathlib import Path
from plait.engine.checkpoint import open_checkpoint
from plait.engine.packed import load_packed

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

cache = Path(sys.argv[3]) if sys.argv[3] else None
checkpoint = open_checkpoint(Path(sys.argv[1]))
load_packed(open_checkpoint(Path(sys.argv[2])), format="int8", threads=2)  # what a first time needs
before = peak_bytes()
weights = load_packed(checkpoint, format="int8", threads=2, cache=cache)
print(peak_bytes() - before - weights.size_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell a peak of memory"
)
def test_loading_holds_no_more_than_one_matrix_beside_the_packed_ones(tiny_checkpoints, tmp_path):
    """Of a checkpoint of 330 MB, packed to half of it, what is mapped and copied at once is the largest matrix."""
    import json

    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE_CONFIG))
    wide, inner, layers = 1024, 4096, 8
    row = torch.linspace(-1, 1, 4096, dtype=torch.bfloat16)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return row[:columns].expand(rows, columns).contiguous()

    tensors = {"model.embed_tokens.weight": matrix(32000, wide), "lm_head.weight": matrix(32000, wide)}
    tensors["model.norm.weight"] = torch.ones(wide, dtype=torch.bfloat16)
    for layer in range(layers):
        before = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{before}{norm}.weight"] = torch.ones(wide, dtype=torch.bfloat16)
        for part, rows in (("q", wide), ("k", wide // 4), ("v", wide // 4), ("o", wide)):
            tensors[f"{before}self_attn.{part}_proj.weight"] = matrix(rows, wide)
        tensors[f"{before}mlp.gate_proj.weight"] = matrix(inner, wide)
        tensors[f"{before}mlp.up_proj.weight"] = matrix(inner, wide)
        tensors[f"{before}mlp.down_proj.weight"] = matrix(wide, inner)
    save_file(tensors, folder / "model.safetensors")
    largest_bytes = 32000 * wide * 2
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):
        command = [sys.executable, "-c", MEASURE, str(folder), str(tiny_checkpoints("llama").folder), cache]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
        # Threads' stacks and allocators keep a little.
        assert int(done.stdout) < 1.1 * largest_bytes + 24 * 2**20, cache
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert os.path.getsize(folder / "model.safetensors") > 4 * largest_bytes
