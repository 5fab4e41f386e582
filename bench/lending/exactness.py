"""Requests that are longer than the pool they run in, while their blocks move: have they the right tokens?"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lending.asking import OneMachine, Wish, ask
from lending.small_pools import SmallPools

POOLS = {"debtor": 32, "first": 96, "second": 96}
PINNED = {"pinned": ["debtor"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """One answer. `margin`: where the tokens first differ, how far apart the two likeliest were (greedy only)."""

    prompt_tokens: int
    answer_tokens: int
    sampled: bool
    pool_tokens: int
    moved_blocks: int
    same_tokens: bool
    first_other: int | None
    margin: float | None
    error: str


def exactness(swarm: SmallPools, one: OneMachine, offsets: int, long_requests: int) -> list[Exact]:
    """Prompts just within the pool at every offset, so that all moves fall into the answer; then very long ones."""
    pool_tokens = 16 * POOLS["debtor"]
    near = [
        Wish(
            number=offset,
            prompt_tokens=pool_tokens - 40 + offset * 16 // offsets,
            answer_tokens=300,
            seed=offset if offset % 2 else None,
        )
        for offset in range(offsets)
    ]
    far = [
        Wish(
            number=1000 + turn,
            prompt_tokens=2300 + 7 * turn,
            answer_tokens=400,
            seed=turn if turn % 2 else None,
        )
        for turn in range(long_requests)
    ]
    runs: list[Exact] = []
    for pair in (*zip(near[::2], near[1::2], strict=True), *((wish,) for wish in far)):
        before = moved_blocks(swarm)
        with ThreadPoolExecutor(len(pair)) as pool:
            answers = list(pool.map(lambda wish: ask(swarm.origin, wish, route=PINNED), pair))
        swarm.wait_free()
        moved = moved_blocks(swarm) - before
        for wish, answer in zip(pair, answers, strict=True):
            right = one.tokens(wish)
            other = first_difference(answer.token_ids, right)
            runs.append(
                Exact(
                    prompt_tokens=wish.prompt_tokens,
                    answer_tokens=wish.answer_tokens,
                    sampled=wish.seed is not None,
                    pool_tokens=pool_tokens,
                    moved_blocks=moved,
                    same_tokens=answer.token_ids == right,
                    first_other=other,
                    margin=one.margin(wish, other) if other is not None and wish.seed is None else None,
                    error=answer.error,
                )
            )
            said = "same tokens" if runs[-1].same_tokens else f"OTHER from {other}: {answer.error}"
            print(f"exact {wish.prompt_tokens:5} + {wish.answer_tokens} moved {moved:4} {said}", flush=True)
    return runs


def moved_blocks(swarm: SmallPools) -> int:
    """Blocks that all machines have moved out since they started."""
    return sum(swarm.loans(name)["moved_out_total"] for name in swarm.pools)


def first_difference(some: list[int], right: list[int]) -> int | None:
    """Where two answers first differ; None where one only goes on longer, or they are equal."""
    return next((place for place, (a, b) in enumerate(zip(some, right, strict=False)) if a != b), None)
