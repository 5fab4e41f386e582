"""Shortest chains: one sweep over the boundaries, forwards or backwards.

The graph has no cycle (the block index only grows), so a shortest path needs no heap: every server that ends at a
boundary is final once the boundaries before it are done. Servers are sorted by their ends, so all edges of a
boundary are one small matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.routing.costs import Cost, SumCost, entering_costs, leaving_costs, stage_costs
from plait.routing.graph import ChainGraph, Floats, Ints

Path = tuple[int, ...]
"""Servers in order, by their numbers in the graph."""


@dataclass(frozen=True, slots=True)
class Edges:
    """One cost laid out on the graph: [entering]; [arriving or 1, holding] for each stage; [leaving]."""

    entering: Floats
    stages: tuple[Floats, ...]
    leaving: Floats
    join: np.ufunc


def edges(graph: ChainGraph, cost: Cost) -> Edges:
    """Lay a cost out on the graph, for several sweeps."""
    return Edges(
        entering=entering_costs(graph, cost),
        stages=tuple(stage_costs(graph, cost, stage) for stage in range(len(graph.stages))),
        leaving=leaving_costs(graph, cost),
        join=np.add if isinstance(cost, SumCost) else np.maximum,
    )


def shortest_path(
    graph: ChainGraph, laid: Edges, *, to_go: Floats | None = None, limit: float = np.inf
) -> tuple[float, Path]:
    """The chain of least cost (infinite where `limited` leaves none); ties go to the lower number at each step
    back.

    Chains of sums above `limit` need not be found: with `to_go`, what the rest of a chain costs at least from each
    server, those that would come to more are not followed (as in A*).
    """
    best = np.full(graph.servers, np.inf)
    before = np.full(graph.servers, -1, dtype=np.intp)
    best[graph.entering] = laid.entering
    for stage, hops in zip(graph.stages, laid.stages, strict=True):
        so_far = best[stage.arriving]
        arriving: Ints = np.arange(stage.arriving.start, stage.arriving.stop, dtype=np.intp)
        if to_go is not None:
            promising = (so_far + to_go[stage.arriving] <= limit).nonzero()[0]
            if len(promising) == 0:
                continue
            so_far, arriving = so_far[promising], arriving[promising]
            hops = hops if len(hops) == 1 else hops[promising]
        totals = laid.join(so_far[:, None], hops)  # [arriving, holding]
        choice = totals.argmin(axis=0)
        value = totals[choice, np.arange(len(stage.holding))]
        better = value < best[stage.holding]
        servers = stage.holding[better]
        best[servers] = value[better]
        before[servers] = arriving[choice[better]]
    totals = laid.join(best[graph.leaving], laid.leaving)
    last = int(totals.argmin())
    path = [graph.leaving.start + last]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return float(totals[last]), tuple(reversed(path))


@dataclass(frozen=True, slots=True)
class WaysToGo:
    """From each server's end to the end of the range, the way that is cheapest by one measure.

    `measure`: what it costs, [servers]. `costs`: what it costs in every objective, [servers, objectives].
    `following`: the next server, -1 at the end.
    """

    measure: Floats
    costs: Floats
    following: Ints


def ways_to_go(graph: ChainGraph, measure: Edges, objectives: Sequence[Edges]) -> WaysToGo:
    """Sweep backwards by one measure and carry the costs in all objectives along."""
    to_go = np.full(graph.servers, np.inf)
    costs = np.full((graph.servers, len(objectives)), np.inf)
    following = np.full(graph.servers, -1, dtype=np.intp)
    to_go[graph.leaving] = measure.leaving
    for column, objective in enumerate(objectives):
        costs[graph.leaving, column] = objective.leaving
    for number in range(len(graph.stages) - 1, -1, -1):
        stage = graph.stages[number]
        totals = measure.join(measure.stages[number], to_go[stage.holding])  # [arriving or 1, holding]
        choice = totals.argmin(axis=1)
        to_go[stage.arriving] = totals[np.arange(len(totals)), choice]
        if len(choice) == 1:  # the same for all who arrive
            choice = np.repeat(choice, stage.arriving.stop - stage.arriving.start)
        chosen = stage.holding[choice]
        following[stage.arriving] = chosen
        for column, objective in enumerate(objectives):
            hops = objective.stages[number]
            picked = hops[0, choice] if len(hops) == 1 else hops[np.arange(len(choice)), choice]
            costs[stage.arriving, column] = objective.join(picked, costs[chosen, column])
    return WaysToGo(measure=to_go, costs=costs, following=following)


def weighed(objectives: Sequence[Edges], weights: Floats) -> Edges:
    """The weighted sum of those objectives that have a weight; all of them must be sums."""
    terms = [(weight, objective) for weight, objective in zip(weights, objectives, strict=True) if weight]
    return Edges(
        entering=_total([weight * objective.entering for weight, objective in terms]),
        stages=tuple(
            _total([weight * objective.stages[number] for weight, objective in terms])
            for number in range(len(objectives[0].stages))
        ),
        leaving=_total([weight * objective.leaving for weight, objective in terms]),
        join=np.add,
    )


def limited(objective: Edges, other: Edges, limit: float) -> Edges:
    """An objective with the hops left out that exceed a limit in another one."""
    return Edges(
        entering=np.where(other.entering <= limit, objective.entering, np.inf),
        stages=tuple(
            np.where(costs <= limit, hops, np.inf)
            for hops, costs in zip(objective.stages, other.stages, strict=True)
        ),
        leaving=objective.leaving,
        join=objective.join,
    )


def steps(low: float, high: float, count: int) -> list[float]:
    """`count` even steps from one value to another, both included."""
    return [low + (high - low) * step / (count - 1) for step in range(count)]


def _total(terms: Sequence[Floats]) -> Floats:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
