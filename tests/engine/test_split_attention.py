# pyright: standard
"""Sequences with KV blocks on other machines have the logits of one machine, in every family."""

from collections.abc import Sequence

import torch
import zoo

from plait.engine.attention import Reach
from plait.engine.kv_store import KvStore
from plait.engine.partial import Partial
from plait.engine.remote_kv import PartialAsk
from plait.engine.split_attention import attend_shard, plan_shard

HOLDERS = 3


class NearbyHolders:
    """Holders in this process: a store each, without a model; borrowed number n is block n // 3 of holder n % 3."""

    def __init__(self, paged: zoo.Paged) -> None:
        self.first = paged.store.kv_blocks
        self.spec = paged.decoder.spec
        self.stores = [
            KvStore(self.spec, paged.decoder.blocks, 32, zoo.BLOCK_TOKENS, paged.dtype, "cpu")
            for _ in range(HOLDERS)
        ]
        self.asked: list[PartialAsk] = []
        paged.store.remote = self

    def move(self, paged: zoo.Paged, table: list[int], index: int, number: int) -> None:
        """Move the index-th block of a table away; what it leaves behind must not be looked at."""
        holder, place = number % HOLDERS, number // HOLDERS
        content = paged.store.read_blocks([table[index]])
        self.stores[holder].write_blocks([place], content)
        paged.store.extents[table[index]] = float("nan")
        table[index] = self.first + number

    def ask(self, asked: PartialAsk) -> "NearbyHolders":
        self.asked.append(asked)
        return self

    def take(self) -> Sequence[Partial]:
        asked = self.asked[-1]
        numbers = [kv_block - self.first for kv_block in asked.kv_blocks]
        spec = self.spec.blocks[asked.block].attention
        parts = []
        for holder in dict.fromkeys(number % HOLDERS for number in numbers):
            mine = [index for index, number in enumerate(numbers) if number % HOLDERS == holder]
            store = self.stores[holder]
            positions = range(asked.position, asked.position + len(asked.query))
            kv_heads = spec.heads if spec.latent else spec.kv_heads
            shard = plan_shard(
                store,
                Reach.of(spec),
                kv_heads,
                asked.query.dtype,
                [numbers[index] // HOLDERS for index in mine],
                [asked.starts[index] for index in mine],
                positions,
            )
            parts.append(attend_shard(store, shard, store.blocks.index(asked.block), asked.query, spec))
        return parts


def logits(tiny: zoo.TinyCheckpoint, cuts: Sequence[int], away: float) -> torch.Tensor:
    """All logits of a prompt that comes in chunks; after each, full blocks move away, the oldest and some others."""
    prompt = zoo.prompt(90)
    paged = zoo.Paged(tiny.decoder)
    holders = NearbyHolders(paged)
    table = paged.table(len(prompt))
    plain = zoo.prompt(20, seed=1)
    plain_table = paged.table(len(plain))
    paged.run(zoo.chunk(plain, 0, 10, plain_table))
    generator = torch.Generator().manual_seed(0)
    results, moved = [], 0
    for start, stop in zip([0, *cuts], [*cuts, len(prompt)], strict=True):
        chunks = [zoo.chunk(prompt, start, stop, table)]
        if start == cuts[0]:  # one that has all its blocks here shares the step
            chunks.append(zoo.chunk(plain, 10, 20, plain_table))
        found = paged.run(*chunks)
        results.append(found[: stop - start])
        for index in range(stop // zoo.BLOCK_TOKENS):
            leaves = index == 0 or torch.rand(1, generator=generator).item() < away
            if away and leaves and table[index] < paged.store.kv_blocks:
                holders.move(paged, table, index, moved)
                moved += 1
    assert bool(moved) == bool(holders.asked) == bool(away)
    return torch.cat(results)


def test_logits_are_those_of_one_machine(tiny: zoo.TinyCheckpoint) -> None:
    cuts = [33, 70, 71, 72, 88, 89]
    # Sums of float32 in another order; a router between near equals might choose otherwise, but none here does.
    assert zoo.difference(logits(tiny, cuts, away=0.7), logits(tiny, cuts, away=0.0)) < 2e-5


def test_one_token_is_attended_with_its_whole_past_elsewhere(tiny_checkpoints) -> None:
    """Nothing is left here but the block that is being filled."""
    for name in ("llama", "deepseek_v3"):
        tiny = tiny_checkpoints(name)
        cuts = [80, 81]
        assert zoo.difference(logits(tiny, cuts, away=1.0), logits(tiny, cuts, away=0.0)) < 2e-5
