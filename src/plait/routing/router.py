"""What is kept between two choices: graphs, fronts, and the sessions that no record counts yet."""

from collections.abc import Callable, Iterable

import numpy as np

from plait.cluster import SwarmView
from plait.ids import PeerId
from plait.routing.chain import Front, Routed
from plait.routing.choose import (
    NOBODY,
    FoundFront,
    Place,
    front_of,
    graph_of,
    has_front,
    leaves_early,
    pick_from,
    single_chain,
)
from plait.routing.costs import cache_is_short
from plait.routing.graph import ChainGraph
from plait.routing.wish import RouteWish

MAX_KEPT = 64


class Router:
    """Chooses chains for one member of the swarm, and keeps what the next choice can use.

    A graph holds for one view, one place and one way to look up delays; a front for one graph, the wish's
    objectives and limits, and the same small caches. They are dropped when the view's version changes; the last
    front of the same blocks then seeds the next search. A session counts at its peers from the choice on, until
    they announce anew.
    """

    def __init__(self) -> None:
        self._version = -1
        self._graphs: dict[tuple[Place, bool, bool], ChainGraph] = {}
        self._fronts: dict[tuple[object, ...], FoundFront] = {}
        self._last_fronts: dict[range, Front] = {}
        self._given: dict[PeerId, tuple[int, int]] = {}  # sequence of the peer's record, sessions since

    def choose(
        self,
        view: SwarmView,
        blocks: range,
        wish: RouteWish,
        *,
        rng: np.random.Generator,
        without: frozenset[PeerId] = NOBODY,
        after: PeerId | None = None,
        before: PeerId | None = None,
        deadline: Callable[[], bool] = lambda: False,
    ) -> Routed:
        """As `choose_chain`, from what is kept; the session counts at the chosen peers at once."""
        if view.version != self._version or len(self._graphs) + len(self._fronts) > MAX_KEPT:
            self._version = view.version
            self._graphs.clear()
            self._fronts.clear()
        place = Place(blocks=blocks, without=without, after=after, before=before)
        key = (place, wish.mode == "load", leaves_early(wish))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = graph_of(view, place, wish)
        if has_front(wish):
            routed = pick_from(self._front(graph, place, wish, rng, deadline), wish, rng)
        else:
            routed = single_chain(view, graph, place, wish, rng=rng, unannounced=self._unannounced(view))
        self._count(view, (hop.peer for hop in routed.chain), 1)
        return routed

    def _front(
        self,
        graph: ChainGraph,
        place: Place,
        wish: RouteWish,
        rng: np.random.Generator,
        deadline: Callable[[], bool],
    ) -> FoundFront:
        small_caches = cache_is_short(graph, wish.need_tokens).tobytes()
        limits = (wish.max_hops, wish.evaluations, wish.slack_fraction, wish.early_exits)
        # Of the length of a session only the probability of a failure depends otherwise.
        length = wish.need_tokens if "failure" in wish.objectives else 0
        key = (place, wish.mode, wish.objectives, limits, small_caches, length)
        found = self._fronts.get(key)
        if found is None:
            known = self._last_fronts.get(place.blocks)
            same = known is not None and known.objectives == wish.objectives
            found = front_of(
                graph,
                wish,
                rng=rng,
                known=known if same else None,
                repairs=len(place.without) > 0,
                deadline=deadline,
            )
            if not deadline():
                self._fronts[key] = found
            if len(self._last_fronts) > MAX_KEPT:
                self._last_fronts.clear()
            if not place.without:
                self._last_fronts[place.blocks] = found.front
        return found

    def _unannounced(self, view: SwarmView) -> dict[PeerId, int]:
        return {
            peer: sessions
            for peer, (sequence, sessions) in self._given.items()
            if peer in view.records and view.records[peer].sequence == sequence
        }

    def ended(self, view: SwarmView, peers: Iterable[PeerId]) -> None:
        """A session that this router gave to these peers is over; they announce it a little longer."""
        self._count(view, peers, -1)

    def _count(self, view: SwarmView, peers: Iterable[PeerId], change: int) -> None:
        given = self._unannounced(view)
        for peer in peers:
            if peer in view.records:
                given[peer] = given.get(peer, 0) + change
        self._given = {peer: (view.records[peer].sequence, sessions) for peer, sessions in given.items()}
