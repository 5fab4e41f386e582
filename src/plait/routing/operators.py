"""What an evolutionary search does to chains: draw, cross, mutate, repair.

A genome is a path: servers in order, by number. Under PETALS' exit rule the list alone fixes the cut points, and
every operator joins paths only where a server holds the block that is next, so each result covers every block once,
in order.
"""

from collections.abc import Iterable

import numpy as np

from plait.routing.graph import ChainGraph, Floats, Ints
from plait.routing.random_walk import random_walk
from plait.routing.sweep import Path


class PathOperators:
    """The operators on one graph. `block_cost`: what breaks ties between holders when a gap is filled, [servers]."""

    def __init__(self, graph: ChainGraph, block_cost: Floats) -> None:
        self._graph = graph
        self._block_cost = block_cost
        self._end = graph.end.tolist()
        self._start = graph.start.tolist()
        self._holders: dict[int, Ints] = {}

    def draw(self, rng: np.random.Generator) -> Path:
        """PETALS' random walk."""
        return random_walk(self._graph, rng)

    def cross(self, first: Path, second: Path, rng: np.random.Generator) -> tuple[Path, Path]:
        """Cut both at a boundary they share and swap the tails; else graft each onto a beginning of the other."""
        ends = {self._end[server]: place + 1 for place, server in enumerate(second[:-1])}
        shared = [
            (place + 1, ends[self._end[server]])
            for place, server in enumerate(first[:-1])
            if self._end[server] in ends
        ]
        if shared:
            here, there = shared[int(rng.integers(len(shared)))]
            return first[:here] + second[there:], second[:there] + first[here:]
        return self._graft(first, second, rng), self._graft(second, first, rng)

    def _graft(self, stem: Path, scion: Path, rng: np.random.Generator) -> Path:
        return self.rejoin(stem[: int(rng.integers(1, len(stem) + 1))], scion)

    def mutate(self, path: Path, rng: np.random.Generator) -> Path:
        """Half the time another holder takes a hop, three times in ten the tail is drawn anew, else a hop is
        stretched: the holder that reaches furthest takes it."""
        place = int(rng.integers(len(path)))
        kept = path[:place]
        draw = rng.random()
        if 0.5 <= draw < 0.8:
            return random_walk(self._graph, rng, kept)
        holders = self.holders(self._boundary(kept))
        if draw < 0.5:
            others = holders[holders != path[place]]
            if len(others) == 0:
                return path
            server = int(others[int(rng.integers(len(others)))])
        else:
            server = int(holders[-1])  # servers are numbered by their ends
        return self.rejoin((*kept, server), path)

    def rejoin(self, stem: Path, scion: Path) -> Path:
        """Continue `stem` with those servers of `scion`, a whole chain, that hold the block which is next."""
        path, boundary = list(stem), self._boundary(stem)
        for server in scion:
            if self._start[server] <= boundary < self._end[server]:
                path.append(server)
                boundary = self._end[server]
        assert boundary == self._graph.blocks.stop, "a whole chain holds every block"
        return tuple(path)

    def repair(self, genes: Iterable[int]) -> Path:
        """Make a chain of any list of servers.

        Those that end before the next block are skipped, gaps are filled with the holder that is cheapest by block,
        and nothing follows the last block.
        """
        path: list[int] = []
        boundary, stop = self._graph.blocks.start, self._graph.blocks.stop

        def take(server: int) -> None:
            nonlocal boundary
            path.append(server)
            boundary = self._end[server]

        for server in genes:
            while boundary < self._start[server]:
                take(self._cheapest(boundary))
            if boundary < self._end[server]:
                take(server)
        while boundary < stop:
            take(self._cheapest(boundary))
        return tuple(path)

    def _cheapest(self, block: int) -> int:
        holders = self.holders(block)
        return int(holders[self._block_cost[holders].argmin()])

    def holders(self, block: int) -> Ints:
        """Servers that hold a block, in the order of their ends."""
        if block not in self._holders:
            self._holders[block] = self._graph.holders(block)
        return self._holders[block]

    def _boundary(self, path: Path) -> int:
        return self._end[path[-1]] if path else self._graph.blocks.start
