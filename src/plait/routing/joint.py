"""Chains for several sessions that start at once: what one takes, the others wait for.

The rounds of such sessions do not decompose over hops, nor over sessions: a machine's passes carry all that cross
it, and a machine in use is paid for once. Where there are no more assignments than may be evaluated, all are, and
the front is exact; otherwise it is searched for, by NSGA-II for two objectives and NSGA-III for more. Among the
seeds is what choosing one by one gives, each session seeing those before it (mode `load`), so the result is never
worse than that.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from plait.cluster import SwarmView
from plait.errors import BadRequest
from plait.routing.chain import Chain
from plait.routing.costs import quantisation_cost, seconds_per_block
from plait.routing.graph import ChainGraph, Floats, Ints, chain_graph
from plait.routing.load import closing_delays_s, load_cost, shortest_round
from plait.routing.objectives import LOSS_BY_FORMAT, objectives_on
from plait.routing.operators import PathOperators
from plait.routing.pareto import nondominated
from plait.routing.path_values import PathValues
from plait.routing.seeds import seed_paths
from plait.routing.sweep import Path

JointObjectiveName = Literal[
    "mean_round_s", "worst_round_s", "tokens_per_s", "price", "energy_j", "failure", "quantisation"
]
"""`mean_round_s`, `worst_round_s`: expected seconds of a decoding round, over the sessions. `tokens_per_s`: of all
of them together, maximised. `price`, `energy_j`: of the machines in use, by million tokens and by token. `failure`:
probability that a machine in use is lost before the slowest answer ends. `quantisation`: mean quality given up."""

MAXIMISED = ("tokens_per_s",)
MAX_SESSIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A chain for each session, and the values of the front's objectives, each in its own unit."""

    chains: tuple[Chain, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointFront:
    """Assignments that no other that was tried beats in every objective, ordered by the first one, best first.

    `one_by_one`: the assignment that choosing for each session in turn gives. It is among the members unless one of
    them beats it. `exact`: every assignment was tried.
    """

    objectives: tuple[JointObjectiveName, ...]
    members: tuple[Assignment, ...]
    exact: bool
    one_by_one: Assignment
    evaluations: int


def assign_chains(
    view: SwarmView,
    blocks: range,
    *,
    sessions: int,
    objectives: tuple[JointObjectiveName, ...] = ("mean_round_s", "price"),
    need_tokens: int = 0,
    evaluations: int = 4000,
    rng: np.random.Generator,
    deadline: Callable[[], bool] = lambda: False,
) -> JointFront:
    """Search for chains that `sessions` sessions could take at once.

    Raises:
        NoRoute: some block has no holder.
        BadRequest: fewer than two objectives, or no sensible number of sessions.
    """
    if not 1 <= sessions <= MAX_SESSIONS:
        raise BadRequest(f"sessions must be 1 to {MAX_SESSIONS}, not {sessions}", param="sessions")
    if len(set(objectives)) < 2 or set(objectives) - set(get_args(JointObjectiveName)):
        raise BadRequest(
            f"two or more different objectives are needed, of {', '.join(get_args(JointObjectiveName))}",
            param="objectives",
        )
    graph = chain_graph(view, blocks, either_way=True)
    values = _JointValues(graph, need_tokens)
    in_turn = values.one_by_one(sessions)
    every = _every_assignment(graph, sessions, evaluations)
    if every is not None:
        minimised = values.minimised(every, objectives)
        rows = [int(row) for row in nondominated(minimised)]
        found = [(every[row], minimised[row]) for row in rows]
        evaluated = len(every)
    else:
        from plait.routing.evolution import SearchBudget, evolve_front  # imports pymoo: slow

        alike = seed_paths(graph, objectives_on(graph, ("step_s", "price", "energy_j"), need_tokens).costs)
        front = evolve_front(
            PathOperators(graph, seconds_per_block(graph)),
            lambda assignments: values.minimised(assignments, objectives),
            objectives=len(objectives),
            seeds=[in_turn, *((path,) * sessions for path in alike)],
            sessions=sessions,
            max_hops=graph.servers,
            budget=SearchBudget(evaluations=evaluations, deadline=deadline),
            rng=rng,
        )
        found = list(zip(front.genomes, front.values, strict=True))
        evaluated = front.evaluations

    def assignment(paths: tuple[Path, ...], minimised: Floats) -> Assignment:
        signs = [-1.0 if name in MAXIMISED else 1.0 for name in objectives]
        return Assignment(
            chains=tuple(graph.chain(path) for path in paths),
            values=tuple(float(value) * sign for value, sign in zip(minimised, signs, strict=True)),
        )

    return JointFront(
        objectives=objectives,
        members=tuple(assignment(paths, row) for paths, row in found),
        one_by_one=assignment(in_turn, values.minimised([in_turn], objectives)[0]),
        exact=every is not None,
        evaluations=evaluated,
    )


def _every_assignment(graph: ChainGraph, sessions: int, most: int) -> list[tuple[Path, ...]] | None:
    """All assignments, whichever session has which chain, or None if there are more than `most`."""
    paths: list[Path] = []
    begun: list[tuple[Path, int]] = [((), graph.blocks.start)]
    while begun:
        path, boundary = begun.pop()
        if boundary == graph.blocks.stop:
            paths.append(path)
        else:
            begun += [((*path, int(server)), int(graph.end[server])) for server in graph.holders(boundary)]
        if math.comb(len(paths) + sessions - 1, sessions) > most or len(begun) > most:
            return None
    return list(itertools.combinations_with_replacement(paths, sessions))


class _JointValues:
    """Evaluates assignments: paths for all sessions, at once."""

    def __init__(self, graph: ChainGraph, need_tokens: int) -> None:
        self._graph = graph
        self._need_tokens = need_tokens
        self._table = PathValues(graph)
        self._closing_s = closing_delays_s(graph)
        self._announced = np.array([record.load.sessions for record in graph.records], dtype=np.float64)
        idle = load_cost(graph, need_tokens, np.zeros(graph.servers), round_s=1.0)
        self._idle_s, _ = shortest_round(graph, idle, self._closing_s)
        terms = [record.terms for record in graph.records]
        self._price_per_s = np.array([term.price_per_hour for term in terms]) / 3600
        self._watts = np.array([term.busy_watts for term in terms])
        self._hazard_per_s = np.array(
            [1 / term.mean_lifetime_s if term.mean_lifetime_s else 0.0 for term in terms]
        )

    def one_by_one(self, sessions: int) -> tuple[Path, ...]:
        """Each session takes the least round that the others before it leave."""
        crowd = self._announced.copy()
        paths: list[Path] = []
        for _ in range(sessions):
            cost = load_cost(self._graph, self._need_tokens, crowd, round_s=self._idle_s)
            _, path = shortest_round(self._graph, cost, self._closing_s)
            crowd[list(path)] += 1
            paths.append(path)
        return tuple(paths)

    def minimised(
        self, assignments: Sequence[tuple[Path, ...]], objectives: Sequence[JointObjectiveName]
    ) -> Floats:
        """[assignments, objectives], all to be minimised."""
        count = len(assignments)
        paths = [path for assignment in assignments for path in assignment]
        hops = np.array([server for path in paths for server in path], dtype=np.intp)
        lengths = [len(path) for path in paths]
        of = np.repeat(np.repeat(np.arange(count), len(assignments[0])), lengths)
        crossing = np.zeros((count, self._graph.servers))
        np.add.at(crossing, (of, hops), 1)
        rounds_s = self._rounds_s(crossing, of, hops, lengths, paths).reshape(count, -1)
        used = crossing > 0
        tokens_per_s = (1 / rounds_s).sum(axis=1)
        columns: list[Floats] = []
        for name in objectives:
            match name:
                case "mean_round_s":
                    columns.append(rounds_s.mean(axis=1))
                case "worst_round_s":
                    columns.append(rounds_s.max(axis=1))
                case "tokens_per_s":
                    columns.append(-tokens_per_s)
                case "price":
                    columns.append(used @ self._price_per_s / tokens_per_s * 1e6)
                case "energy_j":
                    columns.append(used @ self._watts / tokens_per_s)
                case "failure":
                    exposed_s = self._need_tokens * rounds_s.max(axis=1)
                    columns.append(-np.expm1(-exposed_s * (used @ self._hazard_per_s)))
                case "quantisation":
                    loss = self._table.values([quantisation_cost(self._graph, LOSS_BY_FORMAT)], paths)
                    columns.append(loss.reshape(count, -1).mean(axis=1))
        return np.stack(columns, axis=1)

    def _rounds_s(
        self, crossing: Floats, of: Ints, hops: Ints, lengths: Sequence[int], paths: Sequence[Path]
    ) -> Floats:
        """Expected round of every path, [assignments * sessions]; `of`: the assignment of each hop."""
        # A session does not wait for itself; where nobody of these crosses, nothing is looked up.
        others = self._announced + np.maximum(crossing - 1, 0.0)
        cost = load_cost(self._graph, self._need_tokens, others, round_s=self._idle_s)
        firsts = np.cumsum(lengths) - np.array(lengths)
        lasts = firsts + np.array(lengths) - 1
        begins = np.concatenate([[0], self._graph.end[hops[:-1]]])
        begins[firsts] = self._graph.blocks.start
        each = cost.arrive[of, hops] + (self._graph.end[hops] - begins) * cost.per_block[of, hops]
        inner = np.ones(len(hops), dtype=bool)
        inner[firsts] = False
        each[inner] += self._table.delays_s(hops[:-1][inner[1:]], hops[inner])
        first = np.searchsorted(self._graph.entering, hops[firsts])
        closing_s = self._closing_s[hops[lasts] - self._graph.leaving.start, first]
        return np.add.reduceat(each, firsts) + closing_s
