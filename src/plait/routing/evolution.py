# pyright: standard
"""Mode `tradeoff`: the front searched for by NSGA-II, or NSGA-III from three objectives, with pymoo.

A genome is one path, or k paths for k sessions that start at once; the operators are those of operators.py, applied
to one path of the genome. Every chain that was evaluated and is not dominated is kept, so cutting the search short
loses nothing that was found.

pymoo takes a third of a second to import: the package imports this module when a search is first asked for. It has no
types, so this file is checked less strictly than the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.sampling import Sampling
from pymoo.core.termination import Termination
from pymoo.optimize import minimize
from pymoo.util.ref_dirs import get_reference_directions

from plait.routing.graph import Floats
from plait.routing.operators import PathOperators
from plait.routing.pareto import nondominated
from plait.routing.sweep import Path

Genome = tuple[Path, ...]
"""One path for each session that is routed."""

CROSSOVER_PROBABILITY = 0.9
MUTATION_PROBABILITY = 0.9
POPULATION = 100
MATING_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchBudget:
    """How long to search: so many evaluations, or until the deadline, which is asked between generations, says
    yes."""

    evaluations: int
    population: int = POPULATION
    deadline: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenomeFront:
    """Genomes that no other evaluated genome dominates, with their values, [genomes, objectives], by the first
    one."""

    genomes: tuple[Genome, ...]
    values: Floats
    evaluations: int


def evolve_front(
    operators: PathOperators,
    evaluate: Callable[[Sequence[Genome]], Floats],
    *,
    objectives: int,
    seeds: Sequence[Genome],
    sessions: int = 1,
    max_hops: int,
    budget: SearchBudget,
    rng: np.random.Generator,
) -> GenomeFront:
    """Search for the front of `evaluate`, which maps genomes to [genomes, objectives], all minimised.

    `seeds`: members of the first generation; random walks are the others. A genome with a path of more than
    `max_hops` is worse than any without, and is not returned. The same state of `rng` gives the same front, unless
    the deadline cuts in.
    """
    problem = _Chains(evaluate, objectives, max_hops)
    operations: dict[str, Any] = {
        "sampling": _FirstGeneration(operators, seeds, sessions),
        "crossover": _CrossOnePath(operators, sessions),
        "mutation": _MutateOnePath(operators, sessions),
        "eliminate_duplicates": _EqualGenomes(),
    }
    if objectives == 2:
        algorithm = NSGA2(pop_size=budget.population, **operations)
    else:
        directions = _directions(objectives, budget.population)
        algorithm = NSGA3(directions, pop_size=max(budget.population, len(directions)), **operations)
    # With fewer chains than the population could hold, pymoo would look for new ones a hundred times over.
    algorithm.mating.n_max_iterations = MATING_ROUNDS
    minimize(problem, algorithm, _Spent(budget), seed=int(rng.integers(2**31)))
    return GenomeFront(
        genomes=tuple(problem.kept),
        values=problem.kept_values,
        evaluations=problem.evaluations,
    )


def _directions(objectives: int, population: int) -> Any:
    """The finest even directions that are not more than the population."""
    partitions = 1
    while len(get_reference_directions("das-dennis", objectives, n_partitions=partitions + 1)) <= population:
        partitions += 1
    return get_reference_directions("das-dennis", objectives, n_partitions=partitions)


class _Chains(Problem):
    """Genomes are objects in a column; the nondominated ones of all generations are kept."""

    def __init__(
        self, evaluate: Callable[[Sequence[Genome]], Floats], objectives: int, max_hops: int
    ) -> None:
        super().__init__(n_var=1, n_obj=objectives, n_ieq_constr=1)
        self._evaluate_genomes = evaluate
        self._max_hops = max_hops
        self.evaluations = 0
        self.kept: list[Genome] = []
        self.kept_values = np.empty((0, objectives))

    def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
        genomes: list[Genome] = [row[0] for row in x]
        values = self._evaluate_genomes(genomes)
        self.evaluations += len(genomes)
        excess = np.array([max(map(len, genome)) - self._max_hops for genome in genomes])
        out["F"], out["G"] = values, excess[:, None]
        allowed = np.flatnonzero(excess <= 0)
        pool = [*self.kept, *(genomes[row] for row in allowed)]
        pool_values = np.concatenate([self.kept_values, values[allowed]])
        if pool:
            rows = nondominated(pool_values)
            self.kept, self.kept_values = [pool[row] for row in rows], pool_values[rows]


class _FirstGeneration(Sampling):
    def __init__(self, operators: PathOperators, seeds: Sequence[Genome], sessions: int) -> None:
        super().__init__()
        self._operators, self._seeds, self._sessions = operators, seeds, sessions

    def _do(self, problem: Any, n_samples: int, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        drawn = [
            tuple(self._operators.draw(random_state) for _ in range(self._sessions))
            for _ in range(n_samples - len(self._seeds))
        ]
        return _column([*self._seeds, *drawn][:n_samples])


class _CrossOnePath(Crossover):
    """The paths of one session are crossed; those of the sessions after it are swapped."""

    def __init__(self, operators: PathOperators, sessions: int) -> None:
        super().__init__(n_parents=2, n_offsprings=2, prob=CROSSOVER_PROBABILITY)
        self._operators, self._sessions = operators, sessions

    def _do(self, problem: Any, x: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        children = np.empty_like(x)
        for mating in range(x.shape[1]):
            first, second = x[0, mating, 0], x[1, mating, 0]
            at = int(random_state.integers(self._sessions))
            one, other = self._operators.cross(first[at], second[at], random_state)
            children[0, mating, 0] = (*first[:at], one, *second[at + 1 :])
            children[1, mating, 0] = (*second[:at], other, *first[at + 1 :])
        return children


class _MutateOnePath(Mutation):
    def __init__(self, operators: PathOperators, sessions: int) -> None:
        super().__init__(prob=MUTATION_PROBABILITY)
        self._operators, self._sessions = operators, sessions

    def _do(self, problem: Any, x: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        mutants: list[Genome] = []
        for genome in x[:, 0]:
            at = int(random_state.integers(self._sessions))
            mutants.append(
                (*genome[:at], self._operators.mutate(genome[at], random_state), *genome[at + 1 :])
            )
        return _column(mutants)


class _EqualGenomes(DuplicateElimination):
    def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
        seen = set() if other is None else {member.X[0] for member in other}
        for number, member in enumerate(pop):
            is_duplicate[number] = member.X[0] in seen
            if other is None:
                seen.add(member.X[0])
        return is_duplicate


class _Spent(Termination):
    def __init__(self, budget: SearchBudget) -> None:
        super().__init__()
        self._budget = budget

    def _update(self, algorithm: Any) -> float:
        return 1.0 if self._budget.deadline() else algorithm.evaluator.n_eval / self._budget.evaluations


def _column(genomes: Sequence[Genome]) -> Any:
    """[genomes, 1] of objects; numpy would make tables of tuples of equal length."""
    column = np.empty((len(genomes), 1), dtype=object)
    for row, genome in enumerate(genomes):
        column[row, 0] = genome
    return column
