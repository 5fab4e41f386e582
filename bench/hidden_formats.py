"""What hidden states cost on the wire, and what is lost in each format.

1. Bytes a value and error of the formats of wire/hidden.py and of int8 with other blocks and scales, on hidden states
   of the embedded model (every cut between two of its blocks), on Gaussian noise, and on noise with outlier channels:
   one in a hundred is 60 times larger, as large language models grow them (Dettmers et al. 2022, LLM.int8(), sec. 4).
   The error is the root mean square over that of the values, in all and over the channels that are no outliers.
2. The embedded model on its held-out text, cut between all of its blocks, with every cut in a format: KL divergence and
   agreement of the most likely token with the uncut model, and bits per byte.

    python bench/hidden_formats.py [--every 8]         about 2 minutes on two cores
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from quantization_quality import HeldOutText, held_out_text
from results import Figure, write_result
from torch import Tensor
from transformers import LlamaForCausalLM

import plait.model
from plait.wire import HiddenFormat, decode_hidden, encode_hidden, hidden_bytes
from plait.wire.hidden import INT8_BLOCK_VALUES

TINY = Path(plait.model.__file__).parent / "tiny"
BLOCKS = 6
FORMATS: tuple[HiddenFormat, ...] = get_args(HiddenFormat)
BLOCK_VALUES = (32, 64, 128, 256, 1024)
SCALE_BYTES = {"float32": 4, "bfloat16": 2}
NOISE_SHAPE = (512, 4096)
OUTLIER_FACTOR, OUTLIER_EVERY = 60.0, 100

States = NDArray[np.float32]
Through = Callable[[States], States]


def through_wire(format: HiddenFormat) -> Through:
    def there_and_back(values: States) -> States:
        return decode_hidden(encode_hidden(values, format), format, *values.shape)

    return there_and_back


def through_int8(block_values: int, scale: str) -> Through:
    """The same as wire/hidden.py's int8 with any block and scale."""

    def there_and_back(values: States) -> States:
        tokens, hidden = values.shape
        blocks = np.pad(values, ((0, 0), (0, -hidden % block_values))).reshape(tokens, -1, block_values)
        scales = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
        if scale == "bfloat16":  # rounded up, or a code could exceed 127
            scales = ((scales.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
        codes = np.rint(blocks / np.where(scales == 0, np.float32(1), scales))
        return (codes * scales).reshape(tokens, -1)[:, :hidden]

    return there_and_back


def ways(hidden: int) -> Iterator[tuple[str, float, Through]]:
    """Name, bytes a value, and the way itself."""
    for format in FORMATS:
        yield f"{format} as sent", sum(hidden_bytes(format, 1, hidden)) / hidden, through_wire(format)
    for block_values in BLOCK_VALUES:
        for scale, scale_bytes in SCALE_BYTES.items():
            bytes_each = 1 + math.ceil(hidden / block_values) * scale_bytes / hidden
            yield f"int8, {block_values}, {scale} scale", bytes_each, through_int8(block_values, scale)


def relative_error(values: States, back: States, channels: NDArray[np.bool_]) -> float:
    """Root mean square of the error over that of the values."""
    error = (back - values)[:, channels].astype(np.float64)
    return float(np.sqrt((error**2).mean() / (values[:, channels].astype(np.float64) ** 2).mean()))


def errors_on(values: States, outliers: NDArray[np.bool_]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, bytes_each, way in ways(values.shape[1]):
        back = way(values)
        found[name] = {
            "bytes a value": round(bytes_each, 4),
            "error": relative_error(values, back, np.ones(values.shape[1], np.bool_)),
            "error without outliers": relative_error(values, back, ~outliers),
        }
    return found


# ---- the embedded model, cut between its blocks ---------------------------------------------------------------------


@contextmanager
def cut(model: LlamaForCausalLM, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Change what passes from each block to the next."""

    def hook(place: int) -> Callable[..., Tensor]:
        return lambda module, inputs, output: change(place, output)

    handles = [
        layer.register_forward_hook(hook(place))
        for place, layer in enumerate(model.model.layers[: BLOCKS - 1])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def hidden_states(model: LlamaForCausalLM, text: HeldOutText) -> States:
    """Of all cuts, one after the other: [tokens, hidden]."""
    seen: list[Tensor] = []

    def keep(place: int, output: Tensor) -> Tensor:
        seen.append(output[0].clone())
        return output

    with cut(model, keep):
        for window in text.windows[:4]:
            model(window[None, :-1])
    return torch.cat(seen).numpy()


@torch.inference_mode()
def quality(model: LlamaForCausalLM, text: HeldOutText) -> dict[str, Any]:
    """Each format in every cut, against no cut."""
    totals = {format: {"kl": 0.0, "agreed": 0, "nats": 0.0} for format in FORMATS}
    for window in text.windows:
        inputs, targets = window[None, :-1], window[1:]
        exact = torch.log_softmax(model(inputs).logits[0].double(), dim=-1)
        for format in FORMATS:
            way = through_wire(format)

            def change(place: int, output: Tensor, way: Through = way) -> Tensor:
                return torch.from_numpy(way(output[0].numpy()).copy())[None]

            with cut(model, change):
                changed = torch.log_softmax(model(inputs).logits[0].double(), dim=-1)
            total = totals[format]
            total["kl"] += float((exact.exp() * (exact - changed)).sum())
            total["agreed"] += int((exact.argmax(-1) == changed.argmax(-1)).sum())
            total["nats"] -= float(changed.gather(1, targets[:, None]).sum())
    return {
        format: {
            "KL divergence, nats a token": total["kl"] / text.tokens,
            "same most likely token": round(total["agreed"] / text.tokens, 5),
            "bits per byte": round(total["nats"] / math.log(2) / text.bytes, 5),
        }
        for format, total in totals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=8, help="one window of the text in so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print the results, write nothing")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    text = held_out_text().part(arguments.every)
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()

    noise = rng.standard_normal(NOISE_SHAPE, np.float32)
    outliers = np.arange(NOISE_SHAPE[1]) % OUTLIER_EVERY == 0
    states = hidden_states(model, text)
    errors = {
        "hidden states of tiny": errors_on(states, np.zeros(states.shape[1], np.bool_)),
        "Gaussian": errors_on(noise, np.zeros(NOISE_SHAPE[1], np.bool_)),
        "Gaussian with outlier channels": errors_on(
            noise * np.where(outliers, np.float32(OUTLIER_FACTOR), np.float32(1)), outliers
        ),
    }
    summary = {
        "sent": f"int8 in blocks of {INT8_BLOCK_VALUES} with bfloat16 scales",
        "errors": errors,
        f"tiny on {text.tokens} held-out tokens, {BLOCKS - 1} cuts": quality(model, text),
    }
    if arguments.dry:
        import json

        print(json.dumps(summary, indent=1))
        return
    figures: list[Figure] = []
    for name, found in errors.items():
        figure = Figure(name, "bytes a value", "relative error", log_y=True)
        for scale in SCALE_BYTES:
            chosen = [found[f"int8, {block_values}, {scale} scale"] for block_values in BLOCK_VALUES]
            for kind in ("error", "error without outliers"):
                figure.add_line(
                    f"{scale} scales, {kind}",
                    [entry["bytes a value"] for entry in chosen],
                    [entry[kind] for entry in chosen],
                )
        figures.append(figure)
    write_result(
        "hidden_formats",
        settings={"every": arguments.every, "seed": arguments.seed},
        samples=errors,
        summary=summary,
        figures=figures,
    )


if __name__ == "__main__":
    main()
