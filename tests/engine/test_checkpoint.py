"""A checkpoint that does not fit is refused whole, with one sentence that names file, tensor and expectation."""

import json
import shutil

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

from plait.engine.checkpoint import open_checkpoint
from plait.engine.loader import load_weights
from plait.errors import BadSetup


@pytest.fixture
def llama(tiny_checkpoints, tmp_path):
    """A private copy of the llama checkpoint."""
    return zoo.copy_of(tiny_checkpoints("llama").folder, tmp_path / "llama")


def change_tensors(folder, **changes):
    """Rewrite the weights with some tensors replaced (None removes one)."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def shard(folder, count=3):
    """Split the weights into shards with an index, as large checkpoints come."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for index in range(count):
        file = f"model-{index + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[index::count])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def refusal_of(folder) -> str:
    with pytest.raises(BadSetup) as refusal:
        load_weights(open_checkpoint(folder))
    message = refusal.value.message
    assert "\n" not in message and str(folder) in message
    return message


def test_opening_reads_no_tensor(llama):
    checkpoint = open_checkpoint(llama)
    assert checkpoint.spec.family == "llama" and checkpoint.dtype == "float32"
    stored = checkpoint.tensors["model.norm.weight"]
    assert stored.shape == (64,) and stored.size_bytes == 256
    raw = (llama / "model.safetensors").read_bytes()
    norm = load_file(llama / "model.safetensors")["model.norm.weight"]
    assert raw[stored.offset_bytes : stored.offset_bytes + 256] == norm.numpy().tobytes()


def test_weight_bytes_are_what_loading_takes(tiny_checkpoints):
    for name in ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "opt_350m"):
        checkpoint = tiny_checkpoints(name).checkpoint
        for dtype in ("float32", "bfloat16"):
            weights = load_weights(checkpoint, dtype=getattr(torch, dtype))
            assert checkpoint.weight_bytes(dtype) == weights.size_bytes


def test_shards_load_to_the_same_weights(llama, tiny_checkpoints):
    shard(llama)
    sharded, single = load_weights(open_checkpoint(llama)), load_weights(tiny_checkpoints("llama").checkpoint)
    assert sharded.tensors.keys() == single.tensors.keys()
    assert all(torch.equal(sharded.tensors[key], single.tensors[key]) for key in single.tensors)


def test_the_fingerprint_is_stable_and_tells_models_apart(llama, tiny_checkpoints, tmp_path):
    original = tiny_checkpoints("llama").checkpoint.fingerprint
    assert open_checkpoint(llama).fingerprint == original
    other = zoo.copy_of(llama, tmp_path / "other", rms_norm_eps=1e-5)
    assert open_checkpoint(other).fingerprint != original
    shard(llama)
    assert open_checkpoint(llama).fingerprint != original


def test_eos_comes_from_the_generation_config_and_may_be_a_list(llama):
    assert open_checkpoint(llama).eos_token_ids == (2,)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert open_checkpoint(llama).eos_token_ids == (2, 9)
    (llama / "generation_config.json").unlink()
    zoo.copy_of(llama, llama.parent / "listed", eos_token_id=[3, 4])
    assert open_checkpoint(llama.parent / "listed").eos_token_ids == (3, 4)
    zoo.copy_of(llama, llama.parent / "none", eos_token_id=None)
    assert open_checkpoint(llama.parent / "none").eos_token_ids == ()


def test_a_missing_tensor_is_named_with_its_shape(llama):
    change_tensors(llama, **{"model.layers.1.mlp.up_proj.weight": None})
    message = refusal_of(llama)
    assert "tensor 'model.layers.1.mlp.up_proj.weight' of shape [96, 64] is missing" in message


def test_an_unread_tensor_is_named(llama):
    change_tensors(llama, **{"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})
    assert "nothing reads tensor 'model.layers.1.self_attn.q_proj.bias' of shape [64]" in refusal_of(llama)


def test_a_misshapen_tensor_is_named_with_the_shape_that_was_expected(llama):
    change_tensors(llama, **{"model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 64)})
    message = refusal_of(llama)
    assert "'model.layers.0.self_attn.k_proj.weight' has shape [64, 64]" in message and "[32, 64]" in message


def test_integer_weights_are_refused(llama):
    change_tensors(llama, **{"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    assert "'model.norm.weight' is I8; plait reads float32, bfloat16 and float16" in refusal_of(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(llama, value):
    weight = torch.ones(64)
    weight[17] = value
    change_tensors(llama, **{"model.layers.1.input_layernorm.weight": weight})
    assert (
        "'model.layers.1.input_layernorm.weight' of shape [64] holds values that are not finite"
        in refusal_of(llama)
    )


def test_large_finite_values_are_not_taken_for_infinite_ones(llama):
    change_tensors(llama, **{"model.norm.weight": torch.full((64,), 3e38)})
    load_weights(open_checkpoint(llama))


@pytest.mark.parametrize("cut_bytes", [1, 5000])
def test_a_truncated_file_is_refused(llama, cut_bytes):
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-cut_bytes])
    assert "is truncated: tensor" in refusal_of(llama)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (10).to_bytes(8, "little") + b"not json!!" + b"\0" * 9]
)
def test_a_file_that_is_not_safetensors_is_refused(llama, content):
    (llama / "model.safetensors").write_bytes(content)
    assert str(llama / "model.safetensors") in refusal_of(llama)


def test_a_pickle_is_never_opened(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    message = refusal_of(llama)
    assert "pytorch_model.bin" in message and "convert the weights to safetensors" in message


def test_a_missing_shard_is_named(llama):
    shard(llama)
    (llama / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal_of(llama)


def test_an_index_that_lies_is_refused(llama):
    shard(llama)
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is missing; " in refusal_of(llama)


def test_a_shard_outside_the_folder_is_refused(llama):
    shard(llama)
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    shutil.copy(llama / "model-00001-of-00003.safetensors", llama.parent / "elsewhere.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "elsewhere.safetensors is missing" in refusal_of(llama)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "config.json is missing"),
        ("{", "config.json cannot be read as JSON"),
        ("[]", "config.json must hold a JSON object, not list"),
        ('{"model_type": "rwkv"}', "model_type 'rwkv' is not a family"),
    ],
)
def test_a_config_that_is_none_is_refused(llama, config, said):
    (llama / "config.json").unlink()
    if config is not None:
        (llama / "config.json").write_text(config)
    assert said in refusal_of(llama)


def test_quantised_weights_are_refused(llama):
    zoo.copy_of(llama, llama.parent / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "the weights are quantised ('gptq')" in refusal_of(llama.parent / "gptq")


def test_a_folder_without_weights_is_refused(llama):
    (llama / "model.safetensors").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal_of(llama)
    with pytest.raises(BadSetup, match="is not a folder"):
        open_checkpoint(llama / "config.json")


def test_a_config_of_another_size_is_refused(llama):
    zoo.copy_of(llama, llama.parent / "deeper", num_hidden_layers=3)
    assert "'model.layers.2.input_layernorm.weight' of shape [64] is missing" in refusal_of(
        llama.parent / "deeper"
    )
    zoo.copy_of(llama, llama.parent / "shallower", num_hidden_layers=1)
    assert "nothing reads tensor 'model.layers.1." in refusal_of(llama.parent / "shallower")
    zoo.copy_of(llama, llama.parent / "wider", vocab_size=600)
    assert "has shape [512, 64]" in refusal_of(llama.parent / "wider")


def test_tensors_without_use_are_skipped(tiny_checkpoints, tmp_path):
    llama = zoo.copy_of(tiny_checkpoints("llama_tied").folder, tmp_path / "tied")
    embedding = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(
        llama, **{"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    )
    load_weights(open_checkpoint(llama))
    gpt2 = zoo.copy_of(tiny_checkpoints("gpt2").folder, tmp_path / "gpt2")
    change_tensors(gpt2, **{"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    load_weights(open_checkpoint(gpt2))
    v3 = zoo.copy_of(tiny_checkpoints("deepseek_v3").folder, tmp_path / "v3")
    change_tensors(v3, **{"model.layers.3.eh_proj.weight": torch.ones(4, 4)})
    load_weights(open_checkpoint(v3))


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")]
)
def test_hub_files_without_the_prefix_are_the_same_model(name, prefix, tiny_checkpoints, tmp_path):
    tiny = tiny_checkpoints(name)
    folder = zoo.copy_of(tiny.folder, tmp_path / name)
    tensors = load_file(folder / "model.safetensors")
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    save_file(bare, folder / "model.safetensors")
    same, original = load_weights(open_checkpoint(folder)), load_weights(tiny.checkpoint)
    assert all(torch.equal(same.tensors[key], original.tensors[key]) for key in original.tensors)
