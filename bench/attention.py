"""How attention compares with other tilings, with torch, and with what memory gives.

1. Prefill: causal attention of one sequence of 256 to 8192 tokens, 8 heads of 64 or 128 dimensions, by SlimAttention
   (all keys of a block of rows at once: what a forward pass uses), by our own two-dimensional tiling (FlashAttention:
   64 rows by 512 keys, rescaled in between) with the same products inside, both over paged bfloat16 keys; and by
   torch's scaled_dot_product_attention, is_causal, over contiguous bfloat16 and float32. Also as a share of bfloat16
   products repeated in registers just before.
2. Decoding: one token of several sequences at 4,096 to 32,768 tokens, whose keys and values are larger than the caches
   and lie in shuffled KV blocks, in bfloat16 and int8. Bytes of keys and values per second over those of a stream read
   just before. The shapes are those of TinyLlama (32 heads share 4, 64 dimensions) and Llama 3 8B (32 share 8, 128).

With one thread times are CPU times, since a busy neighbour is not the kernels' cost; with more they are wall times.
Contenders take turns; medians and quartiles.

    python bench/attention.py                 about four minutes on one core
    python bench/attention.py --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from results import Figure, write_result
from torch.nn.functional import scaled_dot_product_attention

from plait.kernels import _native, current_isa

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
PREFILL_DIMS = (64, 128)
PREFILL_HEADS = 8
OURS, TWO_DIMENSIONAL = "SlimAttention", "two-dimensional"
CONTEXTS = (4096, 8192, 16384, 32768)
FORMATS = ("bf16", "int8")
BF16_DOTS = 0  # the format's number in csrc/table.h
DOTS = 10_000_000


@dataclass(frozen=True)
class DecodeShape:
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.heads} heads share {self.kv_heads}, dim {self.dim}"


DECODE_SHAPES = (DecodeShape(32, 4, 64), DecodeShape(32, 8, 128))


class Bench:
    """The settings of a run, and its clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.isa = current_isa()
        self.threads: int = options.threads
        self.passes: int = options.passes
        self.block_tokens: int = options.block_tokens
        self.kv_bytes: int = options.kv_bytes
        self.l2_bytes: int = options.l2_bytes
        self.pool = _native.Pool(self.threads)
        self.now = time.thread_time if self.threads == 1 else time.perf_counter

    def seconds(self, task: Callable[[], object]) -> float:
        start = self.now()
        task()
        return self.now() - start

    def peak_per_s(self) -> float:
        """Operations of bfloat16 products in registers."""
        start = self.now()
        return _native.repeat_dot(BF16_DOTS, DOTS, self.pool) / (self.now() - start)

    def stream_bytes_per_s(self, memory: np.ndarray) -> float:
        start = self.now()
        return _native.read_stream(memory, self.pool) / (self.now() - start)


class Cached:
    """Sequences of random keys and values in shuffled KV blocks."""

    def __init__(
        self, bench: Bench, format: str, kv_heads: int, dim: int, tokens: int, sequences: int = 1
    ) -> None:
        self.bench, self.dim = bench, dim
        blocks = -(-tokens // bench.block_tokens)
        self.kv = _native.KvPages(
            format, 1, kv_heads, dim, bench.block_tokens, blocks * sequences, bench.threads
        )
        rng = np.random.default_rng(0)
        order = rng.permutation(blocks * sequences).astype(np.int32)
        self.tables = [np.ascontiguousarray(own) for own in np.split(order, sequences)]
        keys, values = rng.standard_normal((2, tokens, kv_heads, dim), dtype=np.float32)
        for table in self.tables:
            self.kv.append(bench.isa, 0, table, 0, keys, values)

    def attend(self, queries: np.ndarray, parts: np.ndarray, way: str) -> _native.AttentionRun:
        return self.kv.attend(
            self.bench.isa,
            0,
            queries,
            parts,
            self.tables,
            scale=self.dim**-0.5,
            way=way,
            l2_bytes=self.bench.l2_bytes,
        )


# ---- prefill --------------------------------------------------------------------------------------------

Seconds = dict[str, list[float]]
"""By contender, one for each pass."""


def measure_prefill(bench: Bench, length: int, dim: int) -> tuple[Seconds, list[float]]:
    """Seconds of each contender, and SlimAttention's share of the peak, pass by pass."""
    cached = Cached(bench, "bf16", PREFILL_HEADS, dim, length)
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((length, PREFILL_HEADS, dim), dtype=np.float32)
    parts = np.array([[0, 0, length]])
    tensors = {
        dtype: [torch.randn(1, PREFILL_HEADS, length, dim).to(dtype) for _ in range(3)]
        for dtype in (torch.bfloat16, torch.float32)
    }
    contenders: dict[str, Callable[[], object]] = {
        OURS: lambda: cached.attend(queries, parts, "whole"),
        TWO_DIMENSIONAL: lambda: cached.attend(queries, parts, "two-dimensional"),
        "torch bf16": lambda: scaled_dot_product_attention(*tensors[torch.bfloat16], is_causal=True),
        "torch float32": lambda: scaled_dot_product_attention(*tensors[torch.float32], is_causal=True),
    }
    operations = 4 * PREFILL_HEADS * dim * length * (length + 1) / 2
    seconds: Seconds = {name: [] for name in contenders}
    shares: list[float] = []
    for _ in range(bench.passes):
        peak_per_s = bench.peak_per_s()
        for name, task in contenders.items():
            task()  # each finds what it needs in the cache, whoever ran before it
            seconds[name].append(bench.seconds(task))
        shares.append(operations / seconds[OURS][-1] / peak_per_s)
    return seconds, shares


# ---- decoding -------------------------------------------------------------------------------------------


def measure_decoding(
    bench: Bench, shape: DecodeShape, context: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Shares of the stream read by format, and how many times as fast int8 is as bfloat16, pass by pass."""
    token_bytes = 2 * shape.kv_heads * shape.dim * 2
    sequences = max(1, bench.kv_bytes // (token_bytes * context))
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((sequences, shape.heads, shape.dim), dtype=np.float32)
    parts = np.array([[row, context - 1, 1] for row in range(sequences)])
    cached = {
        format: Cached(bench, format, shape.kv_heads, shape.dim, context, sequences) for format in FORMATS
    }
    shares: dict[str, list[float]] = {format: [] for format in FORMATS}
    speed_ups: list[float] = []
    # Few heads for the threads are cut along their keys, as a forward pass does.
    way = "split" if sequences * shape.kv_heads < 2 * bench.threads else "whole"
    for _ in range(bench.passes):
        seconds: dict[str, float] = {}
        for format, memory in cached.items():
            stream = bench.stream_bytes_per_s(memory.kv.bytes.reshape(-1))
            seconds[format] = bench.seconds(lambda memory=memory: memory.attend(queries, parts, way))
            shares[format].append(memory.kv.bytes.nbytes / seconds[format] / stream)
        speed_ups.append(seconds["bf16"] / seconds["int8"])
    return shares, speed_ups


# ---- the record -----------------------------------------------------------------------------------------


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4, method="inclusive")]


def ratios(others: list[float], ours: list[float]) -> list[float]:
    return [other / mine for other, mine in zip(others, ours, strict=True)]


def l2_bytes() -> int:
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index2/size") as file:
            return int(file.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--kv-bytes", type=int, default=128 << 20, help="of bfloat16, decoding")
    parser.add_argument("--l2-bytes", type=int, default=l2_bytes())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)

    samples: dict[str, Any] = {"prefill": {}, "decoding": {}}
    summary: dict[str, Any] = {
        "prefill, times as fast as": {},
        "prefill, share of the peak": {},
        "decoding, share of the stream read": {},
        "decoding, int8 times as fast as bf16": {},
    }
    figures: list[Figure] = []
    with torch.inference_mode():
        for dim in PREFILL_DIMS:
            figure = Figure(f"prefill, dim {dim}: time over ours", "tokens", "ratio", log_x=True)
            medians: dict[str, list[float]] = {}
            for length in LENGTHS:
                seconds, shares = measure_prefill(bench, length, dim)
                case = f"dim {dim}, {length} tokens"
                samples["prefill"][case] = {"seconds": seconds, "shares of the peak": shares}
                summary["prefill, share of the peak"][case] = quartiles(shares)
                faster = summary["prefill, times as fast as"][case] = {}
                for name, of_other in seconds.items():
                    if name != OURS:
                        faster[name] = quartiles(ratios(of_other, seconds[OURS]))
                        medians.setdefault(name, []).append(faster[name][1])
            for name, of_lengths in medians.items():
                figure.add_line(name, LENGTHS, of_lengths)
            figures.append(figure)
    figure = Figure("decoding: share of the stream read", "context", "share", log_x=True)
    for shape in DECODE_SHAPES:
        by_format: dict[str, list[float]] = {format: [] for format in FORMATS}
        for context in CONTEXTS:
            shares_of, speed_ups = measure_decoding(bench, shape, context)
            case = f"{shape}, {context} tokens"
            samples["decoding"][case] = {"shares of the stream": shares_of, "int8 over bf16": speed_ups}
            summary["decoding, share of the stream read"][case] = {
                format: quartiles(shares) for format, shares in shares_of.items()
            }
            summary["decoding, int8 times as fast as bf16"][case] = quartiles(speed_ups)
            for format, shares in shares_of.items():
                by_format[format].append(statistics.median(shares))
        for format, of_contexts in by_format.items():
            figure.add_line(f"{format}, {shape}", CONTEXTS, of_contexts)
    figures.append(figure)
    write_result(
        "attention" if options.threads == 1 else f"attention_{options.threads}_threads",
        settings=vars(options) | {"isa": bench.isa},
        samples=samples,
        summary=summary,
        figures=figures,
    )


if __name__ == "__main__":
    main()
