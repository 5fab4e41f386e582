"""One chain for one request, by any of the six modes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from plait.cluster import SwarmView
from plait.errors import NoRoute
from plait.ids import PeerId
from plait.routing.chain import Front, FrontMember, Routed, check_chain
from plait.routing.costs import seconds_per_block, step_cost
from plait.routing.front_search import exact_front
from plait.routing.graph import ChainGraph, Floats, chain_graph
from plait.routing.load import SPREAD, LoadTerms, least_loaded_round
from plait.routing.objectives import Objectives, objectives_on
from plait.routing.operators import PathOperators
from plait.routing.pareto import nondominated
from plait.routing.path_values import PathValues
from plait.routing.picks import pick_member
from plait.routing.pinned import pinned_path
from plait.routing.random_walk import random_walk
from plait.routing.seeds import seed_paths
from plait.routing.sweep import Path, edges, shortest_path
from plait.routing.wish import RouteWish

NOBODY: frozenset[PeerId] = frozenset()
NO_SESSIONS: Mapping[PeerId, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a chain goes: its blocks, the peers it avoids, and the hops around it when a gap is repaired.

    `after`, `before`: the surviving hops before and after the gap; None is the client, or the session's own gateway.
    """

    blocks: range
    without: frozenset[PeerId] = NOBODY
    after: PeerId | None = None
    before: PeerId | None = None


def choose_chain(
    view: SwarmView,
    blocks: range,
    wish: RouteWish,
    *,
    rng: np.random.Generator,
    without: frozenset[PeerId] = NOBODY,
    after: PeerId | None = None,
    before: PeerId | None = None,
    unannounced: Mapping[PeerId, int] = NO_SESSIONS,
    known: Front | None = None,
    deadline: Callable[[], bool] = lambda: False,
) -> Routed:
    """Choose the chain that serves `blocks` for one request.

    `without`, `after`, `before`: see `Place`. `unannounced`: sessions that peers have and that their records do not
    count yet, less those that are over and still count (mode `load`). `known`: a front (of the view before) whose
    members a search of mode `tradeoff` begins with, or takes as they are if `without` says that a chain is to be
    repaired. `deadline` says when time is up: a search then ends with what it has, or with the shortest chains.

    Raises:
        NoRoute: some block has no holder, or every chain of the front has more than `max_hops` hops.
        BadRequest: the wish does not fit the swarm (`pinned`, weights).
    """
    place = Place(blocks=blocks, without=without, after=after, before=before)
    graph = graph_of(view, place, wish)
    if has_front(wish):
        repairs = len(without) > 0
        found = front_of(graph, wish, rng=rng, known=known, repairs=repairs, deadline=deadline)
        return pick_from(found, wish, rng)
    return single_chain(view, graph, place, wish, rng=rng, unannounced=unannounced)


def has_front(wish: RouteWish) -> bool:
    """The mode picks from a front of several chains."""
    return wish.mode in ("exact", "tradeoff")


def graph_of(view: SwarmView, place: Place, wish: RouteWish) -> ChainGraph:
    """The graph that a mode chooses on.

    Only `load` looks unknown round trips up in the other direction; `load` always and `exact` if asked to leave a
    machine before its span's end.
    """
    return chain_graph(
        view,
        place.blocks,
        without=place.without,
        after=place.after,
        before=place.before,
        either_way=wish.mode == "load",
        early_exits=leaves_early(wish),
    )


def leaves_early(wish: RouteWish) -> bool:
    """A hop may end before its machine's span does."""
    return wish.mode == "load" or (wish.mode == "exact" and wish.early_exits)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFront:
    """A front with what picking from it needs: minimised values, [members, objectives]; PETALS' path costs,
    [members]; how it was found."""

    front: Front
    minimised: Floats
    step_s: Floats
    how: str


def front_of(
    graph: ChainGraph,
    wish: RouteWish,
    *,
    rng: np.random.Generator,
    known: Front | None = None,
    repairs: bool = False,
    deadline: Callable[[], bool] = lambda: False,
) -> FoundFront:
    """The front of the wish's objectives: exact, or searched for in mode `tradeoff`.

    `repairs`: a session waits for it, so that the members of a known front that are still chains are taken before a
    new search.
    """
    objectives = objectives_on(graph, wish.objectives, wish.need_tokens)
    if wish.mode == "tradeoff":
        paths, values, how = _evolved(graph, objectives, wish, rng, known, repairs, deadline)
        exact = False
    else:
        paths, values, how, exact = _exact(graph, objectives, wish, deadline)
    if not paths:
        raise NoRoute(
            f"every chain has more than {wish.max_hops} hops; allow more, or start workers with longer spans"
        )
    natural = objectives.natural(values)
    members = tuple(
        FrontMember(chain=graph.chain(path), values=tuple(float(value) for value in row))
        for path, row in zip(paths, natural, strict=True)
    )
    front = Front(objectives=wish.objectives, members=members, exact=exact)
    step_s = PathValues(graph).values([step_cost(graph, wish.need_tokens)], paths)[:, 0]
    return FoundFront(front=front, minimised=values, step_s=step_s, how=how)


def pick_from(found: FoundFront, wish: RouteWish, rng: np.random.Generator) -> Routed:
    """Take one chain of a front. Ties go to fewer hops, then to the lower peer ids."""
    members = found.front.members
    ties = [(len(member.chain), *(hop.peer for hop in member.chain)) for member in members]
    chosen, why = pick_member(found.minimised, ties, wish.pick, rng)
    chain = members[chosen].chain
    return Routed(
        chain=chain,
        mode=wish.mode,
        front=found.front,
        expected_step_s=float(found.step_s[chosen]),
        reasons=(
            f"{found.how}: {len(members)} chain{'s' if len(members) > 1 else ''} that no other beats in "
            + " and ".join(found.front.objectives),
            f"chain {chosen + 1}: {why}",
        ),
    )


def single_chain(
    view: SwarmView,
    graph: ChainGraph,
    place: Place,
    wish: RouteWish,
    *,
    rng: np.random.Generator,
    unannounced: Mapping[PeerId, int],
    terms: LoadTerms | None = None,
) -> Routed:
    """A chain by one of the modes that have no front; `terms`: see `least_loaded_round`."""
    round_s = None
    match wish.mode:
        case "load":
            round_s, path = least_loaded_round(
                graph,
                need_tokens=wish.need_tokens,
                unannounced=unannounced,
                closed=place.after is None and place.before is None,
                rng=rng,
                terms=terms,
            )
            why = f"least expected round with the announced sessions, within a random {SPREAD:.0%}"
        case "latency":
            _, path = shortest_path(graph, edges(graph, step_cost(graph, wish.need_tokens)))
            why = "the shortest chain by PETALS' cost model"
        case "throughput":
            path, why = random_walk(graph, rng), "PETALS' random walk, which favours long spans"
        case _:
            path, why = pinned_path(view, graph, wish.pinned), "the peers that were asked for"
    chain = graph.chain(path)
    check_chain(chain, place.blocks)
    expected_s = _petals_step_s(graph, path, wish.need_tokens) if round_s is None else round_s
    member = FrontMember(chain=chain, values=(expected_s,))
    front = Front(objectives=("step_s",), members=(member,), exact=wish.mode == "latency")
    return Routed(chain=chain, mode=wish.mode, front=front, expected_step_s=expected_s, reasons=(why,))


def _exact(
    graph: ChainGraph, objectives: Objectives, wish: RouteWish, deadline: Callable[[], bool]
) -> tuple[list[Path], Floats, str, bool]:
    costs = objectives.costs
    limited = wish.max_hops < len(graph.records)
    if limited:
        costs = (*costs, *objectives_on(graph, ("hops",), objectives.need_tokens).costs)
    found = exact_front(graph, costs, slack_fraction=wish.slack_fraction, deadline=deadline)
    short = [row for row, path in enumerate(found.paths) if len(path) <= wish.max_hops]
    values = objectives.minimised(found.values[short, : len(objectives.costs)])
    rows = _kept(values)
    how = "the exact front" if found.complete else "the part of the front that the time allowed"
    paths = [found.paths[short[row]] for row in rows]
    return paths, values[rows], how, found.complete and wish.slack_fraction == 0


def _evolved(
    graph: ChainGraph,
    objectives: Objectives,
    wish: RouteWish,
    rng: np.random.Generator,
    known: Front | None,
    repairs: bool,
    deadline: Callable[[], bool],
) -> tuple[list[Path], Floats, str]:
    operators = PathOperators(graph, seconds_per_block(graph))
    table = PathValues(graph)
    numbers = {record.peer: number for number, record in enumerate(graph.records)}
    _, petals = shortest_path(graph, edges(graph, step_cost(graph, wish.need_tokens)))
    chains = [member.chain for member in known.members] if known else []
    old = [operators.repair(numbers[hop.peer] for hop in chain if hop.peer in numbers) for chain in chains]
    left = [path for path, chain in zip(old, chains, strict=True) if graph.chain(path) == chain]
    suffices = repairs and len(left) > 0
    more = left if suffices else [*seed_paths(graph, objectives.costs), *old]
    seeds = [(path,) for path in dict.fromkeys([petals, *more])]

    def evaluate(genomes: Sequence[tuple[Path, ...]]) -> Floats:
        return objectives.minimised(table.values(objectives.costs, [paths[0] for paths in genomes]))

    if suffices or deadline():
        short = [seed for seed in seeds if len(seed[0]) <= wish.max_hops]
        values = evaluate(short) if short else np.empty((0, len(objectives.names)))
        rows = _kept(values)
        how = "what is left of the front" if suffices else "shortest chains, without time to search"
        return [short[row][0] for row in rows], values[rows], how

    from plait.routing.evolution import SearchBudget, evolve_front  # imports pymoo: slow

    found = evolve_front(
        operators,
        evaluate,
        objectives=len(objectives.names),
        seeds=seeds,
        max_hops=wish.max_hops,
        budget=SearchBudget(evaluations=wish.evaluations, deadline=deadline),
        rng=rng,
    )
    name = "NSGA-II" if len(objectives.names) == 2 else "NSGA-III"
    how = f"{name} after {found.evaluations} evaluations"
    return [paths[0] for paths in found.genomes], found.values, how


def _kept(values: Floats) -> list[int]:
    return [int(row) for row in nondominated(values)] if len(values) else []


def _petals_step_s(graph: ChainGraph, path: Path, need_tokens: int) -> float:
    return float(PathValues(graph).values([step_cost(graph, need_tokens)], [path])[0, 0])
