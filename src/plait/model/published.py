"""Shapes of published models by name, for estimates: no weights, no download. Data, with its source.

Each is the part of the model's `config.json` that says how large it is; `read_spec` fills in the family's defaults.
"""

from collections.abc import Mapping
from types import MappingProxyType

from plait.errors import BadSetup
from plait.model.config import read_spec
from plait.model.spec import ModelSpec


def _opt(hidden: int, blocks: int, heads: int) -> Mapping[str, object]:
    # Zhang et al. 2022 (OPT), table 1; the inner width is four times the hidden one.
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
    }


def _llama(
    hidden: int, blocks: int, heads: int, kv_heads: int, inner: int, vocab: int, context: int
) -> Mapping[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


PUBLISHED_SHAPES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "opt-13b": _opt(5120, 40, 40),
        "opt-66b": _opt(9216, 64, 72),
        "opt-175b": _opt(12288, 96, 96),
        # Touvron et al. 2023 (LLaMA), table 2, and the released configurations.
        "llama-13b": _llama(5120, 40, 40, 40, 13824, 32000, 2048),
        "llama-65b": _llama(8192, 80, 64, 64, 22016, 32000, 2048),
        # Touvron et al. 2023 (Llama 2), table 1, and the released configurations.
        "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
        "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
        "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096),
        # Grattafiori et al. 2024 (Llama 3), table 3.
        "llama-3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192),
        "llama-3-70b": _llama(8192, 80, 64, 8, 28672, 128256, 8192),
    }
)


def published_spec(name: str) -> ModelSpec:
    """The shape of a published model.

    Raises:
        BadSetup: none is called so; the message lists those there are.
    """
    config = PUBLISHED_SHAPES.get(name)
    if config is None:
        raise BadSetup(
            f"no model shape is called {name!r}; known are {', '.join(PUBLISHED_SHAPES)}, or give a folder with a "
            "config.json"
        )
    return read_spec(config, name)
