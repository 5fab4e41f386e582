"""What is kept between two choices: graphs, fronts, and the sessions that no record counts yet."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
from plait.routing.costs import Cost, SumCost, cache_is_short
from plait.routing.graph import ChainGraph, Floats
from plait.routing.load import LoadTerms
from plait.routing.objectives import objectives_on
from plait.routing.wish import RouteWish

MAX_KEPT = 64
# A front holds while no delay of its graph has changed by more than both of these, and no other cost by more than the
# last: machines announce every few seconds, and what they measure is never twice the same.
NEAR_DELAY_FRACTION, NEAR_DELAY_S = 0.2, 0.002
NEAR_COST_FRACTION = 0.05


@dataclass(frozen=True, slots=True)
class _Kept:
    """A front, and what it was made from."""

    graph: ChainGraph
    costs: tuple[Cost, ...]
    found: FoundFront


class Router:
    """Chooses chains for one member of the swarm, and keeps what the next choice can use.

    A graph holds for one version of the view, one place and one way to look up delays. A front holds for the wish's
    objectives and limits and the same small caches, as long as its machines are there with the same spans and its
    costs are about the same: how busy machines are does not matter to it. The last front of the same blocks seeds
    the next search. A session counts at its peers from the choice on, until they announce anew.
    """

    def __init__(self) -> None:
        self._version = -1
        self._graphs: dict[tuple[Place, bool, bool], ChainGraph] = {}
        self._terms: dict[tuple[Place, bool, bool], LoadTerms] = {}
        self._fronts: dict[tuple[object, ...], _Kept] = {}
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
        if view.version != self._version or len(self._graphs) > MAX_KEPT:
            self._version = view.version
            self._graphs.clear()
            self._terms.clear()
        if len(self._fronts) > MAX_KEPT:
            self._fronts.clear()
        place = Place(blocks=blocks, without=without, after=after, before=before)
        key = (place, wish.mode == "load", leaves_early(wish))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = graph_of(view, place, wish)
        if has_front(wish):
            routed = pick_from(self._front(graph, place, wish, rng, deadline), wish, rng)
        else:
            unannounced = self._unannounced(view)
            terms = self._load_terms(key, graph) if wish.mode == "load" else None
            routed = single_chain(view, graph, place, wish, rng=rng, unannounced=unannounced, terms=terms)
        self._count(view, (hop.peer for hop in routed.chain), 1)
        return routed

    def _load_terms(self, key: tuple[Place, bool, bool], graph: ChainGraph) -> LoadTerms:
        terms = self._terms.get(key)
        if terms is None:
            terms = self._terms[key] = LoadTerms(graph)
        return terms

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
        costs = objectives_on(graph, wish.objectives, wish.need_tokens).costs
        kept = self._fronts.get(key)
        if kept is not None and _is_near(kept.graph, graph) and all(map(_cost_is_near, kept.costs, costs)):
            return kept.found
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
            self._fronts[key] = _Kept(graph, costs, found)
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


def _is_near(old: ChainGraph, new: ChainGraph) -> bool:
    """The same machines with the same spans, and about the same delays."""
    if old is new:
        return True
    return (
        [record.peer for record in old.records] == [record.peer for record in new.records]
        and np.array_equal(old.start, new.start)
        and np.array_equal(old.end, new.end)
        and _delays_are_near(old.entry_delay_s, new.entry_delay_s)
        and _delays_are_near(old.exit_delay_s, new.exit_delay_s)
        and all(
            _delays_are_near(before.delay_s, now.delay_s)
            for before, now in zip(old.stages, new.stages, strict=True)
        )
    )


def _delays_are_near(old: Floats, new: Floats) -> bool:
    return bool(np.all(np.abs(new - old) <= np.maximum(NEAR_DELAY_FRACTION * old, NEAR_DELAY_S)))


def _cost_is_near(old: Cost, new: Cost) -> bool:
    """Apart from delays."""
    if isinstance(old, SumCost) or isinstance(new, SumCost):
        return (
            isinstance(old, SumCost)
            and isinstance(new, SumCost)
            and _costs_are_near(old.arrive, new.arrive)
            and _costs_are_near(old.per_block, new.per_block)
        )
    # A network that is faster than one block makes no difference.
    limits = [np.minimum(cost.rate_limit, cost.rate_per_block) for cost in (old, new)]
    return _costs_are_near(old.rate_per_block, new.rate_per_block) and _costs_are_near(*limits)


def _costs_are_near(old: Floats, new: Floats) -> bool:
    return bool(np.all(np.abs(new - old) <= NEAR_COST_FRACTION * np.abs(old)))
