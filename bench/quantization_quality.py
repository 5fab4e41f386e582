"""What quantised weights and an int8 KV cache cost in quality, measured with the kernels that serve.

1. The embedded model on its held-out text (tools/train_tiny.py says which files): bits per byte, and the KL divergence
   from bfloat16 weights and cache, averaged over all positions and the whole vocabulary.
2. Every linear map of that model with the inputs that it has on this text, and attention over every block's keys and
   values: the worst cosine between a row of outputs and the same row in bfloat16.
3. Outlier channels: some channels of the norms' weights are made larger by a power of two, and the matching columns of
   the matrices smaller, so that the model is the same function (in bfloat16 to the bit). Large language models grow
   such channels by themselves (Dettmers et al. 2022, LLM.int8(), section 4). The same for channels of keys and values.
4. Random layers in the shapes of a model of 1.1 B parameters.

    python bench/quantization_quality.py        about 5 minutes on two cores
"""

import argparse
import math
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, write_result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import plait.model
from plait.engine import Engine, EngineOptions, load_engine
from plait.engine.packed import WEIGHT_FORMATS
from plait.engine.packed_layout import NO_ROW, PANEL_COLUMNS
from plait.kernels import _native, current_isa

REPOSITORY = Path(__file__).parent.parent
TINY = Path(plait.model.__file__).parent / "tiny"
END_OF_TEXT = 0
WINDOW_TOKENS = 1023  # the context is 1024 tokens, of which an engine keeps one for an answer
BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 6, 8, 4, 32

QUANTIZATIONS = ("none", "int8", "int4", "int4-g128")
KV_CACHE_DTYPES = ("bfloat16", "int8")
OUTLIER_FACTORS = (1, 4, 16, 64)  # powers of two: bfloat16 holds them exactly
OUTLIER_CHANNELS = 4  # of 256, in each norm
LARGE_LAYERS = {"qkv": (2560, 2048), "out": (2048, 2048), "gate and up": (11264, 2048), "down": (2048, 5632)}


@dataclass(frozen=True, slots=True)
class Setting:
    """How the model is held; the one without quantisation is what the others are compared with."""

    quantization: str = "none"
    kv_cache_dtype: str = "bfloat16"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        weights = "bf16" if self.quantization == "none" else self.quantization
        if self.dtype == "float32":
            return "bf16 weights, float32 arithmetic (torch)"
        return f"{weights}, {'bf16' if self.kv_cache_dtype == 'bfloat16' else 'int8'} KV"

    def load(self, folder: Path, threads: int) -> Engine:
        return load_engine(
            EngineOptions(
                folder=folder,
                dtype=self.dtype,
                quantization=self.quantization,
                kv_cache_dtype="auto" if self.dtype == "float32" else self.kv_cache_dtype,
                kv_cache_bytes=32 * 2**20,
                packed_cache=False,
                prefix_caching=False,
                threads=threads,
            )
        )


# ---- the text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutText:
    """Windows of token ids; each begins with the token before it, which is not predicted."""

    windows: list[Tensor]
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)

    def part(self, every: int) -> "HeldOutText":
        """One window in `every`; its bytes are taken to be as many a token as in the whole."""
        part = HeldOutText(self.windows[::every], 0)
        return HeldOutText(part.windows, round(self.bytes * part.tokens / self.tokens))


def held_out_text() -> HeldOutText:
    """The whole of it, cut as tools/train_tiny.py does but for windows that are one token shorter."""
    files = runpy.run_path(str(REPOSITORY / "tools" / "train_tiny.py"), run_name="train_tiny")[
        "read_library"
    ]()
    tokenizer = Setting(dtype="float32").load(TINY, threads=1).tokenizer
    windows: list[Tensor] = []
    size_bytes = 0
    for file in files:
        if not file.held_out:
            continue
        size_bytes += len(file.text.encode())
        ids = torch.tensor([END_OF_TEXT, *tokenizer.encode(file.text)])
        windows.extend(
            ids[first : first + WINDOW_TOKENS + 1] for first in range(0, len(ids) - 1, WINDOW_TOKENS)
        )
    return HeldOutText(windows, size_bytes)


# ---- 1. the whole model ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Score:
    """Sums over the tokens seen so far; `change` is against the reference, token by token."""

    tokens: int = 0
    nats: float = 0.0
    change: float = 0.0
    change_squares: float = 0.0
    divergence: float = 0.0
    same_best: int = 0
    by_window: list[tuple[float, float]] = field(default_factory=list)
    """Nats and divergence of each window."""

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """One window: `logits` [tokens, vocab], the reference's log-probabilities, the ids that follow."""
        logprobs = logits.log_softmax(-1)
        nats = -logprobs.gather(1, targets[:, None]).double()
        change = nats + reference.gather(1, targets[:, None]).double()
        divergence = (reference.exp() * (reference - logprobs)).sum(dtype=torch.float64).item()
        self.tokens += len(targets)
        self.nats += nats.sum().item()
        self.change += change.sum().item()
        self.change_squares += change.square().sum().item()
        self.divergence += divergence
        self.same_best += int((logprobs.argmax(-1) == reference.argmax(-1)).sum())
        self.by_window.append((nats.sum().item(), divergence))

    def summary(self, text: HeldOutText) -> dict[str, float]:
        before = self.nats - self.change
        variance = max(0.0, self.change_squares / self.tokens - (self.change / self.tokens) ** 2)
        return {
            "bits per byte": self.nats / math.log(2) / text.bytes,
            "bits per byte, change in %": 100 * self.change / before,
            # As if tokens were independent.
            "standard error of the change in %": 100 * math.sqrt(variance * self.tokens) / before,
            "KL divergence, nats": self.divergence / self.tokens,
            "same best token, fraction": self.same_best / self.tokens,
        }


def score_settings(
    folders: Mapping[str, tuple[Setting, Path]], text: HeldOutText, threads: int
) -> dict[str, Score]:
    """Read the text with every setting's model; the reference is the embedded model in bfloat16."""
    reference = Setting().load(TINY, threads)
    engines = {name: setting.load(folder, threads) for name, (setting, folder) in folders.items()}
    scores = {name: Score() for name in engines}
    for window in text.windows:
        ids = window[:-1].tolist()
        expected = reference.prompt_logits(ids).log_softmax(-1)
        for name, engine in engines.items():
            scores[name].add(engine.prompt_logits(ids), expected, window[1:])
    return scores


# ---- 2. linear maps and attention, block by block -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What went through the model on one window, in float32."""

    inputs: dict[str, tuple[Tensor, Tensor]]
    """By name of a linear map: its weight [out, in] and its inputs [tokens, in]."""
    attention: list[tuple[Tensor, Tensor, Tensor]]
    """By block: rotated queries [tokens, heads, dim], rotated keys and values [tokens, kv_heads, dim]."""


@torch.inference_mode()
def record(window: Tensor) -> Recording:
    """Run transformers' model over a window and keep the inputs of every linear map and of attention."""
    recording = Recording({}, [])

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **settings: Any) -> Any:
        recording.attention.append(
            tuple(part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        )  # type: ignore[arg-type]
        return sdpa_attention_forward(module, query, key, value, *others, **settings)

    AttentionInterface.register("recorded", attend)
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="recorded")

    def keeps(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        return lambda module, inputs: recording.inputs.update({name: (module.weight, inputs[0][0])})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keeps(name.removeprefix("model.")))
    model(window[None])
    return recording


def linear_outputs(weight: Tensor, inputs: Tensor, quantization: str) -> Tensor:
    """`inputs` float32 [rows, in] times a `weight` [out, in] in the quantisation's format, by the kernels."""
    format, (columns, depth) = (
        WEIGHT_FORMATS["bf16" if quantization == "none" else quantization],
        weight.shape,
    )
    packed = _native.Arena(_native.packed_bytes(format, columns, depth)).memory
    rows = np.full(-(-columns // PANEL_COLUMNS) * PANEL_COLUMNS, NO_ROW)
    rows[:columns] = np.arange(columns)
    _native.pack_into(packed, 0, weight.detach(), rows, 0, depth, format, threads=1)
    outputs = torch.empty(len(inputs), columns)
    _native.linear(packed, 0, columns, _native.QuantizedRows(inputs.contiguous(), format), outputs)
    return outputs


def attention_outputs(part: tuple[Tensor, Tensor, Tensor], kv_format: str) -> Tensor:
    """Causal attention of one block by the kernels, [tokens * heads, dim]."""
    query, key, value = part
    tokens = len(query)
    table = np.arange(-(-tokens // 16), dtype=np.int32)
    pages = _native.KvPages(kv_format, 1, key.shape[1], key.shape[2], 16, len(table))
    pages.append("", 0, table, 0, key.numpy(), value.numpy())
    run = pages.attend(
        "", 0, query.numpy(), np.array([[0, 0, tokens]]), [table], scale=query.shape[-1] ** -0.5
    )
    return torch.from_numpy(run.out).flatten(0, 1)


def compare(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """How far rows of outputs are from those expected."""
    cosines = torch.nn.functional.cosine_similarity(actual.double(), expected.double(), dim=1)
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return {
        "worst cosine": cosines.min().item(),
        "mean cosine": cosines.mean().item(),
        "relative error": error.item(),
    }


def compare_maps(recording: Recording) -> dict[str, dict[str, dict[str, float]]]:
    """By format and linear map (or block's attention)."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    expected = {
        name: linear_outputs(*map_and_inputs, "none") for name, map_and_inputs in recording.inputs.items()
    }
    for quantization in QUANTIZATIONS[1:]:
        result[quantization] = {
            name: compare(linear_outputs(*map_and_inputs, quantization), expected[name])
            for name, map_and_inputs in recording.inputs.items()
        }
    result["int8 KV"] = {
        f"layers.{block}.attention": compare(attention_outputs(part, "int8"), attention_outputs(part, "bf16"))
        for block, part in enumerate(recording.attention)
    }
    return result


def worst_by_block(maps: Mapping[str, Mapping[str, float]]) -> list[float]:
    return [
        min(found["worst cosine"] for name, found in maps.items() if name.startswith(f"layers.{block}."))
        for block in range(BLOCKS)
    ]


# ---- 3. outlier channels --------------------------------------------------------------------------------------------


@contextmanager
def with_outliers(place: str, factor: int) -> Iterator[Path]:
    """A copy of the model, the same function, with larger channels in what the norms (or keys and values) put out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(TINY, Path(name) / "tiny"))
        tensors = load_file(folder / "model.safetensors")
        rng = np.random.default_rng(0)
        for block in range(BLOCKS):
            parts = {
                key.removeprefix(f"model.layers.{block}.").removesuffix(".weight"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"model.layers.{block}.")
            }
            (_enlarge_normed if place == "norms" else _enlarge_kv)(parts, factor, rng)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        yield folder


def _enlarge_normed(parts: Mapping[str, Tensor], factor: int, rng: np.random.Generator) -> None:
    for norm, readers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        channels = rng.choice(len(parts[norm]), OUTLIER_CHANNELS, replace=False)
        parts[norm][channels] *= factor
        for reader in readers:
            parts[reader][:, channels] /= factor


def _enlarge_kv(parts: Mapping[str, Tensor], factor: int, rng: np.random.Generator) -> None:
    """In each kv head one pair of key channels, which rotation mixes, and one value channel."""
    shared = HEADS // KV_HEADS
    for kv_head in range(KV_HEADS):
        pair = rng.integers(HEAD_DIM // 2) + np.array([0, HEAD_DIM // 2])
        value = rng.integers(HEAD_DIM)
        parts["self_attn.k_proj"][kv_head * HEAD_DIM + pair] *= factor
        parts["self_attn.v_proj"][kv_head * HEAD_DIM + value] *= factor
        for head in range(kv_head * shared, (kv_head + 1) * shared):
            parts["self_attn.q_proj"][head * HEAD_DIM + pair] /= factor
            parts["self_attn.o_proj"][:, head * HEAD_DIM + value] /= factor


def score_outliers(text: HeldOutText, threads: int) -> dict[str, dict[int, Score]]:
    """By format and factor."""
    result: dict[str, dict[int, Score]] = {}
    for place, settings in (
        ("norms", [Setting(quantization) for quantization in QUANTIZATIONS]),
        ("keys and values", [Setting(kv_cache_dtype=dtype) for dtype in KV_CACHE_DTYPES]),
    ):
        for factor in OUTLIER_FACTORS:
            with with_outliers(place, factor) as folder:
                scores = score_settings(
                    {str(setting): (setting, folder) for setting in settings}, text, threads
                )
            for name, score in scores.items():
                result.setdefault(f"{place}: {name}", {})[factor] = score
    return result


# ---- 4. random layers of a larger model -----------------------------------------------------------------------------


def compare_large_layers(rows: int) -> list[dict[str, Any]]:
    """Layers of a 1.1 B model, with weights and inputs that have no, heavy and outlying tails."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heavy(*shape: int) -> Tensor:
        """Student's t with 4 degrees of freedom."""
        return normal(*shape) / (sum(normal(*shape).square() for _ in range(4)) / 4).sqrt()

    def outlying(*shape: int) -> Tensor:
        """Normal, with six channels 32 times as large."""
        values = normal(*shape)
        values[:, :: shape[1] // 6][:, :6] *= 32
        return values

    found: list[dict[str, Any]] = []
    for layer, (outputs, depth) in LARGE_LAYERS.items():
        for kind, weights, inputs in (
            ("normal", normal, normal),
            ("heavy-tailed weights and inputs", heavy, heavy),
            ("outlying input channels", normal, outlying),
        ):
            weight, batch = (weights(outputs, depth) * 0.02).bfloat16(), inputs(rows, depth)
            expected = linear_outputs(weight, batch, "none")
            for quantization in QUANTIZATIONS[1:]:
                actual = linear_outputs(weight, batch, quantization)
                found.append(
                    {"layer": layer, "values": kind, "format": quantization, **compare(actual, expected)}
                )
    return found


# ---- the run --------------------------------------------------------------------------------------------------------


def figures_of(
    maps: Mapping[str, Mapping[str, Mapping[str, float]]],
    outliers: Mapping[str, Mapping[int, Score]],
    text: HeldOutText,
) -> list[Figure]:
    by_block = Figure("worst row of a block's outputs", "block", "1 - worst cosine to bf16", log_y=True)
    for name, found in maps.items():
        by_block.add_line(name, range(BLOCKS), [1 - cosine for cosine in worst_by_block(found)])
    by_factor = Figure(
        "outlier channels", "factor of the channels", "KL divergence, nats", log_x=True, log_y=True
    )
    for name, scores in outliers.items():
        divergences = [scores[factor].summary(text)["KL divergence, nats"] for factor in OUTLIER_FACTORS]
        if max(divergences) > 0:
            by_factor.add_line(name, OUTLIER_FACTORS, divergences)
    return [by_block, by_factor]


def summary_of(
    whole: Mapping[str, Mapping[str, float]],
    maps: Mapping[str, Mapping[str, Mapping[str, float]]],
    outliers: Mapping[str, Mapping[int, Score]],
    large: Sequence[Mapping[str, Any]],
    outlier_text: HeldOutText,
) -> dict[str, Any]:
    return {
        "held-out text, against bf16 weights and KV": whole,
        "worst cosine of a row of outputs to bf16": {
            name: {
                "where": min(found, key=lambda at: found[at]["worst cosine"]),
                "cosine": min(one["worst cosine"] for one in found.values()),
                "by block": worst_by_block(found),
            }
            for name, found in maps.items()
        },
        "outlier channels, change of bits per byte in % by factor": {
            name: {
                factor: score.summary(outlier_text)["bits per byte, change in %"]
                for factor, score in scores.items()
            }
            for name, scores in outliers.items()
        },
        "outlier channels, KL divergence by factor": {
            name: {
                factor: score.summary(outlier_text)["KL divergence, nats"] for factor, score in scores.items()
            }
            for name, scores in outliers.items()
        },
        "layers of a 1.1 B model, worst cosine": {
            f"{values}, {quantization}": min(
                one["worst cosine"]
                for one in large
                if (one["values"], one["format"]) == (values, quantization)
            )
            for values, quantization in dict.fromkeys((one["values"], one["format"]) for one in large)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="read one window in so many of the text")
    parser.add_argument("--outliers-every", type=int, default=10, help="the same with outlier channels")
    parser.add_argument(
        "--rows", type=int, default=64, help="rows of inputs of the layers of the larger model"
    )
    arguments = parser.parse_args()
    text = held_out_text()
    read, read_with_outliers = text.part(arguments.every), text.part(arguments.outliers_every)
    settings = [Setting(dtype="float32")]
    settings += [Setting(weights, kv) for weights in QUANTIZATIONS for kv in KV_CACHE_DTYPES]
    scores = score_settings({str(one): (one, TINY) for one in settings}, read, arguments.threads)
    maps = compare_maps(record(max(text.windows, key=len)[:-1]))
    outliers = score_outliers(read_with_outliers, arguments.threads)
    large = compare_large_layers(arguments.rows)
    whole = {name: score.summary(read) for name, score in scores.items()}
    write_result(
        "quantization_quality",
        settings={
            "model": "tiny",
            "text": "held-out files of the standard library, tools/train_tiny.py",
            "tokens": read.tokens,
            "bytes": read.bytes,
            "tokens with outlier channels": read_with_outliers.tokens,
            "outlier channels of each norm": OUTLIER_CHANNELS,
            "isa": current_isa(),
        },
        samples={
            "nats and divergence by window": {name: score.by_window for name, score in scores.items()},
            "maps": maps,
            "large layers": large,
        },
        summary=summary_of(whole, maps, outliers, large, read_with_outliers),
        figures=figures_of(maps, outliers, read_with_outliers),
    )


if __name__ == "__main__":
    main()
