"""Ten thousand chains through every operator: each covers every block once, in order, with no empty hop and no peer
twice."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from small_swarms import small_swarms

from plait.cluster import SwarmView, random_swarm
from plait.routing import check_chain
from plait.routing.costs import seconds_per_block
from plait.routing.graph import ChainGraph, chain_graph
from plait.routing.operators import PathOperators
from plait.routing.random_walk import random_walk

CHAINS = 10_000


def operators_on(graph: ChainGraph) -> PathOperators:
    return PathOperators(graph, seconds_per_block(graph))


def check(graph: ChainGraph, path: tuple[int, ...]) -> None:
    check_chain(graph.chain(path), graph.blocks)


def test_ten_thousand_chains_through_every_operator() -> None:
    rng = np.random.default_rng(0)
    drawn = 0
    while drawn < CHAINS:
        blocks = int(rng.integers(1, 40))
        view = random_swarm(rng, peers=int(rng.integers(1, 25)), blocks=blocks)
        first = int(rng.integers(blocks))
        graph = chain_graph(view, range(first, int(rng.integers(first, blocks)) + 1))
        operators = operators_on(graph)
        population = [operators.draw(rng) for _ in range(20)]
        for _ in range(60):
            one, other = (population[int(rng.integers(20))] for _ in range(2))
            crossed = operators.cross(one, other, rng)
            mutant = operators.mutate(one, rng)
            genes = rng.integers(0, graph.servers, int(rng.integers(0, 9))).tolist()
            repaired = operators.repair(genes)
            for path in (*crossed, mutant, repaired):
                check(graph, path)
                drawn += 1
            population[int(rng.integers(20))] = crossed[0]
            population[int(rng.integers(20))] = mutant


@given(small_swarms(), st.integers(0, 2**32 - 1))
def test_operators_on_any_swarm(view: SwarmView, seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = chain_graph(view, range(view.model_blocks))
    operators = operators_on(graph)
    one, other = operators.draw(rng), operators.draw(rng)
    for path in (one, other, *operators.cross(one, other, rng), operators.mutate(one, rng)):
        check(graph, path)
        assert operators.repair(path) == path, "a chain needs no repair"
    check(graph, operators.repair(rng.integers(0, graph.servers, 4).tolist()))


def test_crossing_at_a_shared_boundary_swaps_tails() -> None:
    view = random_swarm(np.random.default_rng(3), peers=30, blocks=24)
    graph = chain_graph(view, range(24))
    operators, rng = operators_on(graph), np.random.default_rng(1)
    for _ in range(200):
        one, other = operators.draw(rng), operators.draw(rng)
        shared = {int(graph.end[server]) for server in one[:-1]} & {
            int(graph.end[server]) for server in other[:-1]
        }
        if shared:
            children = operators.cross(one, other, rng)
            assert sorted(children[0] + children[1]) == sorted(one + other)


def test_the_random_walk_favours_long_spans_and_avoids_the_unreachable() -> None:
    view = random_swarm(np.random.default_rng(0), peers=40, blocks=16)
    graph = chain_graph(view, range(16))
    rng = np.random.default_rng(2)
    firsts = [random_walk(graph, rng)[0] for _ in range(4000)]
    entering = graph.entering
    expected = graph.span_blocks[entering] / graph.span_blocks[entering].sum()
    share = np.array([firsts.count(int(server)) for server in entering]) / len(firsts)
    assert np.abs(share - expected).max() < 0.03
    unreachable = np.full(graph.servers, True)
    unreachable[entering[0]] = False
    object.__setattr__(graph, "unreachable", unreachable)
    assert {random_walk(graph, rng)[0] for _ in range(200)} == {int(entering[0])}
