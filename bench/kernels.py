"""How near linear maps come to what the machine can do, and to torch.

1. Few rows: bytes of cold weights per second over those of a stream read just before. Weights are in huge pages and
   several times as large as the last cache.
2. Many rows: operations per second over those of the format's dot products repeated in registers just before.
3. From 1 to 512 rows, the matrices of three blocks of a 1.1 B model one after the other, so cold: ours, with the time
   to quantise the activations, against torch in bfloat16 (linear) and int8 (`_int_mm`, of activations quantised
   beforehand, and the dynamic quantised linear of two engines, which quantises as ours does).

With one thread times are CPU times, since a busy neighbour is not the kernels' cost; with more they are wall times.

    python bench/kernels.py                 about five minutes on one core
    python bench/kernels.py --threads 2
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from results import Figure, write_result

from plait.kernels import _native, current_isa

FORMATS = {"bf16": 0, "int8": 1, "int4 g32": 2, "int4 g128": 3}  # csrc/table.h
DEPTHS = (2048, 5632)
FEW_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
MANY_ROWS = (512, 1024)
MANY_ROWS_COLUMNS = 2048
DOTS = 20_000_000  # some two hundredths of a second or more
BLOCK = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))  # outputs, inputs: 44 M parameters
BLOCKS = 3
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TORCH_ENGINES = ("onednn", "x86")

Shares = dict[str, dict[int, list[float]]]
"""By format and depth, then by rows, one for each pass."""


class Clock:
    """How long something takes on the threads of the pool."""

    def __init__(self, pool: _native.Pool) -> None:
        self.pool = pool
        self._now = time.thread_time if pool.threads == 1 else time.perf_counter

    def seconds(self, task: Callable[..., object], *arguments: Any) -> float:
        start = self._now()
        task(*arguments)
        return self._now() - start

    def rate(self, task: Callable[..., int], *arguments: Any) -> float:
        """What the task returns, per second."""
        start = self._now()
        amount = task(*arguments)
        return amount / (self._now() - start)


class Packed:
    """Random weights, packed."""

    def __init__(self, format: int, columns: int, depth: int) -> None:
        self.format, self.columns, self.depth = format, columns, depth
        self.bytes = _native.packed_bytes(format, columns, depth)
        self.memory = _native.Arena(self.bytes).memory[: self.bytes]
        some = torch.randn(min(columns, 2048), depth) / depth**0.5
        rows = np.arange(columns) % len(some)
        _native.pack_into(self.memory, 0, some, rows, 0, depth, format, 2)

    def multiply(self, rows: _native.QuantizedRows, out: np.ndarray, pool: _native.Pool) -> None:
        _native.linear(self.memory, 0, self.columns, rows, out, pool=pool)


def activations(rows: int, depth: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, depth)).astype(np.float32)


def shares_of_stream(clock: Clock, weight_bytes: int, passes: int) -> Shares:
    stream = _native.Arena(weight_bytes).memory
    stream[:] = 1  # memory that was never written is one page of zeros, read from the cache
    shares: Shares = {}
    for name, format in FORMATS.items():
        for depth in DEPTHS:
            panels = weight_bytes // _native.packed_bytes(format, 64, depth)
            matrix = Packed(format, panels * 64, depth)
            found = shares[f"{name}, depth {depth}"] = {rows: [] for rows in FEW_ROWS}
            inputs = [_native.QuantizedRows(activations(rows, depth), format) for rows in FEW_ROWS]
            out = [np.zeros((rows, matrix.columns), np.float32) for rows in FEW_ROWS]
            for _ in range(passes):
                for at, rows in enumerate(FEW_ROWS):
                    stream_rate = clock.rate(_native.read_stream, stream, clock.pool)
                    seconds = clock.seconds(matrix.multiply, inputs[at], out[at], clock.pool)
                    found[rows].append(matrix.bytes / seconds / stream_rate)
    return shares


def shares_of_peak(clock: Clock, passes: int) -> Shares:
    shares: Shares = {}
    for name, format in FORMATS.items():
        for depth in DEPTHS:
            matrix = Packed(format, MANY_ROWS_COLUMNS, depth)
            found = shares[f"{name}, depth {depth}"] = {rows: [] for rows in MANY_ROWS}
            for rows in MANY_ROWS:
                inputs = _native.QuantizedRows(activations(rows, depth), format)
                out = np.zeros((rows, MANY_ROWS_COLUMNS), np.float32)
                for _ in range(passes):
                    peak = clock.rate(_native.repeat_dot, format, DOTS, clock.pool)
                    seconds = clock.seconds(matrix.multiply, inputs, out, clock.pool)
                    found[rows].append(2 * rows * MANY_ROWS_COLUMNS * depth / seconds / peak)
    return shares


# ---- against torch --------------------------------------------------------------------------------------

Product = Callable[[int], None]
"""All matrices with so many rows of activations."""


def our_product(format: int, pool: _native.Pool) -> Product:
    matrices = [Packed(format, *shape) for _ in range(BLOCKS) for shape in BLOCK]
    out = {columns: np.zeros((max(ROWS), columns), np.float32) for columns, _ in BLOCK}
    inputs = {depth: activations(max(ROWS), depth) for depth in DEPTHS}

    def product(rows: int) -> None:
        for matrix in matrices:
            quantized = _native.QuantizedRows(inputs[matrix.depth][:rows], format)
            matrix.multiply(quantized, out[matrix.columns][:rows], pool)

    return product


def torch_bf16() -> Product:
    weights = [torch.randn(shape).bfloat16() for _ in range(BLOCKS) for shape in BLOCK]
    inputs = {depth: torch.from_numpy(activations(max(ROWS), depth)).bfloat16() for depth in DEPTHS}

    def product(rows: int) -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]][:rows], weight)

    return product


def torch_int_mm() -> Product:
    weights = [
        torch.randint(-127, 128, shape, dtype=torch.int8).t() for _ in range(BLOCKS) for shape in BLOCK
    ]
    inputs = {depth: torch.randint(-127, 128, (max(ROWS), depth), dtype=torch.int8) for depth in DEPTHS}

    def product(rows: int) -> None:
        for weight in weights:
            torch._int_mm(inputs[weight.shape[0]][:rows], weight)

    return product


def torch_quantized(engine: str) -> Product:
    torch.backends.quantized.engine = engine
    matrices = []
    for columns, depth in BLOCK * BLOCKS:
        scales, zeros = torch.full((columns,), 0.02), torch.zeros(columns, dtype=torch.long)
        weight = torch.quantize_per_channel(torch.randn(columns, depth), scales, zeros, 0, torch.qint8)
        matrices.append((depth, torch.ops.quantized.linear_prepack(weight, None)))
    inputs = {depth: torch.from_numpy(activations(max(ROWS), depth)) for depth in DEPTHS}

    def product(rows: int) -> None:
        torch.backends.quantized.engine = engine
        for depth, packed in matrices:
            torch.ops.quantized.linear_dynamic(inputs[depth][:rows], packed, False)

    return product


def products(pool: _native.Pool) -> Iterator[tuple[str, Product]]:
    for name, format in FORMATS.items():
        yield name, our_product(format, pool)
    yield "torch bf16", torch_bf16()
    yield "torch int8, _int_mm", torch_int_mm()
    for engine in TORCH_ENGINES:
        if engine in torch.backends.quantized.supported_engines:
            yield f"torch int8, {engine}", torch_quantized(engine)


def product_seconds(clock: Clock, passes: int) -> Shares:
    """Seconds of each product, in passes that take turns."""
    known = dict(products(clock.pool))
    found: Shares = {name: {rows: [] for rows in ROWS} for name in known}
    with torch.inference_mode():
        for rows in ROWS:
            for product in known.values():
                product(rows)  # torch chooses its kernels at the first call
            for _ in range(passes):
                for name, product in known.items():
                    found[name][rows].append(clock.seconds(product, rows))
    return found


# ---- the record -----------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4, method="inclusive")]


def medians(values: dict[int, list[float]]) -> list[float]:
    return [statistics.median(of_rows) for of_rows in values.values()]


def speed_up(ours: dict[int, list[float]], theirs: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    """The fastest of theirs over ours, pass by pass."""
    return {
        rows: quartiles(
            [min(other[rows][at] for other in theirs) / mine for at, mine in enumerate(ours[rows])]
        )
        for rows in ROWS
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=11)
    parser.add_argument("--weight-bytes", type=int, default=192 << 20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # torch: its quantised types will go
    torch.set_num_threads(options.threads)
    clock = Clock(_native.Pool(options.threads))

    stream = shares_of_stream(clock, options.weight_bytes, options.passes)
    peak = shares_of_peak(clock, options.passes)
    seconds = product_seconds(clock, options.passes)
    int8_peers = [values for name, values in seconds.items() if name.startswith("torch int8")]
    summary = {
        "share of the stream read": {
            name: {rows: quartiles(shares) for rows, shares in by_rows.items()}
            for name, by_rows in stream.items()
        },
        "share of the peak": {
            name: {rows: quartiles(shares) for rows, shares in by_rows.items()}
            for name, by_rows in peak.items()
        },
        "times as fast as torch": {
            "bf16": speed_up(seconds["bf16"], [seconds["torch bf16"]]),
            "int8, against torch's best": speed_up(seconds["int8"], int8_peers),
        },
    }
    share_figure = Figure("cold weights, share of a stream read", "rows", "share")
    for name, by_rows in stream.items():
        share_figure.add_line(name, list(by_rows), medians(by_rows))
    parameters = BLOCKS * sum(columns * depth for columns, depth in BLOCK)
    speed_figure = Figure(f"{BLOCKS} blocks of a 1.1 B model", "rows", "Gop/s", log_x=True, log_y=True)
    for name, by_rows in seconds.items():
        speeds = [
            2 * rows * parameters / median / 1e9
            for rows, median in zip(by_rows, medians(by_rows), strict=True)
        ]
        speed_figure.add_line(name, list(by_rows), speeds)
    write_result(
        "kernels" if options.threads == 1 else f"kernels_{options.threads}_threads",
        settings=vars(options) | {"isa": current_isa()},
        samples={"shares of the stream": stream, "shares of the peak": peak, "seconds": seconds},
        summary=summary,
        figures=[share_figure, speed_figure],
    )


if __name__ == "__main__":
    main()
