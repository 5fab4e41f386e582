"""What a chain can be chosen for, by name, and how each quantity comes from costs that decompose over hops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from plait.errors import BadRequest
from plait.routing.costs import (
    Cost,
    compute_cost,
    energy_cost,
    hazard_cost,
    hops_cost,
    network_cost,
    price_cost,
    quantisation_cost,
    rate_cost,
    step_cost,
)
from plait.routing.graph import ChainGraph, Floats

ObjectiveName = Literal[
    "network_s",
    "compute_s",
    "step_s",
    "rate_tokens_per_s",
    "price",
    "energy_j",
    "failure",
    "quantisation",
    "hops",
]
"""`network_s`, `compute_s`, `step_s`: seconds per token on links, in blocks, and both. `rate_tokens_per_s`: of the
slowest hop, maximised. `price`: money per million tokens. `energy_j`: joules per token. `failure`: probability that a
peer of the chain is lost before the answer ends. `quantisation`: quality given up. `hops`: how many."""

NETWORK_AND_COMPUTE: tuple[ObjectiveName, ...] = ("network_s", "compute_s")
"""The study's pair A: their sum is PETALS' path cost."""
LATENCY_AND_THROUGHPUT: tuple[ObjectiveName, ...] = ("step_s", "rate_tokens_per_s")
"""The study's pair B."""

# Loss of quality per block, relative to bfloat16: the mean squared error of the weights, as a share of their
# variance, for round-to-nearest with one scale per channel (int8) or per group (int4). Only the order and the rough
# ratio matter.
LOSS_BY_FORMAT: Mapping[str, float] = {"int8": 1e-4, "int4": 1e-2}


Term = Literal[
    "network_s", "compute_s", "step_s", "rate", "price", "energy_j", "hazard_per_s", "quantisation", "hops"
]
"""A quantity that decomposes over hops."""

_TERMS: Mapping[ObjectiveName, tuple[Term, ...]] = {
    "network_s": ("network_s",),
    "compute_s": ("compute_s",),
    "step_s": ("step_s",),
    "rate_tokens_per_s": ("rate",),
    "price": ("price",),
    "energy_j": ("energy_j",),
    "failure": ("step_s", "hazard_per_s"),
    "quantisation": ("quantisation",),
    "hops": ("hops",),
}
_COSTS: Mapping[Term, Callable[[ChainGraph, int], Cost]] = {
    "network_s": network_cost,
    "compute_s": lambda graph, _: compute_cost(graph),
    "step_s": step_cost,
    "rate": lambda graph, _: rate_cost(graph),
    "price": lambda graph, _: price_cost(graph),
    "energy_j": lambda graph, _: energy_cost(graph),
    "hazard_per_s": lambda graph, _: hazard_cost(graph),
    "quantisation": lambda graph, _: quantisation_cost(graph, LOSS_BY_FORMAT),
    "hops": lambda graph, _: hops_cost(graph),
}


def check_objectives(names: Sequence[str]) -> tuple[ObjectiveName, ...]:
    """The same names, known to be two or more different objectives.

    Raises:
        BadRequest: they are not.
    """
    known: dict[str, ObjectiveName] = {name: name for name in get_args(ObjectiveName)}
    for name in names:
        if name not in known:
            raise BadRequest(f"objective {name!r} is unknown; known are {', '.join(known)}", param="route")
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadRequest("a front needs two or more different objectives", param="route")
    return tuple(known[name] for name in names)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Objectives laid out on a graph.

    `costs`: the terms they are made of, each of which decomposes over hops. An objective never falls when one of
    its terms grows, so the front in the terms contains a chain for every point of the front in the objectives: this
    is what makes exact search possible for some objectives that do not decompose.
    """

    names: tuple[ObjectiveName, ...]
    terms: tuple[Term, ...]
    costs: tuple[Cost, ...]
    need_tokens: int

    def minimised(self, term_values: Floats) -> Floats:
        """[chains, terms] to [chains, objectives], all to be minimised."""
        by_term = dict(zip(self.terms, term_values.T, strict=True))
        columns: list[Floats] = []
        for name in self.names:
            if name == "failure":
                answer_s = self.need_tokens * by_term["step_s"]
                columns.append(-np.expm1(-answer_s * by_term["hazard_per_s"]))
            else:
                columns.append(by_term[_TERMS[name][0]])
        return np.stack(columns, axis=1)

    def natural(self, minimised: Floats) -> Floats:
        """The same with rates as rates."""
        return np.where([name == "rate_tokens_per_s" for name in self.names], -minimised, minimised)


def objectives_on(graph: ChainGraph, names: tuple[ObjectiveName, ...], need_tokens: int) -> Objectives:
    """Lay objectives out on a graph."""
    terms: tuple[Term, ...] = tuple(dict.fromkeys(term for name in names for term in _TERMS[name]))
    return Objectives(
        names=names,
        terms=terms,
        costs=tuple(_COSTS[term](graph, need_tokens) for term in terms),
        need_tokens=need_tokens,
    )
