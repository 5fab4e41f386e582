"""Architecture-true tiny checkpoints: what transformers writes for a family, with weights that make every term count.

Fresh weights test almost nothing: biases are 0, norm weights 1, attention nearly uniform. `perturb` draws matrices at
1.5 / sqrt(fan in), and gives norms, biases, sinks and router corrections values that matter; softcaps are low, windows
shorter than the prompts, original lengths 64.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.decoder import Decoder, SequenceChunk
from plait.engine.kv_store import KvStore
from plait.engine.loader import load_weights

BLOCK_TOKENS = 16
VOCAB = 512

_SMALL: Mapping[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_HALVES = [1.0 + 0.25 * i for i in range(8)]
_LONGER = [4.0 + 0.5 * i for i in range(8)]


def _small(**changes: Any) -> dict[str, Any]:
    return {**_SMALL, **changes}


def _rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=1.0)
_GEMMA = _small(
    head_dim=24, sliding_window=16, query_pre_attn_scalar=40, hidden_activation="gelu_pytorch_tanh"
)
_DEEPSEEK = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"} | dict(
    num_key_value_heads=4,
    num_hidden_layers=3,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_shared_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)

VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _small()),
    "llama_tied": ("llama", _small(tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-2)),
    "llama_biased": ("llama", _small(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
    "llama_linear": ("llama", _small(rope_parameters=_rope("linear", factor=4.0))),
    "llama_dynamic": (
        "llama",
        _small(rope_parameters=_rope("dynamic", factor=4.0), max_position_embeddings=112),
    ),
    "llama_llama3": (
        "llama",
        _small(
            rope_parameters=_rope(
                "llama3",
                theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),
    "llama_yarn": ("llama", _small(rope_parameters=_YARN)),
    "llama_longrope": (
        "llama",
        _small(
            rope_parameters=_rope(
                "longrope",
                factor=4.0,
                short_factor=_HALVES,
                long_factor=_LONGER,
                original_max_position_embeddings=64,
            )
        ),
    ),
    "mistral": ("mistral", _small(sliding_window=16, head_dim=24)),
    "mistral_full": ("mistral", _small(sliding_window=None, head_dim=32)),
    "qwen2": ("qwen2", _small(tie_word_embeddings=True)),
    "qwen2_window": (
        "qwen2",
        _small(use_sliding_window=True, sliding_window=24, max_window_layers=1, num_hidden_layers=3),
    ),
    "qwen3": ("qwen3", _small(head_dim=24)),
    "qwen3_moe": (
        "qwen3_moe",
        _small(
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            num_hidden_layers=3,
        ),
    ),
    "qwen3_moe_raw": (
        "qwen3_moe",
        _small(
            head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=False
        ),
    ),
    "mixtral": ("mixtral", _small(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "gemma2": (
        "gemma2",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0, "num_hidden_layers": 3},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_GEMMA,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "sliding_attention": _rope("default"),
                "full_attention": _rope("linear", theta=1000000.0, factor=8.0),
            },
        },
    ),
    "phi3": ("phi3", _small(sliding_window=20, original_max_position_embeddings=256)),
    "phi3_longrope": (
        "phi3",
        _small(
            num_key_value_heads=1,
            original_max_position_embeddings=64,
            rope_parameters={
                **_rope("longrope", short_factor=_HALVES[:6], long_factor=_LONGER[:6]),
                "partial_rotary_factor": 0.75,
            },
        ),
    ),
    "olmo2": ("olmo2", _small()),
    "olmo3": ("olmo3", _small(num_hidden_layers=4, sliding_window=16)),
    "llama4": (
        "llama4_text",
        _small(
            head_dim=16,
            num_hidden_layers=4,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=80,
            attention_chunk_size=24,
            floor_scale=8,
            attn_scale=0.3,
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        _small(
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
            intermediate_size=96,
            swiglu_limit=1.5,
            rope_parameters={**_YARN, "truncate": False},
        ),
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek_v2_greedy": (
        "deepseek_v2",
        {**_DEEPSEEK, "q_lora_rank": 20, "n_routed_experts": 4, "attention_bias": True},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "q_lora_rank": 20,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**_YARN, "mscale": 0.8, "mscale_all_dim": 1.2},
        },
    ),
    "gpt2": (
        "gpt2",
        dict(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
    ),
    "opt": (
        "opt",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=64,
        ),
    ),
    "opt_350m": (
        "opt",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
        ),
    ),
    "bloom": ("bloom", dict(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4)),
    "bloom_six_heads": ("bloom", dict(vocab_size=VOCAB, hidden_size=96, n_layer=2, n_head=6)),
    "falcon": (
        "falcon",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        ),
    ),
    "falcon_new": (
        "falcon",
        dict(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            max_position_embeddings=256,
        ),
    ),
    "falcon_rw": (
        "falcon",
        dict(
            vocab_size=VOCAB,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=12,  # the slopes of 9 heads and more are not exact in bfloat16
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            bias=True,
        ),
    ),
    "granite": (
        "granite",
        _small(
            embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.7, attention_multiplier=0.2
        ),
    ),
    "smollm3": ("smollm3", _small(no_rope_layer_interval=2, tie_word_embeddings=True)),
}

LENGTHS = (5, 23, 40, 150)
"""Prompt lengths: below and above every window, chunk and original length of the zoo."""


def prompt(length: int, seed: int = 7) -> list[int]:
    """Token ids that no family treats specially."""
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Replace fresh weights by ones that make every term of the model count."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("inv_freq", "embed_scale")) or not tensor.is_floating_point():
                continue
            if "norm" in name.lower() or ".ln_" in name:
                tensor += normal(tensor, 0.3)
            elif tensor.dim() == 1 or "bias" in name or "sinks" in name:
                tensor.copy_(normal(tensor, 0.3))
            elif "embed" in name or ".wte" in name or ".wpe" in name or name == "lm_head.weight":
                tensor.copy_(
                    normal(tensor, 0.5 if name != "lm_head.weight" else 1.5 / tensor.shape[-1] ** 0.5)
                )
            else:
                tensor.copy_(normal(tensor, 1.5 / _fan_in(model, name, tensor) ** 0.5))


def _fan_in(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> int:
    stored_in_out = any(part in name for part in ("c_attn", "c_proj", "c_fc")) or (
        tensor.dim() == 3 and model.config.model_type in ("gpt_oss", "llama4_text")
    )
    return tensor.shape[-2] if stored_in_out else tensor.shape[-1]


@dataclass(frozen=True)
class TinyCheckpoint:
    """A checkpoint on disk, with transformers' model of it and ours."""

    name: str
    folder: Path

    @cached_property
    def reference(self) -> Any:
        """Transformers' own model, float32; eager attention, except where that is not what the model computes."""
        # Falcon's eager path adds ALiBi twice.
        attention = "sdpa" if self.name.startswith("falcon") else "eager"
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation=attention
        )
        return model.eval()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder)

    @cached_property
    def decoder(self) -> Decoder:
        return decoder_of(self.checkpoint)

    def reference_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Transformers' logits of every position, [tokens, vocab]."""
        key = tuple(token_ids)
        if key not in self._logits:
            with torch.no_grad():
                self._logits[key] = self.reference(torch.tensor([key])).logits[0].float()
        return self._logits[key]

    @cached_property
    def _logits(self) -> dict[tuple[int, ...], torch.Tensor]:
        return {}


def decoder_of(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, blocks: range | None = None
) -> Decoder:
    """Load a span and make a decoder of it."""
    weights = load_weights(checkpoint, blocks, dtype, "cpu")
    return Decoder(checkpoint.spec, weights, device="cpu", dtype=dtype)


@dataclass
class Paged:
    """Sequences over one decoder and one store, with block tables handed out in a scattered order."""

    decoder: Decoder
    kv_blocks: int = 64
    dtype: torch.dtype = torch.float32
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = KvStore(
            self.decoder.spec, self.decoder.blocks, self.kv_blocks, BLOCK_TOKENS, self.dtype, "cpu"
        )
        self.free = torch.randperm(self.kv_blocks, generator=torch.Generator().manual_seed(3)).tolist()

    def table(self, tokens: int) -> list[int]:
        """A fresh block table for that many tokens."""
        return [self.free.pop() for _ in range(-(-tokens // BLOCK_TOKENS))]

    def run(self, *chunks: SequenceChunk, hidden: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder.forward(chunks, self.store, hidden)


def chunk(
    token_ids: Sequence[int],
    start: int,
    stop: int,
    table: Sequence[int],
    *,
    rows: int | None = None,
    longest: int = 0,
) -> SequenceChunk:
    """Tokens start:stop of a sequence; logits of all of them unless `rows` says otherwise."""
    return SequenceChunk(
        start=start,
        token_ids=list(token_ids[start:stop]),
        kv_blocks=table[: -(-stop // BLOCK_TOKENS)],
        rope_tokens=longest or len(token_ids),
        logit_rows=stop - start if rows is None else rows,
    )


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of two sets of logits, relative to their spread."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().std())


def write(
    name: str, folder: Path, variants: Mapping[str, tuple[str, dict[str, Any]]] = VARIANTS
) -> TinyCheckpoint:
    """Write one variant's checkpoint into a folder."""
    model_type, settings = variants[name]
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    perturb(model)
    model.save_pretrained(folder)
    return TinyCheckpoint(name, folder)


def in_old_dialect(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as files from before transformers 5 spell it."""
    old = {
        key: value
        for key, value in config.items()
        if value is not None or key in ("sliding_window", "q_lora_rank")
    }
    old["torch_dtype"] = old.pop("dtype", "float32")
    parameters = old.pop("rope_parameters", None)
    if parameters and "full_attention" in parameters:
        full, sliding = dict(parameters["full_attention"]), parameters["sliding_attention"]
        old["rope_theta"] = full.pop("rope_theta")
        if config["model_type"] == "gemma3_text":
            old["rope_local_base_freq"] = sliding["rope_theta"]
        parameters = full
    elif parameters:
        parameters = dict(parameters)
        old["rope_theta"] = parameters.pop("rope_theta")
        if "partial_rotary_factor" in parameters:
            old["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    if parameters and parameters["rope_type"] != "default":
        # Early files say `type`; Gemma 3 came later.
        name = "rope_type" if config["model_type"] == "gemma3_text" else "type"
        old["rope_scaling"] = {
            name if key == "rope_type" else key: value for key, value in parameters.items()
        }
    layer_types = old.pop("layer_types", None)
    if layer_types and config["model_type"] == "gemma3_text":
        old["sliding_window_pattern"] = 6
    if "num_local_experts" in old and config["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    return old


def nest_as_multimodal(source: Path, target: Path) -> None:
    """Make a Gemma 3 multimodal checkpoint, old layout, out of a text one: a nested config and prefixed tensors."""
    target.mkdir()
    text = json.loads((source / "config.json").read_text())
    wrapper = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    (target / "config.json").write_text(json.dumps(wrapper))
    tensors = {
        f"language_model.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()
    }
    tensors["vision_tower.vision_model.embeddings.patch_embedding.bias"] = torch.zeros(4)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(4)
    save_file(tensors, target / "model.safetensors")


def copy_of(source: Path, target: Path, **config_changes: Any) -> Path:
    """A copy of a checkpoint folder with some config keys changed (None removes one)."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for key, value in config_changes.items():
        config[key] = value
    (target / "config.json").write_text(json.dumps(config))
    return target
