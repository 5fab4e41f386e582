"""Where each family keeps its tensors: tables from slots of the decoder to names in the checkpoint.

A slot is one tensor in memory (`plan.py` lists them with their shapes). It is stored as one or more parts, one below
the other; `{expert}` in a part stands for every expert. A part's weight is `<block prefix><part>.weight` and its bias
`.bias`, unless the entry says otherwise.

Row orders of a stored matrix: `plain` is ours (queries, keys, values; gate, up). `grouped`: for every key-value head
its queries, then its key, then its value (BLOOM, Falcon). `alternating`: gate and up rows take turns (gpt-oss).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RowOrder = Literal["plain", "grouped", "alternating"]


@dataclass(frozen=True, slots=True)
class Stored:
    """How one slot is stored: part names, row order, and whether matrices are stored `[in, out]`."""

    parts: tuple[str, ...]
    rows: RowOrder = "plain"
    transposed: bool = False
    weight: str = ".weight"
    bias: str = ".bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Names of one family. Every name but the head's starts with one of `prefixes`, tried in turn.

    `head_prefixes` are the candidates before `lm_head`. `ignored` are regular expressions of stored tensors that the
    decoder has no use for.
    """

    outside: Mapping[str, Stored]
    block_prefix: str
    block: Mapping[str, Stored]
    prefixes: tuple[str, ...]
    head: Stored = field(default_factory=lambda: Stored(("lm_head",)))
    head_prefixes: tuple[str, ...] = ("", "language_model.")
    ignored: tuple[str, ...] = ()
    skips_further_blocks: bool = False
    """Blocks after the last are for predicting several tokens at once, which plain decoding has no use for."""


# ---- Llama and its many relatives -----------------------------------------------------------------------------------

_ATTENTION = {
    "qkv": Stored(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "attention_out": Stored(("self_attn.o_proj",)),
    "query_norm": Stored(("self_attn.q_norm",)),
    "key_norm": Stored(("self_attn.k_norm",)),
}
_MLP = {"up": Stored(("mlp.gate_proj", "mlp.up_proj")), "down": Stored(("mlp.down_proj",))}
_PRE_NORMS = {
    "attention_in_norm": Stored(("input_layernorm",)),
    "mlp_in_norm": Stored(("post_attention_layernorm",)),
}
_POST_NORMS = {
    "attention_out_norm": Stored(("post_attention_layernorm",)),
    "mlp_out_norm": Stored(("post_feedforward_layernorm",)),
}
_EXPERTS = {
    "router": Stored(("mlp.gate",)),
    "router_correction": Stored(("mlp.gate.e_score_correction_bias",), weight=""),
    "experts_up": Stored(("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")),
    "experts_down": Stored(("mlp.experts.{expert}.down_proj",)),
    "shared_up": Stored(("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")),
    "shared_down": Stored(("mlp.shared_experts.down_proj",)),
}


def _llama_like(block: Mapping[str, Stored], *, skips_further_blocks: bool = False) -> Names:
    return Names(
        outside={"embedding": Stored(("embed_tokens",)), "final_norm": Stored(("norm",))},
        block_prefix="layers.{block}.",
        block=block,
        prefixes=("model.", "model.language_model.", "language_model.model.", ""),
        ignored=(r"rotary_emb\.inv_freq$",),
        skips_further_blocks=skips_further_blocks,
    )


LLAMA = _llama_like({**_PRE_NORMS, **_ATTENTION, **_MLP})
OLMO2 = _llama_like({**_POST_NORMS, **_ATTENTION, **_MLP})
GEMMA = _llama_like(
    {
        "attention_in_norm": Stored(("input_layernorm",)),
        "mlp_in_norm": Stored(("pre_feedforward_layernorm",)),
        **_POST_NORMS,
        **_ATTENTION,
        **_MLP,
    }
)
PHI3 = _llama_like(
    {
        **_PRE_NORMS,
        **_ATTENTION,
        "qkv": Stored(("self_attn.qkv_proj",)),
        "up": Stored(("mlp.gate_up_proj",)),
        "down": Stored(("mlp.down_proj",)),
    }
)
QWEN3_MOE = _llama_like({**_PRE_NORMS, **_ATTENTION, **_MLP, **_EXPERTS})
MIXTRAL = _llama_like(
    {
        **_PRE_NORMS,
        **_ATTENTION,
        "router": Stored(("block_sparse_moe.gate",)),
        "experts_up": Stored(
            ("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3")
        ),
        "experts_down": Stored(("block_sparse_moe.experts.{expert}.w2",)),
    }
)
GPT_OSS = _llama_like(
    {
        **_PRE_NORMS,
        **_ATTENTION,
        "sinks": Stored(("self_attn.sinks",), weight=""),
        "router": Stored(("mlp.router",)),
        "experts_up": Stored(
            ("mlp.experts.gate_up_proj",), rows="alternating", transposed=True, weight="", bias="_bias"
        ),
        "experts_down": Stored(("mlp.experts.down_proj",), transposed=True, weight="", bias="_bias"),
    }
)
DEEPSEEK = _llama_like(
    {
        **_PRE_NORMS,
        **_MLP,
        **_EXPERTS,
        "latent_in": Stored(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        "latent_in_direct": Stored(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")),
        "query_latent_norm": Stored(("self_attn.q_a_layernorm",)),
        "query_up": Stored(("self_attn.q_b_proj",)),
        "latent_norm": Stored(("self_attn.kv_a_layernorm",)),
        "latent_up": Stored(("self_attn.kv_b_proj",)),
        "attention_out": Stored(("self_attn.o_proj",)),
    },
    skips_further_blocks=True,
)
LLAMA4 = _llama_like(
    {
        **_PRE_NORMS,
        **_ATTENTION,
        "up": Stored(("feed_forward.gate_proj", "feed_forward.up_proj")),
        "down": Stored(("feed_forward.down_proj",)),
        "router": Stored(("feed_forward.router",)),
        "experts_up": Stored(("feed_forward.experts.gate_up_proj",), transposed=True, weight=""),
        "experts_down": Stored(("feed_forward.experts.down_proj",), transposed=True, weight=""),
        "shared_up": Stored(("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj")),
        "shared_down": Stored(("feed_forward.shared_expert.down_proj",)),
    }
)

# ---- older layouts --------------------------------------------------------------------------------------------------

GPT2 = Names(
    outside={
        "embedding": Stored(("wte",)),
        "positions": Stored(("wpe",)),
        "final_norm": Stored(("ln_f",)),
    },
    block_prefix="h.{block}.",
    block={
        "attention_in_norm": Stored(("ln_1",)),
        "qkv": Stored(("attn.c_attn",), transposed=True),
        "attention_out": Stored(("attn.c_proj",), transposed=True),
        "mlp_in_norm": Stored(("ln_2",)),
        "up": Stored(("mlp.c_fc",), transposed=True),
        "down": Stored(("mlp.c_proj",), transposed=True),
    },
    prefixes=("transformer.", ""),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias$",),
)
_OPT_BLOCK = {
    "qkv": Stored(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "attention_out": Stored(("self_attn.out_proj",)),
    "up": Stored(("fc1",)),
    "down": Stored(("fc2",)),
    "attention_in_norm": Stored(("self_attn_layer_norm",)),
    "mlp_in_norm": Stored(("final_layer_norm",)),
    "attention_out_norm": Stored(("self_attn_layer_norm",)),
    "mlp_out_norm": Stored(("final_layer_norm",)),
}
OPT = Names(
    outside={
        "embedding": Stored(("embed_tokens",)),
        "embedding_in": Stored(("project_in",)),
        "embedding_out": Stored(("project_out",)),
        "positions": Stored(("embed_positions",)),
        "final_norm": Stored(("final_layer_norm",)),
    },
    block_prefix="layers.{block}.",
    block=_OPT_BLOCK,
    prefixes=("model.decoder.", "decoder.", ""),
)
_FUSED_BLOCK = {
    "qkv": Stored(("self_attention.query_key_value",), rows="grouped"),
    "attention_out": Stored(("self_attention.dense",)),
    "up": Stored(("mlp.dense_h_to_4h",)),
    "down": Stored(("mlp.dense_4h_to_h",)),
    **_PRE_NORMS,
}
BLOOM = Names(
    outside={
        "embedding": Stored(("word_embeddings",)),
        "embedding_norm": Stored(("word_embeddings_layernorm",)),
        "final_norm": Stored(("ln_f",)),
    },
    block_prefix="h.{block}.",
    block=_FUSED_BLOCK,
    prefixes=("transformer.", ""),
)
FALCON = Names(
    outside={"embedding": Stored(("word_embeddings",)), "final_norm": Stored(("ln_f",))},
    block_prefix="h.{block}.",
    block=_FUSED_BLOCK,
    prefixes=("transformer.", ""),
)
FALCON_TWO_NORMS = Names(
    outside=FALCON.outside,
    block_prefix=FALCON.block_prefix,
    block={
        **_FUSED_BLOCK,
        "attention_in_norm": Stored(("ln_attn",)),
        "mlp_in_norm": Stored(("ln_mlp",)),
    },
    prefixes=FALCON.prefixes,
)
