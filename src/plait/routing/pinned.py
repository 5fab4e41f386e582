"""Mode `pinned`: the peers that somebody named, in their order."""

from plait.cluster import SwarmView
from plait.errors import BadRequest, NoRoute
from plait.ids import PeerId
from plait.routing.graph import ChainGraph
from plait.routing.sweep import Path


def pinned_path(view: SwarmView, graph: ChainGraph, peers: tuple[PeerId, ...]) -> Path:
    """The path over the given peers, each from where the one before it ends to the end of its span.

    Raises:
        BadRequest: a peer is unknown, does not hold the next block, or the blocks do not last for all of them.
        NoRoute: a peer is known but does not serve now.
    """
    numbers = {record.peer: number for number, record in enumerate(graph.records)}
    path: list[int] = []
    boundary = graph.blocks.start
    for peer in peers:
        if peer not in view.records:
            raise BadRequest(f"pinned peer {peer!r} is not in this swarm", param="route")
        record = view.records[peer]
        label = f"pinned peer {record.name!r} ({peer[:8]})"
        if record.state != "online":
            raise NoRoute(f"{label} is {record.state}; name another, or let the swarm choose")
        if boundary >= graph.blocks.stop:
            raise BadRequest(f"the chain ends before {label}: leave it out", param="route")
        if boundary not in record.span:
            raise BadRequest(
                f"{label} holds blocks {record.first_block}:{record.end_block}, but block {boundary} is next",
                param="route",
            )
        if peer not in numbers:
            raise NoRoute(f"{label} is avoided after a failure; name another, or retry later")
        path.append(numbers[peer])
        boundary = int(graph.end[numbers[peer]])
    if boundary < graph.blocks.stop:
        raise BadRequest(
            f"the pinned peers cover blocks {graph.blocks.start}:{boundary}, but not those up to "
            f"{graph.blocks.stop}; name a peer that holds block {boundary}",
            param="route",
        )
    return tuple(path)
