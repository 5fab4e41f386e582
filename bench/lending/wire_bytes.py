"""Bytes that creditors get and send for each token of an answer, beside DistAttention's formula.

Two answers to one prompt, one of which goes on longer: what the creditors' links carried more in the longer one, less
the blocks that moved and what machines say to each other anyway, is what the tokens between took.
"""

import time
from dataclasses import dataclass, fields

from lending.asking import Wish, ask
from lending.model import Shape
from lending.small_pools import ANNOUNCE_S, BLOCK_TOKENS, SmallPools

PINNED = {"pinned": ["debtor"]}
SHORT_TOKENS, LONG_TOKENS = 64, 448
IDLE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """For one token of an answer, over all holders; the formula is for `holders`, in float32.

    `out_bytes` and `back_bytes`: on the links, less what they carry idle, which is rough, as probes are among it.
    `query_bytes` and `part_bytes`: the tensors alone, as the debtor counts them.
    """

    context_tokens: int
    holders: int
    out_bytes: float
    back_bytes: float
    query_bytes: float
    part_bytes: float
    formula_out_bytes: int
    formula_back_bytes: int
    ring_bytes: float
    moved_blocks: int
    error: str


@dataclass(frozen=True, slots=True)
class _Meter:
    """What creditors had received and sent, and the debtor had asked, got and moved, by a moment."""

    at_s: float
    received_bytes: int
    sent_bytes: int
    query_bytes: int
    part_bytes: int
    moved_blocks: int

    def since(self, before: "_Meter") -> "_Meter":
        return _Meter(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))


def bytes_a_token(swarm: SmallPools, shape: Shape, prompt_tokens: int, number: int) -> TokenBytes:
    """Measure one prompt; the pools must be idle."""
    creditors = [name for name in swarm.pools if name != "debtor"]
    began = _after(swarm, creditors, 3 * ANNOUNCE_S)
    idle = _after(swarm, creditors, IDLE_S).since(began)
    short = _one(
        swarm, creditors, Wish(number=number, prompt_tokens=prompt_tokens, answer_tokens=SHORT_TOKENS)
    )
    long = _one(swarm, creditors, Wish(number=number, prompt_tokens=prompt_tokens, answer_tokens=LONG_TOKENS))
    tokens = LONG_TOKENS - SHORT_TOKENS
    context_tokens = prompt_tokens + (SHORT_TOKENS + LONG_TOKENS) // 2
    more = long.meter.since(short.meter)
    block_bytes = BLOCK_TOKENS * shape.kv_bytes_per_token
    idles = more.at_s / idle.at_s
    received = more.received_bytes - idles * idle.received_bytes - more.moved_blocks * block_bytes
    sent = more.sent_bytes - idles * idle.sent_bytes
    per_holder = shape.blocks * shape.heads * 4
    return TokenBytes(
        context_tokens=context_tokens,
        holders=long.holders,
        out_bytes=received / tokens,
        back_bytes=sent / tokens,
        query_bytes=more.query_bytes / tokens,
        part_bytes=more.part_bytes / tokens,
        formula_out_bytes=long.holders * per_holder * shape.head_dim,
        formula_back_bytes=long.holders * per_holder * (shape.head_dim + 2),
        ring_bytes=(context_tokens - BLOCK_TOKENS * swarm.pools["debtor"]) * shape.kv_bytes_per_token,
        moved_blocks=more.moved_blocks,
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
    return _Answered(after.since(before), holders[0], answer.error)


def _after(swarm: SmallPools, creditors: list[str], seconds: float) -> _Meter:
    time.sleep(seconds)
    return _read(swarm, creditors)


def _read(swarm: SmallPools, creditors: list[str]) -> _Meter:
    seen = [swarm.machine(name) for name in creditors]
    debtor = swarm.loans("debtor")
    return _Meter(
        time.monotonic(),
        sum(each["received_bytes"] for each in seen),
        sum(each["sent_bytes"] for each in seen),
        *(debtor[counter] for counter in ("query_bytes_total", "part_bytes_total", "moved_out_total")),
    )
