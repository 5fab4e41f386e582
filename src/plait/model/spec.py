"""What a model computes, as data: one `ModelSpec` describes any supported decoder.

    hidden = embedding(ids) * embedding_scale [+ learned positions] [embedding norm]
    block: pre             x += A(n1(x));       x += F(n2(x))
           post            x += n1(A(x));       x += n2(F(x))           OLMo 2: norm of the branch
           sandwich        x += n2(A(n1(x)));   x += n4(F(n3(x)))       Gemma 2 and 3
           parallel        x += A(n1(x)) + F(n2(x))                     Falcon 40B
           parallel_shared x += A(n1(x)) + F(n1(x))                     Falcon 7B
           after_residual  x = n1(x + A(x));    x = n2(x + F(x))        OPT 350M
    logits = head(final_norm(x)) * logit_scale, softcapped

where A is attention, F an MLP or a mixture of experts, and every branch is multiplied by `residual_scale` first.
Nothing here knows a family's name for anything: `config.py` reads, `families.py` translates.
"""

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms1p", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_shared", "after_residual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """A normalisation over the last axis; `rms1p` stores w and applies 1 + w.

    `casts_first`: round to the model's dtype, then multiply by the weight (Llama); otherwise multiply in float32 and
    round once (Gemma, OLMo 2). The two differ in bfloat16 only.
    """

    kind: NormKind
    eps: float
    weighted: bool = True
    casts_first: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor`: positions interpolated."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """NTK-aware theta that grows with the sequence once it is longer than `original_tokens`."""

    factor: float
    original_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): a ramp over the dimensions between kept and interpolated frequencies."""

    factor: float
    original_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LongropeScaling:
    """LongRoPE: one divisor per frequency, another set once a sequence may exceed `original_tokens`."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_tokens: int


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongropeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions on the first `rotary_dim` dimensions of a head.

    `interleaved` says how the checkpoint orders a pair: (2j, 2j+1) instead of (j, j + rotary_dim/2); the loader
    reorders the projections, so that tensor code knows halves only. Cosines and sines are multiplied by
    `attention_factor`.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    attention_factor: float = 1.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QkNormSpec:
    """Norm of queries and keys: over each head, or over the whole projected vector."""

    norm: NormSpec
    over: Literal["head", "whole"]
    after_rope: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek V2, section 2.1): the cache holds `kv_rank + rope_dim` numbers per token.

    Queries are projected directly when `query_rank` is 0.
    """

    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    norm: NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AlibiSpec:
    """A bias `slope * key position` per head (Press et al. 2022), times `scale`; `rounded` to bfloat16 in Falcon."""

    slopes: tuple[float, ...]
    scale: float = 1.0
    rounded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureSpec:
    """Llama 4: queries times `1 + scale * ln(1 + floor((position + 1) / interval_tokens))`."""

    scale: float
    interval_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One block's attention.

    Key j is visible to query i when j <= i, and with `window_tokens` W when i - W < j, and with `chunk_tokens` C when
    both lie in the same C tokens. Scores are `scale * q.k + alibi`, softcapped before the mask; `sinks` adds one
    learned logit per head to the softmax's denominator.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    rope: RopeSpec | None = None
    window_tokens: int | None = None
    chunk_tokens: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: AlibiSpec | None = None
    temperature: TemperatureSpec | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QkNormSpec | None = None
    latent: LatentSpec | None = None

    @property
    def kv_planes(self) -> int:
        """What a head leaves in the cache for a token: a key and a value, or one latent."""
        return 1 if self.latent else 2

    @property
    def cached_heads(self) -> int:
        """Heads that the cache keeps apart: the key-value heads, or one for the latent that all share."""
        return 1 if self.latent else self.kv_heads

    @property
    def cached_dim(self) -> int:
        """Numbers in one cached vector."""
        return self.latent.kv_rank + self.latent.rope_dim if self.latent else self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """`down(act(gate(x)) * up(x))` when gated, else `down(act(up(x)))`.

    `clamped_swiglu` (gpt-oss): `(u + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)` and `u` = up clamped to
    -limit .. limit.
    """

    inner: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """Which experts a token visits and with what weight; computed in float32.

    Scores are softmax or sigmoid of the logits. With `groups` > 1 only the best `kept_groups` groups stay, ranked by
    their best score or the sum of their best two. `correction` adds a learned bias for choosing only. `weighs` says
    whether a weight multiplies the expert's output or its input.
    """

    score: Literal["softmax", "sigmoid"]
    renormalises: bool
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_rank: Literal["best", "best_two"] = "best"
    weighs: Literal["output", "input"] = "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """A mixture of `experts` equal MLPs, of which a token visits `experts_per_token`, and maybe a shared MLP."""

    experts: int
    experts_per_token: int
    expert: MlpSpec
    router: RouterSpec
    shared: MlpSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """One transformer block."""

    placement: Placement
    norm: NormSpec
    attention: AttentionSpec
    feed_forward: MlpSpec | MoeSpec
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """A table of position vectors, `offset` rows of which come before position 0 (OPT: 2)."""

    rows: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    `embedding_width` differs from `hidden` in OPT 350M only, where linear maps lead in and out. `embedding_scale` is
    rounded to the model's dtype before use (Gemma).
    """

    family: str
    vocab_tokens: int
    hidden: int
    embedding_width: int
    blocks: tuple[BlockSpec, ...]
    max_model_tokens: int
    tied_head: bool
    final_norm: NormSpec | None
    embedding_scale: float = 1.0
    embedding_norm: NormSpec | None = None
    positions: LearnedPositions | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def all_blocks(self) -> range:
        """Every block of the model, as a span."""
        return range(len(self.blocks))

    def kv_elements_per_token(self, blocks: range) -> int:
        """Numbers that one token of context occupies in the caches of these blocks."""
        attentions = [self.blocks[block].attention for block in blocks]
        return sum(each.kv_planes * each.cached_heads * each.cached_dim for each in attentions)

    def rope_variant(self, max_tokens: int) -> str:
        """Which rotation a request that may reach `max_tokens` gets: "" for the usual one.

        Cached keys of different variants must not be shared.
        """
        for block in self.blocks:
            rope = block.attention.rope
            if rope is None:
                continue
            match rope.scaling:
                case LongropeScaling(original_tokens=original) if max_tokens > original:
                    return "long"
                case DynamicScaling(original_tokens=original) if max_tokens > original:
                    return f"ntk{max_tokens}"
                case _:
                    pass
        return ""
