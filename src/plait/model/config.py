"""Reads a checkpoint's `config.json`, in the old and the new dialect of transformers, into a `ModelSpec`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from plait.errors import BadSetup
from plait.model.config_reader import ConfigReader
from plait.model.config_rope import max_model_tokens, read_rope, rope_kind, rope_number, rope_parameters
from plait.model.rope import yarn_magnitude
from plait.model.spec import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    BlockSpec,
    LatentSpec,
    LearnedPositions,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    Placement,
    QkNormSpec,
    RouterSpec,
    TemperatureSpec,
)

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def read_spec(config: Mapping[str, object], where: str) -> ModelSpec:
    """The model that a parsed `config.json` describes; `where` names the file in messages.

    Raises:
        BadSetup: an unknown family, rope, router or activation, or a setting that the decoder does not implement.
    """
    reader = ConfigReader.of(config, where)
    blocks = tuple(_block(reader, index) for index in range(reader.whole("num_hidden_layers")))
    if not blocks:
        raise reader.refusal("num_hidden_layers", "at least 1")
    hidden = reader.whole("hidden_size")
    norm = _norm(reader)
    final_norm: NormSpec | None = norm
    if reader.obeys("do_layer_norm_before") and (
        not reader.flag("do_layer_norm_before") or reader.flag("_remove_final_layer_norm")
    ):
        final_norm = None
    positions = None
    if reader.flag("learned_positions"):
        offset = reader.whole("position_offset") if reader.obeys("position_offset") else 0
        positions = LearnedPositions(rows=reader.whole("max_position_embeddings") + offset, offset=offset)
    width = reader.maybe_whole("word_embed_proj_dim")
    scale = hidden**0.5 if reader.flag("scale_embeddings") else reader.number_or("embedding_multiplier", 1.0)
    return ModelSpec(
        family=reader.family_name,
        vocab_tokens=reader.whole("vocab_size"),
        hidden=hidden,
        embedding_width=width or hidden,
        blocks=blocks,
        max_model_tokens=max_model_tokens(reader, blocks),
        tied_head=reader.flag("tie_word_embeddings"),
        final_norm=final_norm,
        embedding_scale=scale,
        embedding_norm=norm if reader.flag("embedding_norm") else None,
        positions=positions,
        logit_scale=1.0 / reader.number_or("logits_scaling", 1.0),
        logit_softcap=reader.maybe_number("final_logit_softcapping"),
    )


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _norm(reader: ConfigReader) -> NormSpec:
    weighted = not reader.obeys("layer_norm_elementwise_affine") or reader.flag(
        "layer_norm_elementwise_affine"
    )
    return NormSpec(
        kind=reader.family.norm,
        eps=reader.number("norm_eps"),
        weighted=weighted,
        casts_first=reader.family.norm_casts_first,
    )


def _placement(reader: ConfigReader) -> Placement:
    if reader.obeys("do_layer_norm_before"):
        return "pre" if reader.flag("do_layer_norm_before") else "after_residual"
    if not reader.obeys("parallel_attn"):
        return reader.family.placement
    if reader.flag("new_decoder_architecture"):
        norms = reader.maybe_whole("num_ln_in_parallel_attn")
        return "parallel" if norms in (None, 2) else "parallel_shared"
    return "parallel_shared" if reader.flag("parallel_attn") else "pre"


def _block(reader: ConfigReader, index: int) -> BlockSpec:
    attention = _latent_attention(reader) if reader.obeys("kv_lora_rank") else _attention(reader, index)
    return BlockSpec(
        placement=_placement(reader),
        norm=_norm(reader),
        attention=attention,
        feed_forward=_feed_forward(reader, index),
        residual_scale=reader.number_or("residual_multiplier", 1.0),
    )


def _all_biased(reader: ConfigReader) -> bool:
    return any(reader.flag(key) for key in ("attention_bias", "enable_bias", "bias"))


def _attention(reader: ConfigReader, index: int) -> AttentionSpec:
    heads = reader.whole("num_attention_heads")
    kv_heads = _kv_heads(reader, heads)
    head_dim = reader.maybe_whole("head_dim")
    if head_dim is None:
        if not heads or reader.whole("hidden_size") % heads:
            raise reader.refusal("hidden_size", f"a multiple of the {heads} attention heads")
        head_dim = reader.whole("hidden_size") // heads
    if not kv_heads or heads % kv_heads:
        raise reader.refusal("num_key_value_heads", f"a divisor of the {heads} attention heads")
    layer_type = _layer_type(reader, index)
    rotates = _rotates(reader, index)
    rope = read_rope(reader, layer_type, head_dim) if rotates else None
    qk_norm = None
    if reader.family.qk_norm != "none":
        qk_norm = QkNormSpec(norm=_norm(reader), over=reader.family.qk_norm)
    if reader.flag("use_qk_norm") and rotates:
        unweighted = replace(_norm(reader), weighted=False)
        qk_norm = QkNormSpec(norm=unweighted, over="head", after_rope=True)
    temperature = None
    if reader.flag("attn_temperature_tuning") and not rotates:
        temperature = TemperatureSpec(
            scale=reader.number("attn_scale"), interval_tokens=reader.number("floor_scale")
        )
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        scale=_scale(reader, head_dim, index),
        rope=rope,
        window_tokens=reader.whole("sliding_window") if layer_type == "sliding_attention" else None,
        chunk_tokens=reader.whole("attention_chunk_size") if layer_type == "chunked_attention" else None,
        softcap=reader.maybe_number("attn_logit_softcapping"),
        sinks=reader.family.router == "gpt_oss",
        alibi=_alibi(reader, heads, head_dim),
        temperature=temperature,
        qkv_bias=reader.family.qkv_bias or _all_biased(reader),
        output_bias=reader.family.output_bias or _all_biased(reader),
        qk_norm=qk_norm,
    )


def _kv_heads(reader: ConfigReader, heads: int) -> int:
    if reader.obeys("multi_query") and not reader.flag("new_decoder_architecture"):
        if reader.flag("multi_query"):
            return 1
        return reader.maybe_whole("num_key_value_heads") or heads
    return reader.maybe_whole("num_key_value_heads") or heads


def _rotates(reader: ConfigReader, index: int) -> bool:
    """Whether the block's attention has rotary positions."""
    if not reader.obeys("rope_theta") or reader.flag("alibi"):
        return False
    listed = reader.maybe_list("no_rope_layers", reader.whole("num_hidden_layers"))
    if listed:
        return bool(listed[index])
    interval = reader.maybe_whole("no_rope_layer_interval")
    return interval is None or (index + 1) % interval != 0


def _scale(reader: ConfigReader, head_dim: int, index: int) -> float:
    if reader.obeys("query_pre_attn_scalar"):
        return reader.number("query_pre_attn_scalar") ** -0.5
    if reader.obeys("attention_multiplier"):
        return reader.number("attention_multiplier")
    scale = head_dim**-0.5
    if reader.obeys("scale_attn_weights") and not reader.flag("scale_attn_weights"):
        scale = 1.0
    return scale / (index + 1) if reader.flag("scale_attn_by_inverse_layer_idx") else scale


def _layer_type(reader: ConfigReader, index: int) -> str:
    """What the block's attention sees: everything, a sliding window, or its chunk."""
    window = reader.maybe_whole("sliding_window")
    if reader.obeys("use_sliding_window") and not reader.flag("use_sliding_window"):
        window = None
    listed = reader.maybe_list("layer_types", reader.whole("num_hidden_layers"))
    if listed:
        layer_type = listed[index]
        if layer_type not in ("full_attention", "sliding_attention", "chunked_attention"):
            raise BadSetup(
                f"{reader.where}: layer type {layer_type!r} of block {index} is not one that plait implements"
            )
        if layer_type == "sliding_attention" and window is None:
            return "full_attention"
        return cast(str, layer_type)
    if reader.maybe_whole("attention_chunk_size"):
        return "chunked_attention" if _rotates(reader, index) else "full_attention"
    match reader.family.windows:
        case "none":
            slides = False
        case "all":
            slides = True
        case "from_max_window_layers":
            slides = index >= reader.whole("max_window_layers")
        case "all_but_every_nth":
            slides = (index + 1) % reader.whole("sliding_window_pattern") != 0
        case "without_rope":
            slides = not _rotates(reader, index)
    return "sliding_attention" if slides and window is not None else "full_attention"


def _alibi(reader: ConfigReader, heads: int, head_dim: int) -> AlibiSpec | None:
    """Slopes `2^(-8h/H)`; other than powers of two interleave every second slope of the next power."""
    if not reader.flag("alibi"):
        return None
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    if reader.flag("alibi_rounded"):
        return AlibiSpec(slopes=tuple(slopes), scale=head_dim**-0.5, rounded=True)
    return AlibiSpec(slopes=tuple(slopes))


def _latent_attention(reader: ConfigReader) -> AttentionSpec:
    """DeepSeek's attention; scores are also multiplied by the square of yarn's `mscale_all_dim` magnitude."""
    heads, nope_dim, rope_dim = (
        reader.whole(key) for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    parameters = rope_parameters(reader, "full_attention")
    scale = (nope_dim + rope_dim) ** -0.5
    if rope_kind(reader, parameters) != "default" and parameters.get("mscale_all_dim"):
        scale *= (
            yarn_magnitude(
                rope_number(reader, parameters, "factor"),
                rope_number(reader, parameters, "mscale_all_dim"),
            )
            ** 2
        )
    return AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=nope_dim + rope_dim,
        value_dim=reader.whole("v_head_dim"),
        scale=scale,
        rope=read_rope(reader, "full_attention", rope_dim),
        qkv_bias=_all_biased(reader),
        output_bias=_all_biased(reader),
        latent=LatentSpec(
            query_rank=reader.maybe_whole("q_lora_rank") or 0,
            kv_rank=reader.whole("kv_lora_rank"),
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            norm=replace(
                _norm(reader), eps=1e-6
            ),  # the reference does not pass rms_norm_eps to the latents' norms
        ),
    )


# ---- feed forward ---------------------------------------------------------------------------------------------------


def _activation(reader: ConfigReader) -> Activation:
    name = reader.word("hidden_act")
    if name not in _ACTIVATIONS:
        raise reader.refusal("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _feed_forward(reader: ConfigReader, index: int) -> MlpSpec | MoeSpec:
    inner = reader.maybe_whole("intermediate_size") or 4 * reader.whole("hidden_size")
    bias = reader.family.mlp_bias or any(reader.flag(key) for key in ("mlp_bias", "enable_bias", "bias"))
    dense = MlpSpec(inner=inner, activation=_activation(reader), gated=reader.family.mlp_gated, bias=bias)
    if not _is_mixture(reader, index):
        dense_inner = reader.maybe_whole("intermediate_size_mlp")
        return replace(dense, inner=dense_inner) if dense_inner else dense
    experts, chosen = reader.whole("num_experts"), reader.whole("num_experts_per_tok")
    if not 0 < chosen <= experts:
        raise reader.refusal("num_experts_per_tok", f"between 1 and the {experts} experts")
    expert = replace(dense, inner=reader.maybe_whole("moe_intermediate_size") or inner)
    shared = None
    if reader.family.router == "llama4":
        shared = dense
    elif shared_experts := reader.maybe_whole("n_shared_experts"):
        shared = replace(expert, inner=expert.inner * shared_experts)
    if reader.family.router == "gpt_oss":
        expert = replace(
            expert,
            activation="clamped_swiglu",
            bias=True,
            swiglu_alpha=reader.number("swiglu_alpha"),
            swiglu_limit=reader.number("swiglu_limit"),
        )
    router = _router(reader, experts)
    return MoeSpec(experts=experts, experts_per_token=chosen, expert=expert, router=router, shared=shared)


def _is_mixture(reader: ConfigReader, index: int) -> bool:
    if not reader.obeys("num_experts") or reader.whole("num_experts") == 0:
        return False
    if reader.obeys("first_k_dense_replace"):
        return index >= reader.whole("first_k_dense_replace")
    if reader.obeys("decoder_sparse_step"):
        only_dense = reader.maybe_list("mlp_only_layers") or ()
        return index not in only_dense and (index + 1) % reader.whole("decoder_sparse_step") == 0
    if reader.obeys("moe_layers"):
        listed = reader.maybe_list("moe_layers")
        if listed is not None:
            return index in listed
        return (index + 1) % reader.whole("interleave_moe_layer_step") == 0
    return True


def _router(reader: ConfigReader, experts: int) -> RouterSpec:
    """The router; published configs name their method, and it must be the one that the family's reference has."""
    expected_scores = "sigmoid" if reader.family.router == "deepseek_v3" else "softmax"
    if reader.values.get("scoring_func", expected_scores) != expected_scores:
        raise reader.refusal("scoring_func", f"{expected_scores!r}, the router of {reader.family_name!r}")
    scale = reader.number_or("routed_scaling_factor", 1.0)
    groups, kept_groups = reader.maybe_whole("n_group") or 1, reader.maybe_whole("topk_group") or 1
    if experts % groups or kept_groups > groups:
        raise reader.refusal("n_group", f"a divisor of the {experts} experts, and at least topk_group")
    method = reader.values.get("topk_method")
    match reader.family.router:
        case "softmax":
            return RouterSpec(score="softmax", renormalises=reader.flag("norm_topk_prob"))
        case "gpt_oss":
            # The softmax of the chosen logits is the renormalised softmax of all.
            return RouterSpec(score="softmax", renormalises=True, bias=True)
        case "llama4":
            return RouterSpec(score="sigmoid", renormalises=False, weighs="input")
        case "deepseek_v2":
            if method == "greedy":
                return RouterSpec(score="softmax", renormalises=False, scale=scale)
            if method == "group_limited_greedy":
                return RouterSpec(
                    score="softmax", renormalises=False, scale=scale, groups=groups, kept_groups=kept_groups
                )
            raise reader.refusal("topk_method", "'greedy' or 'group_limited_greedy'")
        case "deepseek_v3":
            if method != "noaux_tc":
                raise reader.refusal("topk_method", "'noaux_tc'")
            return RouterSpec(
                score="sigmoid",
                renormalises=reader.flag("norm_topk_prob"),
                scale=scale,
                correction=True,
                groups=groups,
                kept_groups=kept_groups,
                group_rank="best_two",
            )
