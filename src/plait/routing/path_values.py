"""What given paths cost: the plain sum over hops, for many paths at once."""

from collections.abc import Sequence

import numpy as np

from plait.routing.costs import Cost, SumCost
from plait.routing.graph import ChainGraph, Floats, Ints
from plait.routing.sweep import Path


class PathValues:
    """Evaluates paths on one graph."""

    def __init__(self, graph: ChainGraph) -> None:
        self._graph = graph
        stages = graph.stages
        self._stage_of = np.full(graph.servers, len(stages))
        self._row_offset = np.zeros(graph.servers, dtype=np.intp)
        offset = 0
        for number, stage in enumerate(stages):
            rows, columns = stage.delay_s.shape
            self._stage_of[stage.arriving] = number
            self._row_offset[stage.arriving] = offset + columns * np.arange(rows)
            offset += rows * columns
        none = np.empty(0)
        self._delay_s = np.concatenate([none, *(stage.delay_s.ravel() for stage in stages)])
        # (stage, server that holds its boundary) as one sorted number, so that a column is found by bisection.
        self._places = np.concatenate(
            [none.astype(np.intp), *(n * graph.servers + stage.holding for n, stage in enumerate(stages))]
        )
        counts = [0, *(len(stage.holding) for stage in stages)]
        self._first_place = np.cumsum(counts)

    def delays_s(self, senders: Ints, receivers: Ints) -> Floats:
        """One way, between servers of which the second holds the block where the first one ends."""
        stages = self._stage_of[senders]
        place = np.searchsorted(self._places, stages * self._graph.servers + receivers)
        return self._delay_s[self._row_offset[senders] + place - self._first_place[stages]]

    def values(self, costs: Sequence[Cost], paths: Sequence[Path]) -> Floats:
        """[paths, costs]."""
        graph = self._graph
        hops = np.array([server for path in paths for server in path], dtype=np.intp)
        lengths = np.array([len(path) for path in paths], dtype=np.intp)
        firsts = np.cumsum(lengths) - lengths
        lasts = firsts + lengths - 1
        begins = np.concatenate([[0], graph.end[hops[:-1]]])
        begins[firsts] = graph.blocks.start
        used = (graph.end[hops] - begins).astype(np.float64)
        inner = np.ones(len(hops), dtype=bool)
        inner[firsts] = False
        delay_s = np.zeros(len(hops))
        delay_s[inner] = self.delays_s(hops[:-1][inner[1:]], hops[inner])
        columns: list[Floats] = []
        for cost in costs:
            if isinstance(cost, SumCost):
                each = cost.delay_weight * delay_s + cost.arrive[hops] + used * cost.per_block[hops]
                each[firsts] += cost.entry[hops[firsts]]
                columns.append(np.add.reduceat(each, firsts) + cost.exit[hops[lasts]])
            else:
                each = -np.minimum(cost.rate_per_block[hops] / used, cost.rate_limit[hops])
                columns.append(np.maximum.reduceat(each, firsts))
        return np.stack(columns, axis=1)
