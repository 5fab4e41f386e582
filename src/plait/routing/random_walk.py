"""Mode `throughput`: PETALS' max_throughput, a random walk."""

import numpy as np

from plait.routing.graph import ChainGraph
from plait.routing.sweep import Path

UNREACHABLE_WEIGHT = 1e-6  # PETALS


def random_walk(graph: ChainGraph, rng: np.random.Generator, path: Path = ()) -> Path:
    """Continue a path to the last block.

    At each boundary a holder of the next block is drawn with a probability proportional to the length of its whole
    span, or 1e-6 if the client's ping of it failed, and runs to its span's end.
    """
    boundary = int(graph.end[path[-1]]) if path else graph.blocks.start
    while boundary < graph.blocks.stop:
        holders = graph.holders(boundary)
        weights = np.where(graph.unreachable[holders], UNREACHABLE_WEIGHT, graph.span_blocks[holders])
        server = int(holders[np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right")])
        path = (*path, server)
        boundary = int(graph.end[server])
    return path
