"""Access to a parsed `config.json` under one spelling of its keys, with refusals of one sentence.

Keys that families name differently are brought to one name; keys that are left out get the family's defaults; a key
that changes the mathematics and that the family does not obey must be absent or neutral.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from plait.errors import BadSetup
from plait.model.families import FAMILIES, Family, Value

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


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """One config under our spelling of its keys, with typed access that refuses in one sentence."""

    values: Mapping[str, object]
    family: Family
    family_name: str
    where: str

    @staticmethod
    def of(config: Mapping[str, object], where: str) -> "ConfigReader":
        """Find the family, unwrap a multimodal config, spell the keys our way, and check those that are not obeyed."""
        model_type = config.get("model_type")
        by_wrapper = {family.text_of: name for name, family in FAMILIES.items() if family.text_of}
        if (
            isinstance(model_type, str)
            and model_type in by_wrapper
            and isinstance(config.get("text_config"), Mapping)
        ):
            text = dict(cast(Mapping[str, object], config["text_config"]))
            text["model_type"] = by_wrapper[model_type]
            if "tie_word_embeddings" in config:
                text["tie_word_embeddings"] = config["tie_word_embeddings"]
            return ConfigReader.of(text, where)
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
        reader = ConfigReader(values, family, model_type, where)
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
