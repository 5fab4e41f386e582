"""Bytes that creditors get and send for each token of an answer, beside DistAttention's formula.

Two answers to one prompt, one of which goes on longer: what the creditors' links carried more in the longer one, less
the blocks that moved and what machines say to each other anyway, is what the tokens between took.
"""

import time
from dataclasses import dataclass

from lending.asking import Wish, ask
from lending.model import Shape
from lending.small_pools import ANNOUNCE_S, BLOCK_TOKENS, SmallPools

PINNED = {"pinned": ["debtor"]}
SHORT_TOKENS, LONG_TOKENS = 64, 448
IDLE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """For one token of an answer, over all holders; the formula is for `holders`, in float32."""

    context_tokens: int
    holders: int
    out_bytes: float
    back_bytes: float
    formula_out_bytes: int
    formula_back_bytes: int
    ring_bytes: float
    moved_blocks: int
    error: str


@dataclass(frozen=True, slots=True)
class _Meter:
    """What creditors had received and sent, and the debtor had moved, by a moment."""

    at_s: float
    received_bytes: int
    sent_bytes: int
    moved_blocks: int


def bytes_a_token(swarm: SmallPools, shape: Shape, prompt_tokens: int, number: int) -> TokenBytes:
    """Measure one prompt; the pools must be idle."""
    creditors = [name for name in swarm.pools if name != "debtor"]
    idle = _rates(_read(swarm, creditors), _after(swarm, creditors, IDLE_S))
    short = _one(
        swarm, creditors, Wish(number=number, prompt_tokens=prompt_tokens, answer_tokens=SHORT_TOKENS)
    )
    long = _one(swarm, creditors, Wish(number=number, prompt_tokens=prompt_tokens, answer_tokens=LONG_TOKENS))
    tokens = LONG_TOKENS - SHORT_TOKENS
    context_tokens = prompt_tokens + (SHORT_TOKENS + LONG_TOKENS) // 2
    moved = long.meter.moved_blocks - short.meter.moved_blocks
    more_s = long.meter.at_s - short.meter.at_s
    block_bytes = BLOCK_TOKENS * shape.kv_bytes_per_token
    received = long.meter.received_bytes - short.meter.received_bytes - idle[0] * more_s - moved * block_bytes
    sent = long.meter.sent_bytes - short.meter.sent_bytes - idle[1] * more_s
    per_holder = shape.blocks * shape.heads * 4
    return TokenBytes(
        context_tokens=context_tokens,
        holders=long.holders,
        out_bytes=received / tokens,
        back_bytes=sent / tokens,
        formula_out_bytes=long.holders * per_holder * shape.head_dim,
        formula_back_bytes=long.holders * per_holder * (shape.head_dim + 2),
        ring_bytes=(context_tokens - BLOCK_TOKENS * swarm.pools["debtor"]) * shape.kv_bytes_per_token,
        moved_blocks=moved,
        error="; ".join(filter(None, (short.error, long.error))),
    )


@dataclass(frozen=True, slots=True)
class _Answered:
    meter: _Meter
    holders: int
    error: str


def _one(swarm: SmallPools, creditors: list[str], wish: Wish) -> _Answered:
    """What one answer added to the meters."""
    before = _read(swarm, creditors)
    holders = [0]

    def on_tokens(count: int) -> None:
        if count == wish.answer_tokens - 8:
            holders[0] = sum(swarm.loans(name)["lent_blocks"] > 0 for name in creditors)

    answer = ask(swarm.origin, wish, on_tokens, route=PINNED)
    swarm.wait_free()
    after = _after(swarm, creditors, 3 * ANNOUNCE_S)
    spent = _Meter(
        after.at_s - before.at_s,
        after.received_bytes - before.received_bytes,
        after.sent_bytes - before.sent_bytes,
        after.moved_blocks - before.moved_blocks,
    )
    return _Answered(spent, holders[0], answer.error)


def _after(swarm: SmallPools, creditors: list[str], seconds: float) -> _Meter:
    time.sleep(seconds)
    return _read(swarm, creditors)


def _read(swarm: SmallPools, creditors: list[str]) -> _Meter:
    seen = [swarm.machine(name) for name in creditors]
    return _Meter(
        time.monotonic(),
        sum(each["received_bytes"] for each in seen),
        sum(each["sent_bytes"] for each in seen),
        swarm.loans("debtor")["moved_blocks_total"],
    )


def _rates(before: _Meter, after: _Meter) -> tuple[float, float]:
    seconds = after.at_s - before.at_s
    received = after.received_bytes - before.received_bytes
    return received / seconds, (after.sent_bytes - before.sent_bytes) / seconds
