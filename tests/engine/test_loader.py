"""The loader reads what a span needs, once, and puts every stored row where the decoder looks for it."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from plait.engine.checkpoint import open_checkpoint
from plait.engine.loader import load_weights
from plait.errors import BadSetup
from plait.model import SlotKey, names_of, plan_tensors


def test_queries_keys_and_values_are_one_matrix(tiny_checkpoints):
    tiny = tiny_checkpoints("llama")
    stored = load_file(tiny.folder / "model.safetensors")
    weights = load_weights(tiny.checkpoint)
    for block in range(2):
        parts = [stored[f"model.layers.{block}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(weights.get(block, "qkv"), torch.cat(parts))
        up = [stored[f"model.layers.{block}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(weights.get(block, "up"), torch.cat(up))


def test_experts_are_stacked(tiny_checkpoints):
    tiny = tiny_checkpoints("mixtral")
    stored = load_file(tiny.folder / "model.safetensors")
    up = load_weights(tiny.checkpoint).get(1, "experts_up")
    for expert in range(4):
        parts = [
            stored[f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"] for part in ("w1", "w3")
        ]
        assert torch.equal(up[expert], torch.cat(parts))


def test_alternating_gate_and_up_rows_are_parted(tiny_checkpoints):
    tiny = tiny_checkpoints("gpt_oss")
    stored = load_file(tiny.folder / "model.safetensors")
    weights = load_weights(tiny.checkpoint)
    matrix, bias = (stored[f"model.layers.0.mlp.experts.gate_up_proj{end}"] for end in ("", "_bias"))
    expected = torch.cat((matrix[..., 0::2], matrix[..., 1::2]), dim=-1).transpose(1, 2)
    assert torch.equal(weights.get(0, "experts_up"), expected)
    assert torch.equal(
        weights.get(0, "experts_up", "bias"), torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=-1)
    )


def test_grouped_rows_become_queries_then_keys_then_values(tiny_checkpoints):
    tiny = tiny_checkpoints("falcon_new")
    fused = load_file(tiny.folder / "model.safetensors")[
        "transformer.h.0.self_attention.query_key_value.weight"
    ]
    grouped = fused.view(2, 4, 16, 64)  # [kv_heads, two queries + key + value, head_dim, hidden]
    expected = torch.cat(
        [grouped[:, :2].reshape(-1, 64), grouped[:, 2].reshape(-1, 64), grouped[:, 3].reshape(-1, 64)]
    )
    assert torch.equal(load_weights(tiny.checkpoint).get(0, "qkv"), expected)


def test_packed_experts_are_those_of_transformers(tiny_checkpoints, tmp_path):
    folder = zoo.copy_of(
        tiny_checkpoints("gpt_oss").folder, tmp_path / "packed", quantization_config={"quant_method": "mxfp4"}
    )
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for block in range(2):
        for slot, part in (("experts_up", "gate_up_proj"), ("experts_down", "down_proj")):
            name = f"model.layers.{block}.mlp.experts.{part}"
            columns, rows = tensors.pop(name).shape[1:]
            blocks = torch.randint(
                0, 256, (4, rows, columns // 32, 16), generator=generator, dtype=torch.uint8
            )
            scales = torch.randint(118, 126, (4, rows, columns // 32), generator=generator, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
            halves = torch.cat((theirs[:, 0::2], theirs[:, 1::2]), dim=1)
            expected[SlotKey(block, slot)] = halves if slot == "experts_up" else theirs
    save_file(tensors, folder / "model.safetensors")
    weights = load_weights(open_checkpoint(folder))
    for key, matrix in expected.items():
        assert torch.equal(weights.tensors[key], matrix)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(BadSetup, match=f"{name}' of shape .* is missing"):
        load_weights(open_checkpoint(folder))


def test_every_stored_number_arrives_exactly_once(tiny):
    """All of the checkpoint and nothing else: the sorted values of memory and file are the same."""
    loaded = load_weights(tiny.checkpoint)
    stored = load_file(tiny.folder / "model.safetensors")
    names = {planned.name for planned in tiny.checkpoint.plan().tensors}
    assert names == set(stored) - ({"lm_head.weight"} if tiny.checkpoint.spec.tied_head else set())
    in_memory = np.sort(np.concatenate([tensor.flatten().numpy() for tensor in loaded.tensors.values()]))
    in_file = np.sort(np.concatenate([stored[name].flatten().numpy() for name in names]))
    # Bias slots are zero where the checkpoint has no bias for a part.
    surplus = np.zeros(len(in_memory) - len(in_file), np.float32)
    np.testing.assert_array_equal(in_memory, np.sort(np.concatenate([in_file, surplus])))


def test_spans_reassemble_to_the_whole(tiny):
    whole = load_weights(tiny.checkpoint)
    cut = len(tiny.checkpoint.spec.blocks) // 2
    total = len(tiny.checkpoint.spec.blocks)
    spans = [load_weights(tiny.checkpoint, blocks) for blocks in (range(cut), range(cut, total))]
    together = {**spans[0].tensors, **spans[1].tensors}
    assert together.keys() == whole.tensors.keys()
    assert all(torch.equal(together[key], whole.tensors[key]) for key in together)


def poison(folder: Path, hosted: set[str]) -> None:
    """Make every tensor but the hosted ones infinite: reading one is refused."""
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {
            name: tensor if name in hosted else torch.full_like(tensor, torch.inf)
            for name, tensor in tensors.items()
        },
        folder / "model.safetensors",
    )


@pytest.mark.parametrize("blocks", [range(1), range(1, 2), range(2, 3), range(3)])
@pytest.mark.parametrize("name", ["qwen2_window", "qwen3_moe", "gemma2"])
def test_a_span_reads_only_its_own_tensors(name, blocks, tiny_checkpoints, tmp_path):
    folder = zoo.copy_of(tiny_checkpoints(name).folder, tmp_path / name)
    checkpoint = open_checkpoint(folder)
    plan = plan_tensors(checkpoint.spec, names_of(checkpoint.spec), blocks, checkpoint.tensors)
    poison(folder, {planned.name for planned in plan.tensors})
    seen = []
    weights = load_weights(
        open_checkpoint(folder), blocks, on_progress=lambda done, total: seen.append((done, total))
    )
    own_bytes = sum(checkpoint.tensors[planned.name].size_bytes for planned in plan.tensors)
    assert seen[0] == (0, own_bytes) and seen[-1] == (own_bytes, own_bytes)
    assert seen == sorted(seen) and len(seen) == len(plan.tensors) + 1
    tied = checkpoint.spec.tied_head
    assert (SlotKey(None, "embedding") in weights.tensors) == (0 in blocks or (tied and 2 in blocks))
    assert (SlotKey(None, "head") in weights.tensors) == (2 in blocks and not tied)
    assert (SlotKey(None, "final_norm") in weights.tensors) == (2 in blocks)
    assert {key.block for key in weights.tensors} - {None} == set(blocks)
    if blocks != range(3):
        with pytest.raises(BadSetup, match="not finite"):
            load_weights(open_checkpoint(folder))


@pytest.mark.parametrize("blocks", [range(0), range(1, 3), range(-1, 1), range(0, 2, 2)])
def test_a_span_outside_the_model_is_refused(blocks, tiny_checkpoints):
    with pytest.raises(BadSetup, match="do not lie in the model's 0:2"):
        load_weights(tiny_checkpoints("llama").checkpoint, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_take_the_dtype_asked_for_and_routers_stay_precise(dtype, tiny_checkpoints):
    weights = load_weights(tiny_checkpoints("deepseek_v3").checkpoint, dtype=dtype)
    for key, tensor in weights.tensors.items():
        precise = dtype if dtype == torch.float64 else torch.float32
        assert tensor.dtype == (precise if key.slot.startswith("router") else dtype)


def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    """Peak extra memory stays below one stored tensor and one merge group, whatever the size of the file."""
    folder = tmp_path / "wide"
    settings = {
        **zoo.VARIANTS["llama"][1],
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    gc.collect()
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _anonymous_bytes())

    before = _anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        weights = load_weights(checkpoint)
    finally:
        stop.set()
        watcher.join()
    largest = max(tensor.numel() * 4 for tensor in weights.tensors.values())
    assert peak[0] - before < weights.size_bytes + 2 * largest


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell anonymous memory")
