# pyright: standard
"""A model that is as wide as one of 8B parameters and has next to nothing inside."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import plait.model

BLOCKS = 4
HIDDEN = 4096


def write_model(folder: Path) -> None:
    """A checkpoint with the width of an 8B model, the vocabulary of `tiny`, and little else; its weights are noise."""
    tiny = Path(plait.model.__file__).parent / "tiny"
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder)
