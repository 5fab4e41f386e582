"""The exact front: every chain that no other chain beats in all objectives at once.

Label setting in topological order. A label is a cost vector with the way back; each server keeps those that none of
its others dominates. Two things drop labels early, or they would be millions:

- Backward sweeps (`WaysToGo`) say what each server still costs at least, in every objective and, for sums, in weighed
  sums of two objectives. A label whose bound is no better than chains already known cannot end on the front.
- Following the same sweeps, every label is completed to chains at once, so good chains are known from the start.

What comes out is the front, to rounding: labels are compared after sums in different orders. The plain loop it is
tested against is in tests/routing (all chains of small swarms; the epsilon-constraint loop of the brief for larger
ones).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from plait.routing.costs import Cost, SumCost
from plait.routing.graph import ChainGraph, Floats, Ints
from plait.routing.pareto import nondominated, nondominated_by_group
from plait.routing.sweep import Edges, Path, WaysToGo, edges, limited, steps, ways_to_go, weighed

_FAR = 1e18  # instead of infinity, which weights of 0 would turn into NaN
GUIDES = (
    3  # more backward sweeps cost more than they drop, fewer drop too little: measured on 60 to 1,000 servers
)
MAX_LABELS = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PathFront:
    """Paths and their costs, [paths, objectives], ordered by the first; `complete` unless the search was cut
    short."""

    paths: tuple[Path, ...]
    values: Floats
    complete: bool


def exact_front(
    graph: ChainGraph,
    costs: Sequence[Cost],
    *,
    slack_fraction: float = 0.0,
    max_labels: int = MAX_LABELS,
    deadline: Callable[[], bool] | None = None,
) -> PathFront:
    """Find the front of two or more costs.

    `slack_fraction`: chains that improve on a known one by less than this part of the front's extent, in every
    objective, may be missed (0: none). `deadline` is asked at every boundary; if it says yes, or `max_labels` have
    been kept, the chains known so far are returned, and `complete` is False.
    """
    search = _Search(graph, [edges(graph, cost) for cost in costs], slack_fraction)
    search.set_out([isinstance(cost, SumCost) for cost in costs])
    complete = search.run(max_labels, deadline)
    return search.front(complete)


@dataclass(frozen=True, slots=True)
class _Guide:
    """Ways to go, and the weights of the objectives in their measure (None: it bounds nothing beyond its
    objective)."""

    ways: WaysToGo
    weights: Floats | None


@dataclass(slots=True)
class _Search:
    graph: ChainGraph
    objectives: list[Edges]
    slack_fraction: float
    guides: list[_Guide] = field(init=False)
    labels: int = 0
    bound: Floats = field(init=False)
    known: Floats = field(init=False)
    known_origins: Ints = field(init=False)
    stage_of: Ints = field(init=False)
    slack: Floats = field(init=False)
    waiting: list[list[tuple[Floats, Ints, Ints]]] = field(init=False)
    label_server: list[Ints] = field(init=False)
    label_parent: list[Ints] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.objectives)
        self.guides = []
        self.label_server = [np.empty(0, dtype=np.intp)]
        self.label_parent = [np.empty(0, dtype=np.intp)]
        self.bound = np.empty((self.graph.servers, count))  # least cost to go in each objective
        self.known = np.empty((0, count))  # costs of complete chains, nondominated, ordered by the first
        self.known_origins = np.empty((0, 3), dtype=np.intp)  # (label before, server, guide followed from it)
        self.stage_of = np.full(self.graph.servers, len(self.graph.stages))
        for number, stage in enumerate(self.graph.stages):
            self.stage_of[stage.arriving] = number
        self.waiting: list[list[tuple[Floats, Ints, Ints]]] = [[] for _ in range(len(self.graph.stages) + 1)]
        self.slack = np.zeros(count)

    def set_out(self, sums: Sequence[bool]) -> None:
        """Sweep backwards: once for each objective, then a few times for chains between the extremes."""
        for column, objective in enumerate(self.objectives):
            self._add_guide(objective, None)
            self.bound[:, column] = self.guides[-1].ways.measure
        if len(sums) == 2:
            (self._guide_by_weights if all(sums) else self._guide_by_limits)(sums)
        elif sum(sums) > 1:
            extent = np.ptp(self.known, axis=0)
            weights = np.where(sums & (extent > 0), 1 / np.where(extent > 0, extent, 1.0), 0.0)
            if weights.any():
                self._add_guide(weighed(self.objectives, weights), None)
        self.slack = self.slack_fraction * np.ptp(self.known, axis=0)

    def _guide_by_weights(self, _sums: Sequence[bool]) -> None:
        """Between two chains of the lower hull, weigh so that both cost the same and look for one below: the
        dichotomic scheme of bi-objective search."""
        pairs = [(self.known[0], self.known[-1])]
        for _ in range(GUIDES):
            if not pairs:
                return
            left, right = pairs.pop(0)
            weights = np.array([left[1] - right[1], right[0] - left[0]])
            if weights.min() <= 0:
                continue
            below = self._add_guide(weighed(self.objectives, weights), weights)
            if below @ weights < left @ weights * (1 - 1e-12):
                pairs += [(left, below), (below, right)]

    def _guide_by_limits(self, sums: Sequence[bool]) -> None:
        """Between the extremes, the cheapest ways by the sum whose bottleneck stays within a limit."""
        summed = sums.index(True) if any(sums) else 0
        other = 1 - summed
        low, high = self.known[:, other].min(), self.known[:, other].max()
        if low < high:
            for limit in steps(low, high, GUIDES + 2)[1:-1]:
                self._add_guide(limited(self.objectives[summed], self.objectives[other], limit), None)

    def _add_guide(self, measure: Edges, weights: Floats | None) -> Floats:
        """Returns the costs of the chain that is cheapest by the measure."""
        graph = self.graph
        ways = ways_to_go(graph, measure, self.objectives)
        self.guides.append(_Guide(ways, weights))
        chains = self._join([objective.entering for objective in self.objectives], ways.costs[graph.entering])
        origins = np.stack(
            [np.full(len(chains), -1), graph.entering, np.full(len(chains), len(self.guides) - 1)], axis=1
        )
        self._learn(chains, origins)
        cheapest = measure.join(measure.entering, ways.measure[graph.entering]).argmin()
        return chains[cheapest]

    def run(self, max_labels: int, deadline: Callable[[], bool] | None) -> bool:
        """Set labels boundary by boundary; False if cut short."""
        entering = self.graph.entering
        first = np.stack([objective.entering for objective in self.objectives], axis=1)
        self._offer(first, entering, np.full(len(entering), -1))
        for number in range(len(self.waiting)):
            if not self.waiting[number]:
                continue
            if self.labels > max_labels or (deadline is not None and deadline()):
                return False
            values, servers, parents = (
                np.concatenate(parts) for parts in zip(*self.waiting[number], strict=True)
            )
            self.waiting[number].clear()
            rows = nondominated_by_group(values, servers)
            values, servers, parents = values[rows], servers[rows], parents[rows]
            self._complete(values, servers, parents)
            if number < len(self.graph.stages):
                self._extend(number, values, servers, parents)
        return True

    def _complete(self, values: Floats, servers: Ints, parents: Ints) -> None:
        """Follow every guide from every label to the end."""
        chains = [self._join(values.T, guide.ways.costs[servers]) for guide in self.guides]
        count = len(self.guides)
        followed = np.repeat(np.arange(count), len(servers))
        self._learn(
            np.concatenate(chains),
            np.stack([np.tile(parents, count), np.tile(servers, count), followed], axis=1),
        )

    def _extend(self, number: int, values: Floats, servers: Ints, parents: Ints) -> None:
        stage = self.graph.stages[number]
        ids = np.arange(self.labels, self.labels + len(servers))
        self.label_server.append(servers)
        self.label_parent.append(parents)
        self.labels += len(servers)
        offered = np.empty((len(servers), len(stage.holding), values.shape[1]))
        for column, objective in enumerate(self.objectives):
            hops = objective.stages[number]
            hops = hops[servers - stage.arriving.start] if len(hops) > 1 else hops
            objective.join(values[:, column, None], hops, out=offered[:, :, column])
        self._offer(
            offered.reshape(-1, values.shape[1]),
            np.tile(stage.holding, len(servers)),
            np.repeat(ids, len(stage.holding)),
        )

    def _offer(self, values: Floats, servers: Ints, parents: Ints) -> None:
        """Put labels that may end on the front where they wait for their server's turn."""
        rows = self._promising(values, servers)
        if len(rows) == 0:
            return
        stages = self.stage_of[servers[rows]]
        order = np.argsort(stages, kind="stable")
        rows, stages = rows[order], stages[order]
        cuts = [0, *(np.flatnonzero(np.diff(stages)) + 1).tolist(), len(rows)]
        for begin, end in itertools.pairwise(cuts):
            part = rows[begin:end]
            self.waiting[int(stages[begin])].append((values[part], servers[part], parents[part]))

    def _promising(self, values: Floats, servers: Ints) -> Ints:
        """Rows whose bound is not covered by known chains."""
        least = self._join(values.T, self.bound[servers]) + self.slack
        if values.shape[1] != 2:
            covered = np.zeros(len(least), dtype=bool)
            for chain in self.known:
                covered |= (chain <= least).all(axis=1)
            return np.flatnonzero(~covered & np.isfinite(least).all(axis=1))
        place = np.searchsorted(self.known[:, 0], least[:, 0], side="right") - 1
        rows = np.flatnonzero((place < 0) | (self.known[place, 1] > least[:, 1]))
        weighed = [guide for guide in self.guides if guide.weights is not None]
        if not weighed or len(rows) == 0:
            return rows
        # A new chain must lie in a corner between two neighbours of the front: below the right one's first and the
        # left one's second objective. The weighed bounds rule corners out.
        first, second = np.append(self.known[:, 0], _FAR), np.append(_FAR, self.known[:, 1])
        within = (least[rows, 0, None] < first) & (least[rows, 1, None] < second)  # [rows, corners]
        for guide in weighed:
            assert guide.weights is not None
            cheapest = (values[rows] + self.slack) @ guide.weights + guide.ways.measure[servers[rows]]
            within &= cheapest[:, None] < guide.weights[0] * first + guide.weights[1] * second
        return rows[within.any(axis=1)]

    def _learn(self, chains: Floats, origins: Ints) -> None:
        """Keep complete chains that nothing known dominates."""
        finite = np.isfinite(chains).all(axis=1)
        values = np.concatenate([self.known, chains[finite]])
        rows = nondominated(values)
        self.known = values[rows]
        self.known_origins = np.concatenate([self.known_origins, origins[finite]])[rows]

    def _join(self, values: Sequence[Floats] | Floats, to_go: Floats) -> Floats:
        """[objectives][n] and [n, objectives], joined to [n, objectives]."""
        columns = (
            objective.join(values[column], to_go[:, column])
            for column, objective in enumerate(self.objectives)
        )
        return np.stack(list(columns), axis=1)

    def front(self, complete: bool) -> PathFront:
        """What is known, with chains that differ by rounding only taken as one."""
        extent = np.ptp(self.known, axis=0)
        rows = nondominated(np.round(self.known / np.where(extent > 0, extent, 1.0), 12))
        label_server, label_parent = np.concatenate(self.label_server), np.concatenate(self.label_parent)
        paths: list[Path] = []
        for label, server, guide in self.known_origins[rows].tolist():
            path: list[int] = []
            while label >= 0:
                path.append(int(label_server[label]))
                label = int(label_parent[label])
            path.reverse()
            following = self.guides[int(guide)].ways.following
            while server >= 0:
                path.append(server)
                server = int(following[server])
            paths.append(tuple(path))
        return PathFront(paths=tuple(paths), values=self.known[rows], complete=complete)
