"""How much of the held memory is useful, and what the scheduler has done so far."""

from collections.abc import Iterable
from dataclasses import dataclass

from plait.scheduling.request import ScheduledRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUsage:
    """Tokens for which KV memory is held, and those of them that are computed; shared blocks count once."""

    held_tokens: int
    useful_tokens: int

    @property
    def useful_fraction(self) -> float:
        """Useful part of the held memory; 1 if none is held."""
        return self.useful_tokens / self.held_tokens if self.held_tokens else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCounts:
    """Gauges of now, and totals (`_total`) since the start.

    `resting_requests` are fed ones without anything to compute or blocks here. `swapped_requests` are among those that
    wait or rest. A prefix query counts the prompt tokens of a request
    when it is first admitted, a hit those of them found in the cache.
    """

    running_requests: int
    running_sequences: int
    waiting_requests: int
    resting_requests: int
    swapped_requests: int
    kv_blocks: int
    used_kv_blocks: int
    free_kv_blocks: int
    cached_kv_blocks: int
    host_kv_blocks: int
    used_host_kv_blocks: int
    preemptions_total: int
    swaps_total: int
    prefix_query_tokens_total: int
    prefix_hit_tokens_total: int


def kv_usage(running: Iterable[ScheduledRequest], block_tokens: int) -> KvUsage:
    """Measure the memory held by running requests; walks every block table."""
    filled: dict[int, int] = {}
    reserved_blocks = 0
    for request in running:
        reserved_blocks += len(request.reserve)
        for sequence in request.live:
            left = sequence.computed_tokens
            for block in sequence.kv_blocks:
                filled[block] = max(filled.get(block, 0), min(max(left, 0), block_tokens))
                left -= block_tokens
    held_tokens = (len(filled) + reserved_blocks) * block_tokens
    return KvUsage(held_tokens=held_tokens, useful_tokens=sum(filled.values()))
