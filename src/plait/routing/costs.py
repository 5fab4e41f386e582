"""What a hop costs, in each of the quantities that a chain may be chosen for.

Two kinds decompose over hops, so that exact search is possible: sums (seconds, joules, money) and bottlenecks (the
slowest hop's rate). All are minimised; a rate counts as its negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from plait.routing.graph import ChainGraph, Floats, Ints

SERIALISATION_S = 0.018  # PETALS: overhead of every hop into a server
DEFAULT_DECODE_TOKENS_PER_S = 300.0  # PETALS: inference_rps of a server that does not announce one
CACHE_PENALTY_S = 10.0  # PETALS: for a server whose free cache is too small
RELAYED_NETWORK_FRACTION = 0.2  # PETALS: of the network rate is left through a relay


@dataclass(frozen=True, slots=True)
class SumCost:
    """The sum over hops of `delay_weight` times the link's delay, `arrive[server]`, and `per_block[server]` for each
    block run, plus the links from and to whoever drives the chain. All arrays are [servers]."""

    delay_weight: float
    entry: Floats
    arrive: Floats
    per_block: Floats
    exit: Floats

    def __add__(self, other: "SumCost") -> "SumCost":
        return SumCost(
            delay_weight=self.delay_weight + other.delay_weight,
            entry=self.entry + other.entry,
            arrive=self.arrive + other.arrive,
            per_block=self.per_block + other.per_block,
            exit=self.exit + other.exit,
        )

    def times(self, factor: float) -> "SumCost":
        """The same cost, weighed."""
        return SumCost(
            delay_weight=self.delay_weight * factor,
            entry=self.entry * factor,
            arrive=self.arrive * factor,
            per_block=self.per_block * factor,
            exit=self.exit * factor,
        )


@dataclass(frozen=True, slots=True)
class BottleneckCost:
    """Minus the smallest rate of a hop: `rate_per_block[server]` over the blocks it runs, or `rate_limit[server]`."""

    rate_per_block: Floats
    rate_limit: Floats


Cost = SumCost | BottleneckCost


def entering_costs(graph: ChainGraph, cost: Cost) -> Floats:
    """Cost of a first hop, from its entry to its end: [entering]."""
    servers, used = graph.entering, graph.entering_used_blocks
    if isinstance(cost, SumCost):
        return cost.entry[servers] + cost.arrive[servers] + used * cost.per_block[servers]
    return _bottlenecks(cost, servers, used)


def stage_costs(graph: ChainGraph, cost: Cost, stage: int) -> Floats:
    """Cost of a hop at one boundary: [arriving, holding], or [1, holding] where who hands over makes no difference.

    Infinite where a server must not take over.
    """
    here = graph.stages[stage]
    if isinstance(cost, BottleneckCost):
        hops = _bottlenecks(cost, here.holding, here.used_blocks)[None, :]
    else:
        hops = (cost.arrive[here.holding] + here.used_blocks * cost.per_block[here.holding])[None, :]
        if cost.delay_weight != 0:
            hops = np.add(cost.delay_weight * here.delay_s, hops)
    return hops if here.barred is None else np.where(here.barred, np.inf, hops)


def leaving_costs(graph: ChainGraph, cost: Cost) -> Floats:
    """Cost of the way back from a last hop: [servers that leave]."""
    if isinstance(cost, SumCost):
        return cost.exit[graph.leaving]
    return np.full(len(graph.records[graph.leaving]), -np.inf)


def _bottlenecks(cost: BottleneckCost, servers: Ints, used_blocks: Floats) -> Floats:
    return -np.minimum(cost.rate_per_block[servers] / used_blocks, cost.rate_limit[servers])


# What PETALS counts (docs/systems/nsga2-chains.md; the study's pair A is network_s and compute_s, pair B step_s and
# rate)


def network_cost(graph: ChainGraph, need_tokens: int) -> SumCost:
    """Seconds per token on the network: delays, serialisation, and a penalty where the cache is too small."""
    return SumCost(
        delay_weight=1.0,
        entry=graph.entry_delay_s,
        arrive=np.where(cache_is_short(graph, need_tokens), CACHE_PENALTY_S, 0.0) + SERIALISATION_S,
        per_block=np.zeros(graph.servers),
        exit=graph.exit_delay_s,
    )


def cache_is_short(graph: ChainGraph, need_tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Where a session of `need_tokens` does not fit (0: unknown, which fits, as does an unknown cache): [servers].

    PETALS tests need * 2 * span length <= free cache, counted in key or value vectors of one block, where the span
    is the server's whole span though only a part may be used; `kv_free_tokens` is that count divided by 2 * span
    length.
    """
    loads = [record.load for record in graph.records]
    return np.array([load.kv_total_tokens > 0 and need_tokens > load.kv_free_tokens for load in loads])


def compute_cost(graph: ChainGraph) -> SumCost:
    """Seconds per token in the blocks."""
    return _per_block_cost(graph, seconds_per_block(graph))


def step_cost(graph: ChainGraph, need_tokens: int) -> SumCost:
    """PETALS' path cost: predicted seconds per generated token."""
    return network_cost(graph, need_tokens) + compute_cost(graph)


def rate_cost(graph: ChainGraph) -> BottleneckCost:
    """Minus the tokens per second that the chain's slowest hop takes in long batches."""
    rates = [record.rates for record in graph.records]
    relayed = np.array([record.relayed for record in graph.records])
    network = np.array([rate.network_tokens_per_s or np.inf for rate in rates])
    return BottleneckCost(
        rate_per_block=np.array([rate.prefill_tokens_per_s or DEFAULT_DECODE_TOKENS_PER_S for rate in rates]),
        rate_limit=network * np.where(relayed, RELAYED_NETWORK_FRACTION, 1.0),
    )


# What the study did not count


def price_cost(graph: ChainGraph) -> SumCost:
    """Money per million generated tokens: each machine is paid for the time it computes."""
    price_per_hour = np.array([record.terms.price_per_hour for record in graph.records])
    return _per_block_cost(graph, seconds_per_block(graph) * price_per_hour / 3600 * 1e6)


def energy_cost(graph: ChainGraph) -> SumCost:
    """Joules per generated token, spent in the blocks."""
    watts = np.array([record.terms.busy_watts for record in graph.records])
    return _per_block_cost(graph, seconds_per_block(graph) * watts)


def hazard_cost(graph: ChainGraph) -> SumCost:
    """Failures per second to be expected of the chain; a peer of unknown lifetime counts none."""
    lifetime_s = np.array([record.terms.mean_lifetime_s or np.inf for record in graph.records])
    return _per_server_cost(graph, 1 / lifetime_s)


def hops_cost(graph: ChainGraph) -> SumCost:
    """Number of hops."""
    return _per_server_cost(graph, np.ones(graph.servers))


def quantisation_cost(graph: ChainGraph, loss_by_format: Mapping[str, float]) -> SumCost:
    """Quality given up: the sum over blocks of the loss of the weight format that runs it (0 for a format not
    named)."""
    loss = np.array([loss_by_format.get(record.weight_format, 0.0) for record in graph.records])
    return _per_block_cost(graph, loss)


def seconds_per_block(graph: ChainGraph) -> Floats:
    """Time of one token through one block of each server, alone: [servers]."""
    return 1 / np.array(
        [record.rates.decode_tokens_per_s or DEFAULT_DECODE_TOKENS_PER_S for record in graph.records]
    )


def _per_block_cost(graph: ChainGraph, per_block: Floats) -> SumCost:
    none = np.zeros(graph.servers)
    return SumCost(delay_weight=0.0, entry=none, arrive=none, per_block=per_block, exit=none)


def _per_server_cost(graph: ChainGraph, arrive: Floats) -> SumCost:
    none = np.zeros(graph.servers)
    return SumCost(delay_weight=0.0, entry=none, arrive=arrive, per_block=none, exit=none)
