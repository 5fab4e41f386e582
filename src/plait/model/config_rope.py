"""Reads the rope settings of a config, in both dialects.

The new dialect (transformers 5) has `rope_parameters`, one dict or one per layer type; the old one `rope_theta`,
`rope_scaling` with `type` or `rope_type`, and `rope_local_base_freq`.
"""

from collections.abc import Mapping
from typing import cast

from plait.errors import BadSetup
from plait.model.config_reader import ConfigReader
from plait.model.rope import longrope_magnitude, yarn_magnitude
from plait.model.spec import (
    BlockSpec,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_parameters(reader: ConfigReader, layer_type: str) -> Mapping[str, object]:
    """Rope settings of one layer type, from either dialect, always with `rope_theta`."""
    theta = reader.values.get("rope_theta")
    local = reader.family.rope_per_layer_type and layer_type == "sliding_attention"
    if local and reader.obeys("rope_local_base_freq"):
        theta = reader.values.get("rope_local_base_freq")
    parameters = reader.mapping("rope_parameters")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        parameters = cast(Mapping[str, object], parameters.get(layer_type) or {})
    scaling: Mapping[str, object] = {} if local else reader.mapping("rope_scaling")
    stated = {**scaling, **parameters}
    return {"rope_theta": theta, **(stated or reader.family.rope_left_out)}


def rope_kind(reader: ConfigReader, parameters: Mapping[str, object]) -> str:
    """The name of the scaling: one of those that plait implements.

    Raises:
        BadSetup: it is not.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su" or (kind == "yarn" and reader.family_name == "phi3"):
        return "longrope"  # what early Phi-3 checkpoints called it
    if kind not in _ROPE_KINDS:
        raise BadSetup(
            f"{reader.where}: rope type {kind!r} is not one that plait implements; it knows {', '.join(_ROPE_KINDS)}"
        )
    return cast(str, kind)


def rope_number(
    reader: ConfigReader, parameters: Mapping[str, object], key: str, otherwise: float | None = None
) -> float:
    """A number among rope settings; where it is left out, `otherwise` if there is one.

    Raises:
        BadSetup: the setting is not a number.
    """
    value = parameters.get(key)
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSetup(f"{reader.where}: {key!r} of the rope settings must be a number, not {value!r}")
    return float(value)


def _factors(
    reader: ConfigReader, parameters: Mapping[str, object], key: str, length: int
) -> tuple[float, ...]:
    value = parameters.get(key)
    if not isinstance(value, list | tuple) or len(cast(list[object], value)) != length:
        raise BadSetup(f"{reader.where}: {key!r} of the rope settings must be a list of {length} numbers")
    return tuple(rope_number(reader, {key: entry}, key) for entry in cast(list[object], value))


def read_rope(reader: ConfigReader, layer_type: str, head_dim: int) -> RopeSpec:
    parameters = rope_parameters(reader, layer_type)
    partial = reader.number_or("partial_rotary_factor", 1.0)
    stated = parameters.get("partial_rotary_factor")
    if stated is not None:
        partial = rope_number(reader, parameters, "partial_rotary_factor")
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
        theta=rope_number(reader, parameters, "rope_theta"),
        rotary_dim=rotary_dim,
        interleaved=reader.flag("rope_interleave"),
        attention_factor=attention_factor,
        scaling=scaling,
    )


def _rope_scaling(
    reader: ConfigReader, parameters: Mapping[str, object], rotary_dim: int
) -> tuple[RopeScaling | None, float]:
    """How frequencies are scaled, and the factor on cosines and sines."""
    max_tokens = reader.whole("max_position_embeddings")
    original = _original_tokens(reader, parameters)
    match rope_kind(reader, parameters):
        case "linear":
            return LinearScaling(factor=rope_number(reader, parameters, "factor")), 1.0
        case "dynamic":
            return DynamicScaling(
                factor=rope_number(reader, parameters, "factor"), original_tokens=max_tokens
            ), 1.0
        case "llama3":
            llama3 = Llama3Scaling(
                factor=rope_number(reader, parameters, "factor"),
                low_frequency_factor=rope_number(reader, parameters, "low_freq_factor"),
                high_frequency_factor=rope_number(reader, parameters, "high_freq_factor"),
                original_tokens=original,
            )
            return llama3, 1.0
        case "yarn":
            factor = rope_number(reader, parameters, "factor", max_tokens / original)
            yarn = YarnScaling(
                factor=factor,
                original_tokens=original,
                beta_fast=rope_number(reader, parameters, "beta_fast", 32.0),
                beta_slow=rope_number(reader, parameters, "beta_slow", 1.0),
                truncates=bool(parameters.get("truncate", True)),
            )
            magnitude = yarn_magnitude(factor)
            if parameters.get("mscale") and parameters.get("mscale_all_dim"):
                magnitude = yarn_magnitude(factor, rope_number(reader, parameters, "mscale"))
                magnitude /= yarn_magnitude(factor, rope_number(reader, parameters, "mscale_all_dim"))
            return yarn, rope_number(reader, parameters, "attention_factor", magnitude)
        case "longrope":
            longrope = LongropeScaling(
                short_factors=_factors(reader, parameters, "short_factor", rotary_dim // 2),
                long_factors=_factors(reader, parameters, "long_factor", rotary_dim // 2),
                original_tokens=original,
            )
            factor = rope_number(reader, parameters, "factor", max_tokens / original)
            magnitude = longrope_magnitude(factor, original)
            return longrope, rope_number(reader, parameters, "attention_factor", magnitude)
        case _:
            return None, 1.0


def _original_tokens(reader: ConfigReader, parameters: Mapping[str, object]) -> int:
    """The length that the model was first trained for; Phi-3 states it outside the rope settings."""
    for stated in (
        reader.values.get("original_max_position_embeddings"),
        parameters.get("original_max_position_embeddings"),
    ):
        if isinstance(stated, int | float) and stated > 0:
            return int(stated)
    return reader.whole("max_position_embeddings")


def max_model_tokens(reader: ConfigReader, blocks: tuple[BlockSpec, ...]) -> int:
    """The longest sequence that makes sense: scalings that state an original length extend it by their factor."""
    tokens = reader.whole("max_position_embeddings")
    for block in blocks:
        scaling = block.attention.rope.scaling if block.attention.rope else None
        if isinstance(scaling, DynamicScaling | YarnScaling):
            tokens = max(tokens, int(scaling.original_tokens * scaling.factor))
    return tokens
