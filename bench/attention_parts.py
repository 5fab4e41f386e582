"""What attention by parts costs: beside whole rows on the same kernels, and beside torch's parts.

One token, and a chunk of a prompt, over a context in KV blocks of 16 and of 64 tokens, heads of Llama-3-8B (32 of 128,
of which 4 share one): keys a second by the kernels' parts (a holder's work), by the kernels' whole rows (an engine
without loans), and by torch's parts in float32. Then the merge, in decode steps of the embedded model with half of the
blocks at a holder: its time as a share of that of the attention here.

    python bench/attention_parts.py                  about a minute on one core
    python bench/attention_parts.py --keys 1024      for a look
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from results import Figure, write_result

import plait.model
from plait.engine.checkpoint import open_checkpoint
from plait.engine.kernel_kv import KernelKvStore
from plait.engine.native import NativeDecoder
from plait.engine.packed import load_packed
from plait.engine.partial import Partial, attend_partly
from plait.engine.remote_kv import PartialAsk
from plait.engine.step import SequenceChunk
from plait.kernels import _native, current_isa

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
ROWS = (1, 64)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


def seconds(task: Callable[[], object], passes: int) -> list[float]:
    task()
    taken: list[float] = []
    for _ in range(passes):
        start_s = time.thread_time()  # one thread: a busy neighbour is not what is measured
        task()
        taken.append(time.thread_time() - start_s)
    return taken


def empty_part(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty((rows, HEADS)), np.empty((rows, HEADS)), np.empty((rows, HEADS, DIM))


class Context:
    """Keys and values in KV blocks, and a holder of all of them."""

    def __init__(self, format: str, keys: int, block_tokens: int) -> None:
        self.keys, count = keys, keys // block_tokens
        self.pages = _native.KvPages(format, 1, KV_HEADS, DIM, block_tokens, count, 1)
        self.table = np.arange(count, dtype=np.int32)
        self.starts = np.arange(count, dtype=np.int64) * block_tokens
        self.pages.append("", 0, self.table, 0, normal(keys, KV_HEADS, DIM), normal(keys, KV_HEADS, DIM))
        shape = {
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "dim": DIM,
            "scale": SCALE,
            "window_tokens": 0,
            "chunk_tokens": 0,
            "softcap": 0.0,
        }
        pool = _native.Pool(1)
        self.lender = _native.Lender(pool, [shape], format, KV_HEADS, DIM, block_tokens, 2**20)

    def whole(self, query: np.ndarray) -> object:
        parts = np.array([[0, self.keys - len(query), len(query)]])
        return self.pages.attend("", 0, query, parts, [self.table], scale=SCALE)

    def by_parts(self, query: np.ndarray, out: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        self.lender.attend(self.pages.bytes, 0, self.table, self.starts, self.keys, query, out)


def attending(keys: int, passes: int) -> dict[str, dict[int, list[float]]]:
    """Seconds by way, then by rows."""
    found: dict[str, dict[int, list[float]]] = {}
    for format in ("bf16", "int8"):
        for block_tokens in (16, 64):
            context = Context(format, keys, block_tokens)
            for rows in ROWS:
                query, out = normal(rows, HEADS, DIM), empty_part(rows)
                name = f"{format}, by parts, blocks of {block_tokens}"
                by_parts = seconds(lambda c=context, q=query, o=out: c.by_parts(q, o), passes)
                found.setdefault(name, {})[rows] = by_parts
                if block_tokens == 16:
                    whole = seconds(lambda c=context, q=query: c.whole(q), passes)
                    found.setdefault(f"{format}, whole rows", {})[rows] = whole
    k, v = (torch.from_numpy(normal(KV_HEADS, keys, DIM)) for _ in range(2))
    for rows in ROWS:
        query = torch.from_numpy(normal(rows, HEADS, DIM))
        taken = seconds(lambda q=query: attend_partly(q, k, v, bias=None, scale=SCALE), passes)
        found.setdefault("torch float32, by parts", {})[rows] = taken
    return found


class Holder:
    """What lies elsewhere of one sequence, in this process: block n of it has the number `first` + n."""

    def __init__(self, store: KernelKvStore, first: int) -> None:
        self.store, self.first = store, first
        self.parts: list[Partial] = []

    def ask(self, asked: PartialAsk) -> "Holder":
        numbers = [number - self.first for number in asked.kv_blocks]
        self.parts = [self.store.attend(asked.block, numbers, asked.starts, asked.position, asked.query)]
        return self

    def take(self) -> list[Partial]:
        return self.parts


def merging(tokens: int, steps: int) -> list[float]:
    """Of each decode step, the time of merging over that of attending what is here."""
    checkpoint = open_checkpoint(Path(plait.model.__file__).parent / "tiny")
    weights = load_packed(checkpoint, format="bf16", threads=1)
    decoder = NativeDecoder(checkpoint.spec, weights, threads=1, by_parts=True)
    blocks, count = checkpoint.spec.all_blocks, (tokens + steps) // 16 + 1
    here, there = (KernelKvStore(checkpoint.spec, blocks, count, 16, "bf16") for _ in range(2))
    here.remote = Holder(there, count)
    table = list(range(count))

    def run(start: int, count: int) -> None:
        ids = [7] * count
        decoder.forward([SequenceChunk(start, ids, table[: (start + count + 15) // 16], 0, 1)], here)

    run(0, tokens)
    for index in range(tokens // 32):
        there.write_blocks([index], here.read_blocks([index]))
        table[index] = count + index
    shares: list[float] = []
    for step in range(steps):
        run(tokens + step, 1)
        phases = decoder.phase_seconds()
        shares.append(phases["merge"] / phases["attention"])
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--passes", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = attending(options.keys, options.passes)
    merges = merging(tokens=448, steps=32)
    keys_per_s = {
        name: {rows: round(options.keys * rows / statistics.median(taken)) for rows, taken in by_rows.items()}
        for name, by_rows in found.items()
    }
    slower = {
        f"{format}, blocks of {block_tokens}": {
            rows: round(
                statistics.median(found[f"{format}, by parts, blocks of {block_tokens}"][rows])
                / statistics.median(found[f"{format}, whole rows"][rows]),
                2,
            )
            for rows in ROWS
        }
        for format in ("bf16", "int8")
        for block_tokens in (16, 64)
    }
    figure = Figure("attention by parts", "query rows", "keys times rows a second", log_y=True)
    for name, by_rows in keys_per_s.items():
        figure.add_line(name, list(by_rows), list(by_rows.values()))
    write_result(
        "attention_parts",
        settings=vars(options) | {"isa": current_isa()},
        samples={"seconds": found, "merge over attention": merges},
        summary={
            "keys times rows a second": keys_per_s,
            "times as long as whole rows": slower,
            "merging over attending here, 448 tokens of which half are elsewhere": round(
                statistics.median(merges), 3
            ),
        },
        figures=[figure],
    )


if __name__ == "__main__":
    main()
