"""Reads a checkpoint's `config.json`, in the old and the new dialect of transformers, into a `ModelSpec`.

The new dialect (version 5) has `rope_parameters` (one dict, or one per layer type), `layer_types`, `dtype`; the old one
has `rope_theta` with `rope_scaling`, `sliding_window_pattern`, `rope_local_base_freq`. Keys are first brought to one
spelling. A key that changes the mathematics and that the family does not obey must be absent or neutral.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from plait.errors import BadSetup
from plait.model.families import FAMILIES, Family, Value
from plait.model.rope import longrope_magnitude, yarn_magnitude
from plait.model.spec import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    BlockSpec,
    DynamicScaling,
    LatentSpec,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    Placement,
    QkNormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
    TemperatureSpec,
    YarnScaling,
)

_ALIASES: Mapping[str, str] = {
    "rms_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
}

_NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "bias": (False,),
    "clip_qkv": (None,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "no_rope_layers": (None,),
    "norm_topk_prob": (False,),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
    "shared_expert_intermediate_size": (0,),
    "use_bidirectional_attention": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
"""Keys that change the mathematics somewhere, with the values that do not; absent or null is always neutral."""

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

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_spec(config: Mapping[str, object], where: str) -> ModelSpec:
    """The model that a parsed `config.json` describes; `where` names the file in messages.

    Raises:
        BadSetup: an unknown family, rope, router or activation, or a setting that the decoder does not implement.
    """
    reader = _Reader.of(config, where)
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
        max_model_tokens=_max_model_tokens(reader, blocks),
        tied_head=reader.flag("tie_word_embeddings"),
        final_norm=final_norm,
        embedding_scale=scale,
        embedding_norm=norm if reader.flag("embedding_norm") else None,
        positions=positions,
        logit_scale=1.0 / reader.number_or("logits_scaling", 1.0),
        logit_softcap=reader.maybe_number("final_logit_softcapping"),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """One config under our spelling of its keys, with typed access that refuses in one sentence."""

    values: Mapping[str, object]
    family: Family
    family_name: str
    where: str

    @staticmethod
    def of(config: Mapping[str, object], where: str) -> "_Reader":
        """Find the family, unwrap a multimodal config, spell the keys our way, and check those that are not obeyed."""
        model_type = config.get("model_type")
        by_wrapper = {family.text_of: name for name, family in FAMILIES.items() if family.text_of}
        if model_type in by_wrapper and isinstance(config.get("text_config"), Mapping):
            text = dict(cast(Mapping[str, object], config["text_config"]))
            text["model_type"] = by_wrapper[model_type]
            if "tie_word_embeddings" in config:
                text["tie_word_embeddings"] = config["tie_word_embeddings"]
            return _Reader.of(text, where)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            known = ", ".join(sorted({family.text_of or name for name, family in FAMILIES.items()}))
            raise BadSetup(
                f"{where}: model_type {model_type!r} is not a family that plait implements; it knows {known}"
            )
        family = FAMILIES[model_type]
        values: dict[str, object] = dict(family.defaults)
        values.update(
            {_ALIASES.get(key, key): value for key, value in config.items() if key not in family.aliases}
        )
        values.update({family.aliases[key]: value for key, value in config.items() if key in family.aliases})
        reader = _Reader(values, family, model_type, where)
        for key, neutral in _NEUTRAL.items():
            value = values.get(key)
            if not reader.obeys(key) and value is not None and value not in neutral:
                raise BadSetup(
                    f"{where}: {key!r} is {value!r}, which plait does not implement for {model_type!r}; "
                    f"only {' or '.join(repr(n) for n in neutral)} is"
                )
        return reader

    def obeys(self, key: str) -> bool:
        """Whether the family has this key at all."""
        return key in self.family.defaults

    def refusal(self, key: str, expected: str) -> BadSetup:
        return BadSetup(f"{self.where}: {key!r} must be {expected}, not {self.values.get(key)!r}")

    def whole(self, key: str) -> int:
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refusal(key, "a whole number")
        return value

    def maybe_whole(self, key: str) -> int | None:
        """The number if the family obeys the key and the config sets it."""
        if not self.obeys(key) or self.values.get(key) is None:
            return None
        return self.whole(key)

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, "a number")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        if not self.obeys(key) or self.values.get(key) is None:
            return None
        return self.number(key)

    def number_or(self, key: str, otherwise: float) -> float:
        found = self.maybe_number(key)
        return otherwise if found is None else found

    def flag(self, key: str) -> bool:
        """The flag; false where the family does not know it."""
        if not self.obeys(key):
            return False
        value = self.values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def word(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.refusal(key, "a word")
        return value

    def maybe_list(self, key: str, length: int | None = None) -> Sequence[object] | None:
        if not self.obeys(key) or self.values.get(key) is None:
            return None
        value = self.values[key]
        if not isinstance(value, list | tuple) or (
            length is not None and len(cast(list[object], value)) < length
        ):
            raise self.refusal(key, f"a list of {length} entries" if length is not None else "a list")
        return cast(list[object], value)

    def mapping(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.refusal(key, "an object")
        return cast(Mapping[str, object], value)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _norm(reader: _Reader) -> NormSpec:
    weighted = not reader.obeys("layer_norm_elementwise_affine") or reader.flag(
        "layer_norm_elementwise_affine"
    )
    return NormSpec(
        kind=reader.family.norm,
        eps=reader.number("norm_eps"),
        weighted=weighted,
        casts_first=reader.family.norm_casts_first,
    )


def _placement(reader: _Reader) -> Placement:
    if reader.obeys("do_layer_norm_before"):
        return "pre" if reader.flag("do_layer_norm_before") else "after_residual"
    if not reader.obeys("parallel_attn"):
        return reader.family.placement
    if reader.flag("new_decoder_architecture"):
        norms = reader.maybe_whole("num_ln_in_parallel_attn")
        return "parallel" if norms in (None, 2) else "parallel_shared"
    return "parallel_shared" if reader.flag("parallel_attn") else "pre"


def _block(reader: _Reader, index: int) -> BlockSpec:
    attention = _latent_attention(reader) if reader.obeys("kv_lora_rank") else _attention(reader, index)
    return BlockSpec(
        placement=_placement(reader),
        norm=_norm(reader),
        attention=attention,
        feed_forward=_feed_forward(reader, index),
        residual_scale=reader.number_or("residual_multiplier", 1.0),
    )


def _all_biased(reader: _Reader) -> bool:
    return any(reader.flag(key) for key in ("attention_bias", "enable_bias", "bias"))


def _attention(reader: _Reader, index: int) -> AttentionSpec:
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
    rope = _rope(reader, layer_type, head_dim) if rotates else None
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


def _kv_heads(reader: _Reader, heads: int) -> int:
    if reader.obeys("multi_query") and not reader.flag("new_decoder_architecture"):
        if reader.flag("multi_query"):
            return 1
        return reader.maybe_whole("num_key_value_heads") or heads
    return reader.maybe_whole("num_key_value_heads") or heads


def _rotates(reader: _Reader, index: int) -> bool:
    """Whether the block's attention has rotary positions."""
    if not reader.obeys("rope_theta") or reader.flag("alibi"):
        return False
    listed = reader.maybe_list("no_rope_layers", reader.whole("num_hidden_layers"))
    if listed:
        return bool(listed[index])
    interval = reader.maybe_whole("no_rope_layer_interval")
    return interval is None or (index + 1) % interval != 0


def _scale(reader: _Reader, head_dim: int, index: int) -> float:
    if reader.obeys("query_pre_attn_scalar"):
        return reader.number("query_pre_attn_scalar") ** -0.5
    if reader.obeys("attention_multiplier"):
        return reader.number("attention_multiplier")
    scale = head_dim**-0.5
    if reader.obeys("scale_attn_weights") and not reader.flag("scale_attn_weights"):
        scale = 1.0
    return scale / (index + 1) if reader.flag("scale_attn_by_inverse_layer_idx") else scale


def _layer_type(reader: _Reader, index: int) -> str:
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


def _alibi(reader: _Reader, heads: int, head_dim: int) -> AlibiSpec | None:
    """Slopes `2^(-8h/H)`; other than powers of two interleave every second slope of the next power."""
    if not reader.flag("alibi"):
        return None
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / power) for h in range(heads - power)]
    if reader.flag("alibi_rounded"):
        return AlibiSpec(slopes=tuple(slopes), scale=head_dim**-0.5, rounded=True)
    return AlibiSpec(slopes=tuple(slopes))


def _latent_attention(reader: _Reader) -> AttentionSpec:
    """DeepSeek's attention; scores are also multiplied by the square of yarn's `mscale_all_dim` magnitude."""
    heads, nope_dim, rope_dim = (
        reader.whole(key) for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim")
    )
    parameters = _rope_parameters(reader, "full_attention")
    scale = (nope_dim + rope_dim) ** -0.5
    if _rope_kind(reader, parameters) != "default" and parameters.get("mscale_all_dim"):
        scale *= (
            yarn_magnitude(
                _number(reader, parameters, "factor"),
                _number(reader, parameters, "mscale_all_dim"),
            )
            ** 2
        )
    return AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=nope_dim + rope_dim,
        value_dim=reader.whole("v_head_dim"),
        scale=scale,
        rope=_rope(reader, "full_attention", rope_dim),
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


def _activation(reader: _Reader) -> Activation:
    name = reader.word("hidden_act")
    if name not in _ACTIVATIONS:
        raise reader.refusal("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _feed_forward(reader: _Reader, index: int) -> MlpSpec | MoeSpec:
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


def _is_mixture(reader: _Reader, index: int) -> bool:
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


def _router(reader: _Reader, experts: int) -> RouterSpec:
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


# ---- rope -----------------------------------------------------------------------------------------------------------


def _rope_parameters(reader: _Reader, layer_type: str) -> Mapping[str, object]:
    """Rope settings of one layer type, from either dialect, always with `rope_theta`."""
    theta = reader.values.get("rope_theta")
    local = reader.family.rope_per_layer_type and layer_type == "sliding_attention"
    if local and reader.obeys("rope_local_base_freq"):
        theta = reader.values.get("rope_local_base_freq")
    parameters = reader.mapping("rope_parameters")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        nested = parameters.get(layer_type)
        parameters = cast(Mapping[str, object], nested) if isinstance(nested, Mapping) else {}
    scaling: Mapping[str, object] = {} if local else reader.mapping("rope_scaling")
    stated = {**scaling, **parameters}
    return {"rope_theta": theta, **(stated or reader.family.rope_left_out)}


def _rope_kind(reader: _Reader, parameters: Mapping[str, object]) -> str:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su" or (kind == "yarn" and reader.family_name == "phi3"):
        return "longrope"  # what early Phi-3 checkpoints called it
    if kind not in _ROPE_KINDS:
        raise BadSetup(
            f"{reader.where}: rope type {kind!r} is not one that plait implements; it knows {', '.join(_ROPE_KINDS)}"
        )
    return cast(str, kind)


def _number(
    reader: _Reader, parameters: Mapping[str, object], key: str, otherwise: float | None = None
) -> float:
    value = parameters.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSetup(f"{reader.where}: {key!r} of the rope settings must be a number, not {value!r}")
    return float(value)


def _factors(reader: _Reader, parameters: Mapping[str, object], key: str, length: int) -> tuple[float, ...]:
    value = parameters.get(key)
    if not isinstance(value, list | tuple) or len(cast(list[object], value)) != length:
        raise BadSetup(f"{reader.where}: {key!r} of the rope settings must be a list of {length} numbers")
    return tuple(_number(reader, {key: entry}, key) for entry in cast(list[object], value))


def _rope(reader: _Reader, layer_type: str, head_dim: int) -> RopeSpec:
    parameters = _rope_parameters(reader, layer_type)
    partial = reader.number_or("partial_rotary_factor", 1.0)
    stated = parameters.get("partial_rotary_factor")
    if stated is not None:
        partial = _number(reader, parameters, "partial_rotary_factor")
        if partial != 1 and not reader.obeys("partial_rotary_factor"):
            raise BadSetup(
                f"{reader.where}: 'partial_rotary_factor' is {partial}, which plait does not implement for "
                f"{reader.family_name!r}; only 1 is"
            )
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise BadSetup(
            f"{reader.where}: {rotary_dim} rotary dimensions of a head of {head_dim} are not an even number"
        )
    scaling, attention_factor = _rope_scaling(reader, parameters, rotary_dim)
    return RopeSpec(
        theta=_number(reader, parameters, "rope_theta"),
        rotary_dim=rotary_dim,
        interleaved=reader.flag("rope_interleave"),
        attention_factor=attention_factor,
        scaling=scaling,
    )


def _rope_scaling(
    reader: _Reader, parameters: Mapping[str, object], rotary_dim: int
) -> tuple[RopeScaling | None, float]:
    """How frequencies are scaled, and the factor on cosines and sines."""
    max_tokens = reader.whole("max_position_embeddings")
    original = _original_tokens(reader, parameters)
    match _rope_kind(reader, parameters):
        case "linear":
            return LinearScaling(factor=_number(reader, parameters, "factor")), 1.0
        case "dynamic":
            return DynamicScaling(
                factor=_number(reader, parameters, "factor"), original_tokens=max_tokens
            ), 1.0
        case "llama3":
            llama3 = Llama3Scaling(
                factor=_number(reader, parameters, "factor"),
                low_frequency_factor=_number(reader, parameters, "low_freq_factor"),
                high_frequency_factor=_number(reader, parameters, "high_freq_factor"),
                original_tokens=original,
            )
            return llama3, 1.0
        case "yarn":
            factor = _number(reader, parameters, "factor", max_tokens / original)
            yarn = YarnScaling(
                factor=factor,
                original_tokens=original,
                beta_fast=_number(reader, parameters, "beta_fast", 32.0),
                beta_slow=_number(reader, parameters, "beta_slow", 1.0),
                truncates=bool(parameters.get("truncate", True)),
            )
            magnitude = yarn_magnitude(factor)
            if parameters.get("mscale") and parameters.get("mscale_all_dim"):
                magnitude = yarn_magnitude(factor, _number(reader, parameters, "mscale"))
                magnitude /= yarn_magnitude(factor, _number(reader, parameters, "mscale_all_dim"))
            return yarn, _number(reader, parameters, "attention_factor", magnitude)
        case "longrope":
            longrope = LongropeScaling(
                short_factors=_factors(reader, parameters, "short_factor", rotary_dim // 2),
                long_factors=_factors(reader, parameters, "long_factor", rotary_dim // 2),
                original_tokens=original,
            )
            factor = _number(reader, parameters, "factor", max_tokens / original)
            magnitude = longrope_magnitude(factor, original)
            return longrope, _number(reader, parameters, "attention_factor", magnitude)
        case _:
            return None, 1.0


def _original_tokens(reader: _Reader, parameters: Mapping[str, object]) -> int:
    """The length that the model was first trained for; Phi-3 states it outside the rope settings."""
    for stated in (
        reader.values.get("original_max_position_embeddings"),
        parameters.get("original_max_position_embeddings"),
    ):
        if isinstance(stated, int | float) and stated > 0:
            return int(stated)
    return reader.whole("max_position_embeddings")


def _max_model_tokens(reader: _Reader, blocks: tuple[BlockSpec, ...]) -> int:
    """The longest sequence that makes sense: scalings that state an original length extend it by their factor."""
    tokens = reader.whole("max_position_embeddings")
    for block in blocks:
        scaling = block.attention.rope.scaling if block.attention.rope else None
        if isinstance(scaling, DynamicScaling | YarnScaling):
            tokens = max(tokens, int(scaling.original_tokens * scaling.factor))
    return tokens
