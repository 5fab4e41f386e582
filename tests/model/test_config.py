"""Configs as they are published mean what their authors meant, and what is not implemented is refused in a sentence."""

import dataclasses

import pytest
from transformers import AutoConfig

from plait.errors import BadSetup
from plait.model import (
    FAMILIES,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    MlpSpec,
    MoeSpec,
    YarnScaling,
    read_spec,
)

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_2_5_0_5B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
PHI_4_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}


def test_llama_3_1():
    spec = read_spec(LLAMA_3_1_8B, "config")
    attention = spec.blocks[0].attention
    assert (len(spec.blocks), attention.heads, attention.kv_heads, attention.head_dim) == (32, 32, 8, 128)
    assert attention.rope.theta == 500000.0
    assert attention.rope.scaling == Llama3Scaling(
        factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_tokens=8192
    )
    assert spec.kv_elements_per_token(spec.all_blocks) == 32 * 2 * 8 * 128
    assert spec.kv_elements_per_token(range(4, 7)) == 3 * 2 * 8 * 128
    assert not spec.tied_head and spec.max_model_tokens == 131072


def test_qwen_2_5_has_query_key_value_biases_and_no_window():
    spec = read_spec(QWEN_2_5_0_5B, "config")
    assert all(block.attention.qkv_bias and not block.attention.output_bias for block in spec.blocks)
    assert all(block.attention.window_tokens is None for block in spec.blocks)
    windowed = read_spec({**QWEN_2_5_0_5B, "use_sliding_window": True}, "config")
    assert [block.attention.window_tokens for block in windowed.blocks] == [None] * 21 + [32768] * 3


def test_gemma_3_is_read_from_its_nested_text_config():
    spec = read_spec(GEMMA_3_4B, "config")
    assert spec.family == "gemma3_text" and spec.tied_head and spec.vocab_tokens == 262208
    windows = [block.attention.window_tokens for block in spec.blocks]
    assert windows[:6] == [1024] * 5 + [None]
    local, full = spec.blocks[0].attention.rope, spec.blocks[5].attention.rope
    assert (local.theta, local.scaling) == (10000.0, None)
    assert (full.theta, full.scaling) == (1000000.0, LinearScaling(factor=8.0))
    assert spec.embedding_scale == 2560**0.5 and spec.blocks[0].attention.scale == 256**-0.5


def test_deepseek_v3_caches_its_latent():
    spec = read_spec(DEEPSEEK_V3, "config")
    assert spec.kv_elements_per_token(range(1)) == 512 + 64
    dense, mixture = spec.blocks[2].feed_forward, spec.blocks[3].feed_forward
    assert isinstance(dense, MlpSpec) and isinstance(mixture, MoeSpec)
    assert (mixture.experts, mixture.experts_per_token, mixture.shared.inner) == (256, 8, 2048)
    router = mixture.router
    assert (router.score, router.groups, router.kept_groups, router.scale) == ("sigmoid", 8, 4, 2.5)
    attention = spec.blocks[0].attention
    magnitude = 0.1 * 2.302585092994046 * 1.6020599913279625 + 1  # 0.1 * ln(40) + 1
    assert attention.scale == pytest.approx(192**-0.5 * magnitude**2)
    assert attention.rope.attention_factor == 1.0 and attention.rope.interleaved
    assert isinstance(attention.rope.scaling, YarnScaling) and spec.max_model_tokens == 163840


def test_phi_4_mini_rotates_three_quarters_of_a_head():
    attention = read_spec(PHI_4_MINI, "config").blocks[0].attention
    assert (attention.head_dim, attention.rope.rotary_dim) == (128, 96)
    assert isinstance(attention.rope.scaling, LongropeScaling)
    assert attention.rope.attention_factor == pytest.approx(1.1902380714238083)


def test_gpt_oss_alternates_windows_and_has_sinks():
    spec = read_spec(GPT_OSS_20B, "config")
    assert [block.attention.window_tokens for block in spec.blocks[:3]] == [128, None, 128]
    attention = spec.blocks[0].attention
    assert attention.sinks and attention.qkv_bias and attention.output_bias
    assert attention.rope.attention_factor == pytest.approx(1.3465735902799727)
    assert not attention.rope.scaling.truncates


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_keys_that_a_config_leaves_out_mean_what_they_mean_to_transformers(family):
    wanted = {"num_experts_per_tok": 4} if family == "deepseek_v2" else {}  # the one key that has no default
    full = AutoConfig.for_model(family, **wanted).to_dict()
    assert read_spec({"model_type": family, **wanted}, "sparse") == read_spec(full, "full")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not a family that plait implements; it knows bloom"),
        ({"model_type": None}, "model_type None"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope type 'spiral'"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "'factor' of the rope settings must be a number, not None",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "a list of 64 numbers"),
        ({"hidden_act": "xielu"}, "'hidden_act' must be one of silu"),
        ({"hidden_size": "wide"}, "'hidden_size' must be a whole number, not 'wide'"),
        ({"hidden_size": 4097}, "'hidden_size' must be a multiple of the 32 attention heads"),
        ({"num_key_value_heads": 7}, "'num_key_value_heads' must be a divisor of the 32 attention heads"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be at least 1"),
        ({"attention_bias": "no"}, "'attention_bias' must be true or false"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, which plait does not implement"),
        ({"logit_scale": 0.0625}, "'logit_scale' is 0.0625, which plait does not implement for 'llama'"),
        ({"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
        ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
        ({"residual_multiplier": 0.22}, "'residual_multiplier' is 0.22"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, said):
    with pytest.raises(BadSetup) as refusal:
        read_spec({**LLAMA_3_1_8B, **changes}, "/models/x/config.json")
    assert "/models/x/config.json: " in refusal.value.message and said in refusal.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topk_method": "random"}, "'topk_method' must be 'noaux_tc', not 'random'"),
        ({"scoring_func": "softmax"}, "'scoring_func' must be 'sigmoid'"),
        ({"n_group": 7}, "'n_group' must be a divisor of the 256 experts"),
        ({"moe_layer_freq": 2}, "'moe_layer_freq' is 2"),
        ({"num_experts_per_tok": 300}, "'num_experts_per_tok' must be between 1 and the 256 experts"),
    ],
)
def test_an_unknown_router_is_refused_by_name(changes, said):
    with pytest.raises(BadSetup) as refusal:
        read_spec({**DEEPSEEK_V3, **changes}, "config")
    assert said in refusal.value.message


def test_keys_without_mathematics_change_nothing():
    noise = {
        "use_cache": False,
        "attention_dropout": 0.1,
        "unsloth_fixed": True,
        "transformers_version": "4.44.0",
    }
    assert read_spec({**LLAMA_3_1_8B, **noise}, "a") == read_spec(LLAMA_3_1_8B, "b")


def test_specs_are_hashable_values():
    spec = read_spec(GEMMA_3_4B, "config")
    assert hash(spec) == hash(read_spec(GEMMA_3_4B, "config"))
    assert dataclasses.replace(spec, tied_head=False) != spec
