"""What it costs to have a request's KV blocks on other machines, before any link: bytes, merging, moving.

1. Bytes a token that a session of the embedded model sends to its holders and gets back, counted on the tensors of a
run,
   beside DistAttention's formula, and what fetching the blocks themselves each step (a ring) would take; the formula
   for shapes of larger models.
2. Time to merge the parts of one token's attention, as a fraction of attending them, by length and number of holders.
3. Time of a decode step in which blocks move out, against the step after it in which none do, by tokens moved.
   Creditors are in the same process, so this is what moving costs debtor and creditor together without a link.
4. The throughput model of the placement: fitted to every other step of a grid (requests, context, holders), and its
   error on the rest.

    nice -n 19 python bench/distkv.py            about 3 minutes on two cores
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Figure, write_result

import plait.model
from plait.engine import EngineOptions, Partial, PartialAsk, SpanEngine, SpanSession, load_span_engine
from plait.engine.partial import attend_partly, finish_partial, merge_partials
from plait.ids import PeerId, SessionId
from plait.kvcache import Granted, LoanTerms, StepSample, fit_layer_times
from plait.scheduling import StepLimits
from plait.session import SamplingParams

TINY = Path(plait.model.__file__).parent / "tiny"
BLOCKS = 6
BLOCK_TOKENS = 16
DEBTOR = PeerId("debtor")
MOVED_TOKENS = (16, 32, 64, 128)
SHAPES = {  # layers, query heads, key-value heads, head dimension
    "Llama-2-7B": (32, 32, 32, 128),
    "Llama-3-8B": (32, 32, 8, 128),
    "Llama-3-70B": (80, 64, 8, 128),
}


def machine(kv_tokens: int, borrowable_tokens: int) -> SpanEngine:
    options = EngineOptions(
        folder=TINY,
        dtype="float32",
        kv_cache_bytes=kv_tokens * 12_000,  # keys and values take 6 KiB a token, kept inputs up to 1 KiB
        limits=StepLimits(step_tokens=256, borrowable_blocks=borrowable_tokens // BLOCK_TOKENS),
        prefix_caching=False,
        packed_cache=False,
        threads=1,
    )
    terms = LoanTerms(lendable_blocks=kv_tokens // BLOCK_TOKENS)
    return load_span_engine(options, range(BLOCKS), loan_terms=terms)


class Holders:
    """Creditors in this process; counts the bytes of what would travel."""

    def __init__(self, debtor: SpanEngine, creditors: dict[PeerId, SpanEngine]) -> None:
        assert debtor.loans is not None
        self.debtor, self.loans, self.creditors = debtor, debtor.loans, creditors
        self.loans.store.remote = self
        self.out_bytes = self.back_bytes = self.asks = 0
        self._number = 0
        self._parts: list[Partial] = []

    def ask(self, asked: PartialAsk) -> "Holders":
        self._parts = []
        for share in self.loans.shares(asked):
            loans = self.creditors[share.creditor].loans
            assert loans is not None
            part = loans.attend(DEBTOR, share.blocks, share.starts, asked.block, asked.position, asked.query)
            self.asks += 1
            self.out_bytes += asked.query.nbytes
            self.back_bytes += sum(tensor.nbytes for tensor in part)
            self._parts.append(part)
        return self

    def take(self) -> Sequence[Partial]:
        return self._parts

    def borrow(self, creditor: PeerId, kv_blocks: int) -> None:
        loans = self.creditors[creditor].loans
        assert loans is not None
        answer = loans.book.reserve(DEBTOR, self._number, kv_blocks, 0.0)
        assert isinstance(answer, Granted), "the creditors of this measurement have room"
        self._number += 1
        self.loans.debts.granted(creditor, answer.blocks)

    def move(self, kv_blocks: int) -> int:
        """Move so many blocks out now; returns how many there were to move."""
        outgoing = self.loans.start_moves(kv_blocks)
        for each in outgoing:
            loans = self.creditors[each.place.creditor].loans
            assert loans is not None
            self.loans.finish_move(each.borrowed, loans.write(DEBTOR, each.place.block, each.content))
        return len(outgoing)


class Session:
    """One greedy session, stepped token by token."""

    def __init__(self, engine: SpanEngine, prompt_tokens: int, most_tokens: int, place: int = 0) -> None:
        self.engine, self.id = engine, SessionId(f"{place:032x}")
        sampling = SamplingParams(max_tokens=most_tokens, temperature=0.0, ignore_eos=True)
        engine.open(
            SpanSession(
                id=self.id,
                max_tokens=prompt_tokens + most_tokens,
                prompt_tokens=prompt_tokens,
                sampling=sampling,
                seed=0,
                sample_index=0,
                arrived_unix_s=float(place),
            )
        )
        prompt = np.random.default_rng(place).integers(5, 900, prompt_tokens).tolist()
        self.tokens = prompt_tokens
        self.next = self._feed(0, prompt)

    def decode(self) -> float:
        """Seconds that the next token takes."""
        start_s = time.perf_counter()
        self.next = self._feed(self.tokens, [self.next])
        self.tokens += 1
        return time.perf_counter() - start_s

    def _feed(self, start: int, token_ids: list[int]) -> int:
        self.engine.feed(self.id, start, token_ids, None, sample_rows=1)
        while True:
            for output in self.engine.step():
                if output.sampled:
                    return output.sampled[0].token_id


def formula_bytes(layers: int, heads: int, dim: int, query_bytes: int) -> tuple[int, int]:
    """Bytes out and back for one token and holder: the query; the sum in float32, and two numbers a head."""
    return layers * heads * dim * query_bytes, layers * heads * (dim + 2) * 4


def measure_bytes(context_tokens: int) -> dict[str, Any]:
    debtor = machine(context_tokens + 64, context_tokens)
    creditors = {PeerId(name): machine(context_tokens, 0) for name in "ab"}
    holders = Holders(debtor, creditors)
    session = Session(debtor, context_tokens, 40)
    for creditor in creditors:
        holders.borrow(creditor, context_tokens // BLOCK_TOKENS // 2)
    moved = holders.move(context_tokens // BLOCK_TOKENS)
    holders.out_bytes = holders.back_bytes = holders.asks = 0
    for _ in range(20):
        session.decode()
    attention = debtor.spec.blocks[0].attention
    out, back = formula_bytes(BLOCKS, attention.heads, attention.head_dim, 4)
    extent_bytes = debtor.store.extent_bytes
    return {
        "context_tokens": context_tokens,
        "moved_blocks": moved,
        "out_bytes_a_token": holders.out_bytes / 20,
        "back_bytes_a_token": holders.back_bytes / 20,
        "formula_out_bytes": 2 * out,
        "formula_back_bytes": 2 * back,
        "ring_bytes_a_token": moved * extent_bytes,
    }


def median_s(call: Callable[[], object], times: int = 30) -> float:
    samples: list[float] = []
    for _ in range(times):
        start_s = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start_s)
    return statistics.median(samples)


def measure_merge(keys: int, holders: int) -> dict[str, Any]:
    """One token of Llama-3-8B's shape: attending all parts, and merging them."""
    generator = torch.Generator().manual_seed(keys)
    query = torch.randn(1, 32, 128, generator=generator)
    key, value = (torch.randn(8, keys, 128, generator=generator) for _ in range(2))
    cuts = [slice(part * keys // holders, (part + 1) * keys // holders) for part in range(holders)]

    def attend() -> list[Partial]:
        return [attend_partly(query, key[:, cut], value[:, cut], bias=None, scale=0.1) for cut in cuts]

    parts = attend()
    attend_s, merge_s = median_s(attend), median_s(lambda: finish_partial(merge_partials(parts)))
    return {"keys": keys, "holders": holders, "attend_s": attend_s, "merge_s": merge_s}


def measure_moves(moved_tokens: int, context_tokens: int, pairs: int) -> dict[str, Any]:
    """Steps before which blocks move, each followed by one before which none do."""
    kv_blocks = moved_tokens // BLOCK_TOKENS
    rounds = min(pairs, context_tokens // BLOCK_TOKENS // kv_blocks)
    debtor = machine(context_tokens + 256, context_tokens)
    holders = Holders(debtor, {PeerId("a"): machine(context_tokens, 0)})
    session = Session(debtor, context_tokens, 2 * pairs + 20)
    holders.borrow(PeerId("a"), rounds * kv_blocks)
    for _ in range(5):
        session.decode()
    moving_s: list[float] = []
    still_s: list[float] = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        assert holders.move(kv_blocks) == kv_blocks
        move_s = time.perf_counter() - start_s
        moving_s.append(move_s + session.decode())
        still_s.append(session.decode())
    return {"moved_tokens": moved_tokens, "moving_s": moving_s, "still_s": still_s}


def measure_step(requests: int, context_tokens: int, holders: int, steps: int) -> StepSample:
    """The median decode step of so many sessions, half of whose blocks are spread over the holders."""
    total_tokens = requests * (context_tokens + 64)
    debtor = machine(total_tokens + 64, total_tokens)
    near = Holders(debtor, {PeerId(str(place)): machine(total_tokens, 0) for place in range(holders)})
    sessions = [Session(debtor, context_tokens, steps + 8, place) for place in range(requests)]
    if holders:
        blocks = total_tokens // BLOCK_TOKENS // 2 // holders
        for creditor in near.creditors:
            near.borrow(creditor, blocks)
        near.move(blocks * holders)
    samples: list[float] = []
    for step in range(steps + 2):
        near.asks = 0
        for session in sessions:
            debtor.feed(session.id, session.tokens, [session.next], None, sample_rows=1)
            session.tokens += 1
        start_s = time.perf_counter()
        outputs = {output.id: output.sampled[0].token_id for output in debtor.step()}
        if step >= 2:
            samples.append(time.perf_counter() - start_s)
        for session in sessions:
            session.next = outputs[session.id]
    return StepSample(requests, requests * context_tokens, near.asks // BLOCKS, statistics.median(samples))


def measure_model(steps: int) -> dict[str, Any]:
    grid = [
        measure_step(requests, context_tokens, holders, steps)
        for requests in (1, 2, 4, 8)
        for context_tokens in (64, 256, 768)
        for holders in (0, 1, 2)
        if requests * context_tokens <= 2048
    ]
    times = fit_layer_times(grid[::2], BLOCKS)
    errors = [
        abs(times.throughput(each.requests, each.tokens, each.holders) / (each.requests / each.seconds) - 1)
        for each in grid[1::2]
    ]
    return {"grid": [asdict(each) for each in grid], "times": asdict(times), "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=896, help="tokens of the moving session")
    parser.add_argument("--pairs", type=int, default=40, help="moving and still steps for each rate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        wire = [measure_bytes(tokens) for tokens in (128, 512)]
        merges = [measure_merge(keys, holders) for keys in (1024, 4096, 16384) for holders in (2, 4, 8)]
    moves = [measure_moves(tokens, arguments.context, arguments.pairs) for tokens in MOVED_TOKENS]
    model = measure_model(steps=9)
    slowdowns = {
        str(each["moved_tokens"]): statistics.median(
            moving / still - 1 for moving, still in zip(each["moving_s"], each["still_s"], strict=True)
        )
        for each in moves
    }
    shapes = {
        name: {
            "bytes_a_token_and_holder": sum(formula_bytes(layers, heads, dim, 2)),
            "kv_bytes_of_one_token": 2 * layers * kv_heads * dim * 2,
        }
        for name, (layers, heads, kv_heads, dim) in SHAPES.items()
    }
    for shape in shapes.values():
        shape["context_beyond_which_a_step_is_cheaper_than_a_ring"] = math.ceil(
            shape["bytes_a_token_and_holder"] / shape["kv_bytes_of_one_token"]
        )
    merged = Figure("Merging, of attending", "keys", "fraction", log_x=True, log_y=True)
    for holders in (2, 4, 8):
        mine = [each for each in merges if each["holders"] == holders]
        fractions = [each["merge_s"] / each["attend_s"] for each in mine]
        merged.add_line(f"{holders} holders", [each["keys"] for each in mine], fractions)
    moving = Figure("A step in which blocks move", "tokens moved", "slower than the next step, fraction")
    moving.add_line("median of pairs", list(MOVED_TOKENS), list(slowdowns.values()))
    write_result(
        "distkv",
        settings={"context_tokens": arguments.context, "pairs": arguments.pairs, "threads": 1},
        samples={"merges": merges, "moves": moves, "model": model},
        summary={
            "wire": wire,
            "merge_fraction_of_attending": {
                f"{each['keys']} keys, {each['holders']} holders": round(
                    each["merge_s"] / each["attend_s"], 4
                )
                for each in merges
            },
            "slower_by_moving": {tokens: round(value, 3) for tokens, value in slowdowns.items()},
            "throughput_model": {
                "times": model["times"],
                "median_error_fraction": round(statistics.median(model["errors"]), 3),
                "worst_error_fraction": round(max(model["errors"]), 3),
            },
            "larger_models": shapes,
        },
        figures=[merged, moving],
    )


if __name__ == "__main__":
    main()
