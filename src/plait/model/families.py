"""What distinguishes the supported families: pure data, one entry a `model_type`.

`defaults` are the values that `transformers` assumes for keys a config leaves out, under our spelling of the key (see
`config.py`); a key that appears there is one the family obeys. A new family is an entry here, and a name table if its
tensors are named unlike those of its relatives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from plait.model import names
from plait.model.names import Names
from plait.model.spec import ModelSpec, NormKind, Placement

Value = bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family's configs are read and its tensors named.

    `windows` says which blocks use the sliding window where the config has no `layer_types`: none, all, those from
    `max_window_layers` on, all but every n-th (`sliding_window_pattern`), or those without rope.
    """

    names: Names
    defaults: Mapping[str, Value]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    placement: Placement = "pre"
    norm: NormKind = "rms"
    norm_casts_first: bool = True
    qk_norm: Literal["none", "head", "whole"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_gated: bool = True
    mlp_bias: bool = False
    windows: Literal["none", "all", "from_max_window_layers", "all_but_every_nth", "without_rope"] = "none"
    rope_per_layer_type: bool = False
    rope_left_out: Mapping[str, Value] = field(default_factory=dict[str, Value])
    """Rope settings of a config that has none."""
    router: Literal["softmax", "deepseek_v2", "deepseek_v3", "llama4", "gpt_oss"] = "softmax"
    text_of: str | None = None
    """The multimodal wrapper whose `text_config` this family is."""
    two_norm_names: Names | None = None
    """Names where a parallel block has a norm for each branch."""


_LLAMA: Mapping[str, Value] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
}


def _relative(without: tuple[str, ...] = (), **changes: Value) -> Mapping[str, Value]:
    """Llama's defaults with some left out and others changed."""
    kept = {key: value for key, value in _LLAMA.items() if key not in without}
    return {**kept, **changes}


_MISTRAL = _relative(
    ("attention_bias", "mlp_bias"),
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    sliding_window=4096,
)
_QWEN2 = _relative(
    ("attention_bias", "mlp_bias", "head_dim"),
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
_QWEN3: Mapping[str, Value] = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_GEMMA2 = _relative(
    ("mlp_bias",),
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    sliding_window_pattern=2,
    layer_types=None,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
    scale_embeddings=True,
)
_DEEPSEEK_V2 = _relative(
    ("head_dim", "num_key_value_heads"),
    vocab_size=102400,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_interleave=True,
    first_k_dense_replace=0,
    num_experts=64,
    num_experts_per_tok=None,
    moe_intermediate_size=1407,
    n_shared_experts=2,
    n_group=None,
    topk_group=None,
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
)
_GPT2: Mapping[str, Value] = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": None,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 1024,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "learned_positions": True,
}
_OLMO2 = _relative(
    ("head_dim", "mlp_bias"),
    vocab_size=50304,
    norm_eps=1e-5,
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(names=names.LLAMA, defaults=_LLAMA),
    "mistral": Family(names=names.LLAMA, defaults=_MISTRAL, windows="all"),
    "qwen2": Family(names=names.LLAMA, defaults=_QWEN2, qkv_bias=True, windows="from_max_window_layers"),
    "qwen3": Family(names=names.LLAMA, defaults=_QWEN3, qk_norm="head", windows="from_max_window_layers"),
    "qwen3_moe": Family(
        names=names.QWEN3_MOE,
        defaults={
            **{k: v for k, v in _QWEN3.items() if k not in ("max_window_layers", "layer_types")},
            "head_dim": None,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        qk_norm="head",
        windows="all",
    ),
    "mixtral": Family(
        names=names.MIXTRAL,
        defaults={
            **_MISTRAL,
            "norm_eps": 1e-5,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        windows="all",
    ),
    "gemma2": Family(
        names=names.GEMMA,
        defaults=_GEMMA2,
        aliases={"hidden_activation": "hidden_act"},
        placement="sandwich",
        norm="rms1p",
        norm_casts_first=False,
        windows="all_but_every_nth",
    ),
    "gemma3_text": Family(
        names=names.GEMMA,
        defaults={
            **_GEMMA2,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        aliases={"hidden_activation": "hidden_act"},
        placement="sandwich",
        norm="rms1p",
        norm_casts_first=False,
        qk_norm="head",
        windows="all_but_every_nth",
        rope_per_layer_type=True,
        text_of="gemma3",
    ),
    "phi3": Family(
        names=names.PHI3,
        defaults=_relative(
            ("head_dim", "attention_bias", "mlp_bias"),
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            norm_eps=1e-5,
            sliding_window=None,
            partial_rotary_factor=1.0,
        ),
        windows="all",
    ),
    "olmo2": Family(
        names=names.OLMO2, defaults=_OLMO2, placement="post", norm_casts_first=False, qk_norm="whole"
    ),
    "olmo3": Family(
        names=names.OLMO2,
        defaults={
            **_OLMO2,
            "rope_theta": 500000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        placement="post",
        norm_casts_first=False,
        qk_norm="whole",
        windows="all_but_every_nth",
        rope_per_layer_type=True,
    ),
    "gpt_oss": Family(
        names=names.GPT_OSS,
        defaults=_relative(
            ("mlp_bias",),
            vocab_size=201088,
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=36,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            norm_eps=1e-5,
            attention_bias=True,
            rope_theta=150000.0,
            sliding_window=128,
            sliding_window_pattern=2,
            layer_types=None,
            num_experts=128,
            num_experts_per_tok=4,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
        ),
        norm_casts_first=False,
        windows="all_but_every_nth",
        rope_left_out={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        router="gpt_oss",
    ),
    "deepseek_v2": Family(names=names.DEEPSEEK, defaults=_DEEPSEEK_V2, router="deepseek_v2"),
    "deepseek_v3": Family(
        names=names.DEEPSEEK,
        defaults={
            **{key: value for key, value in _DEEPSEEK_V2.items() if key != "mlp_bias"},
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "max_position_embeddings": 4096,
            "n_shared_experts": 1,
            "num_experts": 256,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
        },
        router="deepseek_v3",
    ),
    "llama4_text": Family(
        names=names.LLAMA4,
        defaults=_relative(
            ("mlp_bias",),
            vocab_size=202048,
            hidden_size=5120,
            intermediate_size=8192,
            intermediate_size_mlp=16384,
            num_hidden_layers=48,
            num_attention_heads=40,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            norm_eps=1e-5,
            rope_theta=500000.0,
            rope_interleave=True,
            num_experts=16,
            num_experts_per_tok=1,
            moe_layers=None,
            interleave_moe_layer_step=1,
            use_qk_norm=True,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            attention_chunk_size=8192,
            layer_types=None,
            attn_temperature_tuning=True,
            floor_scale=8192,
            attn_scale=0.1,
        ),
        router="llama4",
        text_of="llama4",
    ),
    "gpt2": Family(
        names=names.GPT2,
        defaults=_GPT2,
        aliases={
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "n_inner": "intermediate_size",
            "activation_function": "hidden_act",
        },
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        mlp_gated=False,
        mlp_bias=True,
    ),
    "opt": Family(
        names=names.OPT,
        defaults={
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "relu",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "learned_positions": True,
            "position_offset": 2,
            "do_layer_norm_before": True,
            "word_embed_proj_dim": None,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "norm_eps": 1e-5,
        },
        aliases={"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
        norm="layer",
        mlp_gated=False,
    ),
    "bloom": Family(
        names=names.BLOOM,
        defaults={
            "vocab_size": 250880,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "intermediate_size": None,
            "hidden_act": "gelu_tanh",
            "max_position_embeddings": 2048,
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "alibi": True,
            "embedding_norm": True,
        },
        aliases={
            "n_embed": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "seq_length": "max_position_embeddings",
        },
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        mlp_gated=False,
        mlp_bias=True,
    ),
    "falcon": Family(
        names=names.FALCON,
        defaults={
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "hidden_act": "gelu",
            "max_position_embeddings": 2048,
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "alibi": False,
            "alibi_rounded": True,
            "bias": False,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "num_ln_in_parallel_attn": None,
        },
        aliases={
            "n_embed": "hidden_size",
            "num_kv_heads": "num_key_value_heads",
            "ffn_hidden_size": "intermediate_size",
            "activation": "hidden_act",
        },
        norm="layer",
        mlp_gated=False,
        two_norm_names=names.FALCON_TWO_NORMS,
    ),
    "granite": Family(
        names=names.LLAMA,
        defaults=_relative(
            ("head_dim",),
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=1.0,
        ),
    ),
    "smollm3": Family(
        names=names.LLAMA,
        defaults=_relative(
            ("head_dim",),
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            rope_theta=2000000.0,
            use_sliding_window=False,
            sliding_window=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            layer_types=None,
        ),
        windows="without_rope",
    ),
}


def names_of(spec: ModelSpec) -> Names:
    """The name table of a model's checkpoint."""
    family = FAMILIES[spec.family]
    if family.two_norm_names and spec.blocks[0].placement == "parallel":
        return family.two_norm_names
    return family.names
