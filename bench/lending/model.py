"""A Llama with random weights, drawn so that every key counts for the next token.

Weights as they are usually initialised make attention nearly uniform and the next token hardly depend on it: lost or
stale keys would go unnoticed. Matrices are drawn at 1.5 / sqrt(inputs) instead, which makes attention sharp.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from plait.engine import resolve_model

VOCABULARY = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of the model; the tokenizer is `tiny`'s."""

    blocks: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 512
    context_tokens: int = 32768

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of a token in float32, all blocks."""
        return self.blocks * 2 * self.kv_heads * self.head_dim * 4


def make_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the checkpoint, with the tokenizer of `tiny`."""
    tiny = resolve_model("tiny")
    folder.mkdir(parents=True)
    for file in tiny.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "training_log.json":
            shutil.copy(file, folder)
    config = json.loads((tiny / "config.json").read_text()) | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_tokens,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def drawn(outputs: int, inputs: int, scale: float = 1.5) -> torch.Tensor:
        return scale * inputs**-0.5 * torch.randn(outputs, inputs, generator=generator)

    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    made = {
        "model.embed_tokens.weight": drawn(VOCABULARY, shape.hidden, 0.5 * shape.hidden**0.5),
        "model.norm.weight": torch.ones(shape.hidden),
        "lm_head.weight": drawn(VOCABULARY, shape.hidden),
    }
    for block in range(shape.blocks):
        matrices = {
            "self_attn.q_proj": (query, shape.hidden),
            "self_attn.k_proj": (kv, shape.hidden),
            "self_attn.v_proj": (kv, shape.hidden),
            "self_attn.o_proj": (shape.hidden, query),
            "mlp.gate_proj": (shape.intermediate, shape.hidden),
            "mlp.up_proj": (shape.intermediate, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.intermediate),
        }
        for name, (outputs, inputs) in matrices.items():
            made[f"model.layers.{block}.{name}.weight"] = drawn(outputs, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{block}.{name}.weight"] = torch.ones(shape.hidden)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def settings_of(shape: Shape) -> dict[str, int]:
    """For the result."""
    return asdict(shape)
