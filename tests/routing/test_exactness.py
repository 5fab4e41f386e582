"""The fast searches against every chain of small swarms, and against the plain loops on larger ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_swarms import every_chain, every_early_chain, petals_dijkstra_s, plain_values, small_swarms

from plait.cluster import SwarmView, random_swarm
from plait.routing import (
    LATENCY_AND_THROUGHPUT,
    NETWORK_AND_COMPUTE,
    Front,
    ObjectiveName,
    RouteWish,
    check_chain,
    choose_chain,
    nondominated,
)
from plait.routing.costs import BottleneckCost, rate_cost, step_cost
from plait.routing.front_search import exact_front
from plait.routing.graph import ChainGraph, chain_graph
from plait.routing.sweep import edges, limited, shortest_path

RNG = np.random.default_rng(0)
OBJECTIVE_SETS: tuple[tuple[ObjectiveName, ...], ...] = (
    NETWORK_AND_COMPUTE,
    LATENCY_AND_THROUGHPUT,
    ("step_s", "price", "energy_j"),
    ("step_s", "failure"),
    ("rate_tokens_per_s", "quantisation"),
    ("network_s", "rate_tokens_per_s", "failure", "hops"),
)


def sub_range(data: st.DataObject, view: SwarmView) -> range:
    first = data.draw(st.integers(0, view.model_blocks - 1))
    return range(first, data.draw(st.integers(first + 1, view.model_blocks)))


@given(small_swarms(), st.data(), st.integers(0, 120))
def test_latency_is_petals_dijkstra(view: SwarmView, data: st.DataObject, need_tokens: int) -> None:
    blocks = sub_range(data, view)
    routed = choose_chain(view, blocks, RouteWish(mode="latency", need_tokens=need_tokens), rng=RNG)
    check_chain(routed.chain, blocks)
    assert routed.expected_step_s == pytest.approx(petals_dijkstra_s(view, blocks, need_tokens), rel=1e-12)


@given(small_swarms(), st.data(), st.integers(0, 120), st.sampled_from(OBJECTIVE_SETS), st.integers(1, 5))
def test_the_exact_front_is_that_of_every_chain(
    view: SwarmView,
    data: st.DataObject,
    need_tokens: int,
    objectives: tuple[ObjectiveName, ...],
    max_hops: int,
) -> None:
    blocks = sub_range(data, view)
    chains = [chain for chain in every_chain(view, blocks) if len(chain) <= max_hops]
    if not chains:
        return
    every = [plain_values(view, blocks, chain, need_tokens) for chain in chains]
    signs = np.array([-1.0 if name == "rate_tokens_per_s" else 1.0 for name in objectives])
    wish = RouteWish(mode="exact", objectives=objectives, need_tokens=need_tokens, max_hops=max_hops)
    front = choose_chain(view, blocks, wish, rng=RNG).front
    assert front.exact
    by_chain = {
        tuple(record.peer for record in chain): values for chain, values in zip(chains, every, strict=True)
    }
    for member in front.members:
        check_chain(member.chain, blocks)
        plain = by_chain[tuple(hop.peer for hop in member.chain)]
        assert member.values == pytest.approx([plain[name] for name in objectives], rel=1e-9, abs=1e-15)
    found = np.array([member.values for member in front.members]) * signs
    expected = np.array([[values[name] for name in objectives] for values in every]) * signs
    assert_same_front(found, expected)


@given(small_swarms(max_peers=6), st.data(), st.sampled_from(OBJECTIVE_SETS))
def test_the_front_with_early_exits_is_that_of_every_such_chain(
    view: SwarmView, data: st.DataObject, objectives: tuple[ObjectiveName, ...]
) -> None:
    blocks = sub_range(data, view)
    every = [
        plain_values(
            view,
            blocks,
            tuple(record for record, _ in chain),
            60,
            ends=tuple(end for _, end in chain),
        )
        for chain in every_early_chain(view, blocks)
    ]
    signs = np.array([-1.0 if name == "rate_tokens_per_s" else 1.0 for name in objectives])
    wish = RouteWish(mode="exact", objectives=objectives, need_tokens=60, early_exits=True)
    front = choose_chain(view, blocks, wish, rng=RNG).front
    for member in front.members:
        check_chain(member.chain, blocks)
    found = np.array([member.values for member in front.members]) * signs
    assert_same_front(found, np.array([[values[name] for name in objectives] for values in every]) * signs)


def assert_same_front(found: np.ndarray, every: np.ndarray) -> None:
    """Everything is matched or beaten, and what is found beats nothing of its own, to rounding."""
    scale = np.maximum(np.abs(every).max(axis=0), 1e-12)
    found, every = found / scale, every / scale
    for point in every:
        assert (found <= point + 1e-9).all(axis=1).any(), f"{point} is missed"
    assert len(found) <= len(np.unique(np.round(every, 12), axis=0))
    for row, point in enumerate(found):
        others = np.delete(found, row, axis=0)
        assert not ((others < point - 1e-9).all(axis=1)).any(), f"{point} is dominated"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("peers", "blocks"), [(60, 80), (150, 40)])
def test_pair_b_is_that_of_the_epsilon_constraint_loop(seed: int, peers: int, blocks: int) -> None:
    """The brief's loop: the shortest chain, then again without hops as slow as its slowest, until there is none."""
    view = random_swarm(np.random.default_rng(seed), peers=peers, blocks=blocks)
    graph = chain_graph(view, range(blocks))
    step, rate = step_cost(graph, 100), rate_cost(graph)
    loop = np.array(list(epsilon_constraint(graph, rate)))
    loop = loop[nondominated(loop)]
    swept = exact_front(graph, (step, rate))
    assert swept.complete
    assert len(swept.values) == len(loop)
    assert swept.values == pytest.approx(loop, rel=1e-9)


def epsilon_constraint(graph: ChainGraph, rate: BottleneckCost) -> list[tuple[float, float]]:
    laid, rates = edges(graph, step_cost(graph, 100)), edges(graph, rate)
    points: list[tuple[float, float]] = []
    bound = np.inf
    while True:
        total, path = shortest_path(graph, limited(laid, rates, bound))
        if not np.isfinite(total):
            return points
        begins = [graph.blocks.start, *(int(graph.end[server]) for server in path[:-1])]
        slowest = max(
            -min(
                float(rate.rate_per_block[server]) / float(graph.end[server] - begin),
                float(rate.rate_limit[server]),
            )
            for server, begin in zip(path, begins, strict=True)
        )
        points.append((total, slowest))
        bound = np.nextafter(slowest, -np.inf)


@pytest.mark.parametrize("seed", range(3))
def test_petals_chain_is_on_pair_a(seed: int) -> None:
    view = random_swarm(np.random.default_rng(seed), peers=60, blocks=80)
    latency = choose_chain(view, range(80), RouteWish(mode="latency"), rng=RNG)
    for mode in ("exact", "tradeoff"):
        wish = RouteWish(mode=mode, objectives=NETWORK_AND_COMPUTE, evaluations=400)
        front = choose_chain(view, range(80), wish, rng=RNG).front
        assert latency.chain in [member.chain for member in front.members]
        assert min(sum(member.values) for member in front.members) == pytest.approx(latency.expected_step_s)


def test_a_cut_short_search_gives_chains_and_says_so() -> None:
    view = random_swarm(np.random.default_rng(0), peers=60, blocks=80)
    wish = RouteWish(mode="exact", objectives=NETWORK_AND_COMPUTE)
    routed = choose_chain(view, range(80), wish, rng=RNG, deadline=lambda: True)
    check_chain(routed.chain, range(80))
    assert not routed.front.exact and "time" in routed.reasons[0]


def test_slack_loses_little() -> None:
    view = random_swarm(np.random.default_rng(0), peers=300, blocks=126)
    exact = front_of(view, 0.0)
    loose = front_of(view, 0.01)
    assert exact.exact and not loose.exact
    values = np.array([member.values for member in exact.members])
    extent = np.ptp(values, axis=0)
    found = np.array([member.values for member in loose.members])
    for point in values:
        assert (found <= point + 0.0100001 * extent).all(axis=1).any()


def front_of(view: SwarmView, slack_fraction: float) -> Front:
    wish = RouteWish(mode="exact", objectives=NETWORK_AND_COMPUTE, slack_fraction=slack_fraction)
    return choose_chain(view, range(view.model_blocks), wish, rng=RNG).front
