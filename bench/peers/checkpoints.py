"""The folders that engines load: Llama's shape at 1.1 billion weights, random, and variants of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import plait.model

TINY = Path(plait.model.__file__).parent / "tiny"
LLAMA_1_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_SPREAD = 0.02  # what models of this shape are initialised with


def ensure_llama(folder: Path) -> Path:
    """The checkpoint in `folder`; written first, with the embedded model's tokenizer, if there is none."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in TINY.glob("*token*.json"):
        shutil.copy(file, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * _SPREAD).bfloat16()
        for name, shape in _shapes(LLAMA_1_1B)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA_1_1B, indent=1))  # last: now it is whole
    return folder


def longer_context(folder: Path, tokens: int) -> Path:
    """The same weights under a configuration that admits sequences of `tokens`."""
    longer = folder.with_name(f"{folder.name}-{tokens}")
    if not (longer / "config.json").exists():
        longer.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.is_file() and file.name != "config.json" and not (longer / file.name).exists():
                (longer / file.name).symlink_to(file.resolve())
        config = json.loads((folder / "config.json").read_text())
        (longer / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": tokens}, indent=1)
        )
    return longer


def vllm_int8(folder: Path) -> Path:
    """The same weights as int8 with a scale for each output, activations by token, in the form that vLLM reads.

    Embedding and head stay bfloat16: its int8 kernels take neither.
    """
    quantized = folder.with_name(f"{folder.name}-w8a8")
    if (quantized / "config.json").exists():
        return quantized
    quantized.mkdir(exist_ok=True)
    for file in folder.glob("*token*.json"):
        shutil.copy(file, quantized)
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if "_proj." in name:
                scale = tensor.float().abs().amax(1, keepdim=True) / 127
                tensors[name] = (tensor.float() / scale).round().to(torch.int8)
                tensors[f"{name}_scale"] = scale
            else:
                tensors[name] = tensor
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": _W8A8}
    (quantized / "config.json").write_text(json.dumps(config, indent=1))
    return quantized


def block_weights(config: dict[str, Any]) -> int:
    """Weights of all blocks' matrices: what every token of a prompt is multiplied with."""
    return sum(shape[0] * shape[1] for name, shape in _shapes(config) if "layers" in name and len(shape) == 2)


def head_weights(config: dict[str, Any]) -> int:
    """Weights of the output matrix, which only tokens that are sampled from are multiplied with."""
    return config["vocab_size"] * config["hidden_size"]


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (query, hidden)
        yield f"{block}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, query)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{block}.mlp.up_proj.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


_W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
