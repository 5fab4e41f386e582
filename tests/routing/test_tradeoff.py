"""The evolutionary search: close to the exact front, the same for the same seed, never empty-handed."""

import numpy as np
import pytest
from small_swarms import make_record, make_view

from plait.cluster import PeerRates, SwarmView, random_swarm
from plait.errors import NoRoute
from plait.routing import (
    LATENCY_AND_THROUGHPUT,
    NETWORK_AND_COMPUTE,
    Front,
    ObjectiveName,
    Router,
    RouteWish,
    alternatives,
    check_chain,
    choose_chain,
    normalised_hypervolume,
)

SIGNS = {"rate_tokens_per_s": -1.0}


def front(view: SwarmView, seed: int, **wish: object) -> Front:
    asked = RouteWish(**{"mode": "tradeoff", "evaluations": 2000, **wish})  # type: ignore[arg-type]
    routed = choose_chain(view, range(view.model_blocks), asked, rng=np.random.default_rng(seed))
    for member in routed.front.members:
        check_chain(member.chain, range(view.model_blocks))
    return routed.front


def costs(front: Front) -> np.ndarray:
    signs = [SIGNS.get(name, 1.0) for name in front.objectives]
    return np.array([member.values for member in front.members]) * signs


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [NETWORK_AND_COMPUTE, LATENCY_AND_THROUGHPUT])
@pytest.mark.parametrize("swarm", range(2))
def test_it_comes_close_to_the_exact_front(objectives: tuple[ObjectiveName, ...], swarm: int) -> None:
    view = random_swarm(np.random.default_rng(swarm), peers=60, blocks=80)
    exact = costs(front(view, 0, mode="exact", objectives=objectives))
    shares = [
        normalised_hypervolume(costs(front(view, seed, objectives=objectives)), exact) for seed in range(2)
    ]
    assert min(shares) >= 0.97
    assert max(shares) - min(shares) <= 0.02


def test_the_same_seed_gives_the_same_front() -> None:
    view = random_swarm(np.random.default_rng(1), peers=40, blocks=40)
    assert front(view, 7, evaluations=500) == front(view, 7, evaluations=500)


def test_three_objectives_and_one_that_does_not_decompose() -> None:
    view = random_swarm(np.random.default_rng(1), peers=25, blocks=20)
    objectives: tuple[ObjectiveName, ...] = ("step_s", "price", "failure")
    found = front(view, 0, objectives=objectives, need_tokens=500)
    exact = front(view, 0, mode="exact", objectives=objectives, need_tokens=500)
    assert exact.exact and len(exact.members) > 3
    points, best = costs(found), costs(exact)
    # Nothing that was found beats the exact front, and its best by every objective is there.
    for point in points:
        assert (best <= point * (1 + 1e-9)).all(axis=1).any()
    assert points.min(axis=0) == pytest.approx(best.min(axis=0), rel=0.02)


def test_a_deadline_that_has_passed_leaves_the_shortest_chains() -> None:
    view = random_swarm(np.random.default_rng(1), peers=40, blocks=40)
    wish = RouteWish(mode="tradeoff", objectives=NETWORK_AND_COMPUTE)
    rng = np.random.default_rng(0)
    routed = choose_chain(view, range(40), wish, rng=rng, deadline=lambda: True)
    latency = choose_chain(view, range(40), RouteWish(mode="latency"), rng=rng)
    assert latency.chain in [member.chain for member in routed.front.members]
    assert "without time" in routed.reasons[0]


def test_a_repair_takes_what_is_left_of_the_front() -> None:
    view = random_swarm(np.random.default_rng(1), peers=60, blocks=80)
    wish = RouteWish(mode="tradeoff", objectives=NETWORK_AND_COMPUTE, evaluations=600)
    router, rng = Router(), np.random.default_rng(0)
    first = router.choose(view, range(80), wish, rng=rng)
    each = (frozenset({hop.peer}) for hop in first.chain)
    lost = next(peers for peers in each if alternatives(first.front, peers))
    left = alternatives(first.front, lost)
    repaired = router.choose(view, range(80), wish, rng=rng, without=lost)
    chains = [member.chain for member in repaired.front.members]
    assert "left of the front" in repaired.reasons[0]
    assert repaired.chain in chains and set(chains) <= {member.chain for member in left} | {
        choose_chain(view, range(80), RouteWish(mode="latency"), rng=rng, without=lost).chain
    }
    # Of another part of the model nothing is known: that is searched for.
    other = router.choose(view, range(10, 40), wish, rng=rng, without=lost)
    assert "NSGA-II" in other.reasons[0]


def test_a_deadline_ends_the_search_with_what_it_has() -> None:
    view = random_swarm(np.random.default_rng(1), peers=40, blocks=40)
    asked: list[bool] = []

    def deadline() -> bool:
        asked.append(len(asked) > 4)
        return asked[-1]

    wish = RouteWish(mode="tradeoff", evaluations=100_000)
    routed = choose_chain(view, range(40), wish, rng=np.random.default_rng(0), deadline=deadline)
    assert routed.front.members and len(asked) < 10


@pytest.mark.parametrize("mode", ["exact", "tradeoff"])
def test_a_hop_limit_holds_or_is_an_error(mode: str) -> None:
    quick = {"rates": PeerRates(decode_tokens_per_s=1e6)}
    halves = (make_record("a", 0, 3, **quick), make_record("b", 3, 6, **quick))
    whole = make_record("c", 0, 6)
    view = make_view(*halves, whole, blocks=6)
    rng = np.random.default_rng(0)
    wish = RouteWish(mode=mode, max_hops=1, evaluations=200)  # type: ignore[arg-type]
    routed = choose_chain(view, range(6), wish, rng=rng)
    assert [len(member.chain) for member in routed.front.members] == [1]
    with pytest.raises(NoRoute, match="more than 1 hops"):
        choose_chain(make_view(*halves, blocks=6), range(6), wish, rng=rng)
