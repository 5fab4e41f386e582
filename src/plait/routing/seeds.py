"""Chains to begin a search with: the shortest by each objective, and by several points between two of them."""

import itertools
from collections.abc import Sequence

import numpy as np

from plait.routing.costs import Cost, SumCost
from plait.routing.graph import ChainGraph
from plait.routing.path_values import PathValues
from plait.routing.sweep import Path, edges, limited, shortest_path, steps, weighed

SEEDS = 32  # fewer leave more than a hundredth of the exact hypervolume in swarms of 1,000: bench/routing.py


def seed_paths(graph: ChainGraph, costs: Sequence[Cost], count: int = SEEDS) -> tuple[Path, ...]:
    """Distinct paths, `count` between each two costs at most.

    Two sums are weighed against each other, as shares of what separates their best chains. Of a sum and a
    bottleneck, the sum is minimised over the hops whose bottleneck is within a limit.
    """
    laid = [edges(graph, cost) for cost in costs]
    best = [shortest_path(graph, one)[1] for one in laid]
    values = PathValues(graph).values(costs, best)
    extent = np.ptp(values, axis=0)
    found = list(best)
    for one, other in itertools.combinations(range(len(costs)), 2):
        if isinstance(costs[one], SumCost) and isinstance(costs[other], SumCost):
            if extent[one] > 0 and extent[other] > 0:
                for share in steps(0, 1, count + 2)[1:-1]:
                    weights = np.array([share / extent[one], (1 - share) / extent[other]])
                    found.append(shortest_path(graph, weighed([laid[one], laid[other]], weights))[1])
            continue
        summed, narrow = (one, other) if isinstance(costs[one], SumCost) else (other, one)
        low, high = values[:, narrow].min(), values[:, narrow].max()
        if low < high:
            for limit in steps(low, high, count + 1)[:-1]:
                total, path = shortest_path(graph, limited(laid[summed], laid[narrow], limit))
                if np.isfinite(total):
                    found.append(path)
    return tuple(dict.fromkeys(found))
