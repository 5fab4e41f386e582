"""Where a chain stands beside the front, whichever mode chose it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from plait.cluster import SwarmView
from plait.routing.chain import Chain, Front
from plait.routing.choose import Place, front_of, graph_of
from plait.routing.objectives import objectives_on
from plait.routing.path_values import PathValues
from plait.routing.wish import RouteWish


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The exact front of some objectives, and the values that a chain has in them."""

    front: Front
    values: tuple[float, ...]


def standing_of(
    view: SwarmView,
    blocks: range,
    chain: Chain,
    wish: RouteWish,
    *,
    deadline: Callable[[], bool] = lambda: False,
) -> Standing:
    """Compare a chain that was chosen from this view, by any mode, with the front of the wish's objectives.

    `deadline` says when time is up: the front is then not all of it.

    Raises:
        NoRoute: every chain of the front has more than `max_hops` hops.
    """
    # With early exits, so that no chain of mode `load` is missing.
    wish = replace(wish, mode="exact", pinned=(), early_exits=True)
    graph = graph_of(view, Place(blocks=blocks), wish)
    objectives = objectives_on(graph, wish.objectives, wish.need_tokens)
    numbers = {(record.peer, int(graph.end[number])): number for number, record in enumerate(graph.records)}
    path = tuple(numbers[hop.peer, hop.span.stop] for hop in chain)
    values = objectives.natural(objectives.minimised(PathValues(graph).values(objectives.costs, [path])))
    front = front_of(graph, wish, rng=np.random.default_rng(0), deadline=deadline).front
    return Standing(front=front, values=tuple(float(value) for value in values[0]))
