"""Mode `load`: the round of every chain of small swarms, counted hop by hop; what load does to the choice."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_swarms import (
    every_chain,
    every_early_chain,
    make_record,
    make_view,
    petals_delay_s,
    small_swarms,
)

from plait.cluster import PeerLoad, PeerRates, PeerRecord, SwarmView, random_swarm
from plait.routing import RouteWish, check_chain, choose_chain, expected_round_s
from plait.routing.graph import chain_graph
from plait.routing.load import (
    HOP_OVERHEAD_S,
    MAX_FIRST_HOPS,
    LoadTerms,
    closing_delays_s,
    least_loaded_round,
    shortest_round,
)
from plait.routing.sweep import edges, shortest_path

RATES = PeerRates(decode_tokens_per_s=100.0, saturated_decode_tokens_per_s=400.0)


def least_round(
    view: SwarmView, need_tokens: int, spread: float = 0.0, seed: int = 0, early_exits: bool = True
) -> tuple[float, list[str]]:
    graph = chain_graph(view, range(view.model_blocks), either_way=True, early_exits=early_exits)
    round_s, path = least_loaded_round(
        graph,
        need_tokens=need_tokens,
        unannounced={},
        closed=True,
        rng=np.random.default_rng(seed),
        spread=spread,
    )
    check_chain(graph.chain(path), range(view.model_blocks))
    return round_s, [graph.records[server].name for server in path]


def plain_round_s(
    chain: tuple[PeerRecord, ...], need_tokens: int, round_s: float, ends: tuple[int, ...] = ()
) -> float:
    """One round with the announced sessions, as the module's docstring tells it; `ends` of hops that end early."""
    total = boundary = 0.0
    ends = ends or tuple(record.end_block for record in chain)
    for number, (record, end) in enumerate(zip(chain, ends, strict=True)):
        following = chain[(number + 1) % len(chain)]
        if len(chain) > 1:
            total += petals_delay_s(record.rtts_s.get(following.peer, following.rtts_s.get(record.peer)))
        alone_s = 1 / (record.rates.decode_tokens_per_s or 300.0)
        saturated = record.rates.saturated_decode_tokens_per_s
        row_s = min(1 / saturated, alone_s) if saturated else alone_s
        blocks = len(record.span)
        others = tokens_of_others(record.load.sessions, blocks * (alone_s - row_s), blocks * row_s, round_s)
        used = end - boundary
        boundary = end
        if end < record.end_block:
            total += min(others, 1) * blocks * (alone_s - row_s)
        total += HOP_OVERHEAD_S + used * (alone_s - row_s + row_s * (1 + others))
        total += min(others, 1) * blocks * (alone_s - row_s + row_s * max(others, 1)) / 2
        if record.rates.network_tokens_per_s:
            total += 1 / record.rates.network_tokens_per_s
        if record.rates.prefill_tokens_per_s:
            total += record.load.queued_tokens * blocks / record.rates.prefill_tokens_per_s / 128
        if record.load.kv_total_tokens and need_tokens > record.load.kv_free_tokens:
            total += 10.0
    return total


def tokens_of_others(sessions: int, pass_s: float, row_s: float, round_s: float) -> float:
    """m = S t / (Z + t), by bisection."""
    low, high = 0.0, float(sessions)
    for _ in range(200):
        middle = (low + high) / 2
        takes_s = pass_s + row_s * max(middle, 1.0)
        low, high = (middle, high) if middle * (round_s + takes_s) < sessions * takes_s else (low, middle)
    return low


@given(small_swarms(), st.integers(0, 120))
def test_it_is_the_least_round_of_every_chain(view: SwarmView, need_tokens: int) -> None:
    blocks = range(view.model_blocks)
    chains = list(every_chain(view, blocks))
    idle_s = min(plain_round_s(chain, need_tokens, 1.0) for chain in map(without_sessions, chains))
    expected_s = min(plain_round_s(chain, need_tokens, idle_s) for chain in chains)
    round_s, names = least_round(view, need_tokens, early_exits=False)
    assert round_s == pytest.approx(expected_s, rel=1e-6)
    chosen = next(chain for chain in chains if [record.name for record in chain] == names)
    assert plain_round_s(chosen, need_tokens, idle_s) == pytest.approx(expected_s, rel=1e-6)


@given(small_swarms(max_peers=6), st.integers(0, 120))
def test_with_early_exits_it_is_the_least_round_of_those_chains(view: SwarmView, need_tokens: int) -> None:
    chains = [
        (tuple(record for record, _ in chain), tuple(end for _, end in chain))
        for chain in every_early_chain(view, range(view.model_blocks))
    ]
    idle_s = min(
        plain_round_s(without_sessions(machines), need_tokens, 1.0, ends) for machines, ends in chains
    )
    expected_s = min(plain_round_s(machines, need_tokens, idle_s, ends) for machines, ends in chains)
    round_s, names = least_round(view, need_tokens)
    assert round_s == pytest.approx(expected_s, rel=1e-6)
    assert len(set(names)) == len(names)
    assert round_s <= least_round(view, need_tokens, early_exits=False)[0] * (1 + 1e-9) or any(
        record.load.sessions for record in view.records.values()
    )


def test_the_faster_of_two_takes_what_both_hold() -> None:
    slow = make_record("slow", 0, 4, rates=replace(RATES, decode_tokens_per_s=50.0), rtts_s={})
    fast = make_record("fast", 2, 4, rates=RATES, rtts_s={slow.peer: 0.001})
    view = make_view(slow, fast, blocks=4)
    routed = choose_chain(view, range(4), RouteWish(), rng=np.random.default_rng(0))
    assert [(hop.peer, hop.span) for hop in routed.chain] == [
        (slow.peer, range(2)),
        (fast.peer, range(2, 4)),
    ]
    # PETALS stays to the span's end, and so does `exact` unless it is asked.
    for mode in ("latency", "exact"):
        routed = choose_chain(view, range(4), RouteWish(mode=mode), rng=np.random.default_rng(0))  # type: ignore[arg-type]
        assert [hop.peer for hop in routed.chain] == [slow.peer]


def without_sessions(chain: tuple[PeerRecord, ...]) -> tuple[PeerRecord, ...]:
    return tuple(replace(record, load=replace(record.load, sessions=0)) for record in chain)


def test_a_busy_server_is_avoided_and_an_idle_one_is_not() -> None:
    def names(busy_sessions: int) -> list[str]:
        busy = make_record("busy", 0, 4, rates=RATES, load=PeerLoad(sessions=busy_sessions))
        slow = make_record("slow", 0, 4, rates=replace(RATES, decode_tokens_per_s=50.0))
        return least_round(make_view(busy, slow, blocks=4), 0)[1]

    assert names(0) == ["busy"]
    assert names(20) == ["slow"]


def test_rounds_grow_with_sessions() -> None:
    rounds = [
        least_round(
            make_view(make_record("a", 0, 4, rates=RATES, load=PeerLoad(sessions=sessions)), blocks=4), 0
        )[0]
        for sessions in range(0, 40, 4)
    ]
    assert rounds == sorted(rounds) and rounds[0] == pytest.approx(4 / 100 + HOP_OVERHEAD_S)
    # Full passes: everybody is there each time, and a token waits for half a pass before its own.
    many = least_round(
        make_view(make_record("a", 0, 4, rates=RATES, load=PeerLoad(sessions=4000)), blocks=4), 0
    )[0]
    assert many == pytest.approx(1.5 * 4000 * 4 / 400, rel=0.01)


def test_the_token_goes_from_the_last_hop_to_the_first() -> None:
    """The client is near to both pairs; only the ring tells them apart."""
    last_near, last_far = (make_record(name, 2, 4, rates=RATES) for name in ("last-near", "last-far"))
    first = make_record("first", 0, 2, rates=RATES, rtts_s={last_near.peer: 0.04, last_far.peer: 0.001})
    back = {first.peer: 0.5}
    view = make_view(first, last_near, replace(last_far, rtts_s=back), blocks=4)
    round_s, names = least_round(view, 0)
    assert names == ["first", "last-near"]
    assert round_s == pytest.approx(4 / 100 + 2 * HOP_OVERHEAD_S + 2 * 0.02)
    alone = make_record("alone", 0, 4, rates=replace(RATES, decode_tokens_per_s=90.0))
    assert least_round(make_view(first, last_near, alone, blocks=4), 0)[1] == ["alone"]


def test_clients_that_choose_at_once_spread_and_a_lone_one_loses_little() -> None:
    alike = [make_record(f"p{number}", 0, 4, rates=RATES) for number in range(6)]
    view = make_view(*alike, blocks=4)
    chosen = Counter(
        choose_chain(view, range(4), RouteWish(), rng=np.random.default_rng(seed)).chain[0].peer
        for seed in range(120)
    )
    assert len(chosen) == 6 and max(chosen.values()) < 40
    for swarm in range(4):
        view = random_swarm(np.random.default_rng(swarm), peers=40, blocks=40)
        best_s, _ = least_round(view, 0)
        spread_s = [least_round(view, 0, spread=0.1, seed=seed)[0] for seed in range(10)]
        assert best_s <= min(spread_s) * (1 + 1e-12) and np.mean(spread_s) < 1.03 * best_s


def test_sessions_that_are_not_announced_yet_count() -> None:
    view = make_view(make_record("a", 0, 4, rates=RATES), make_record("b", 0, 4, rates=RATES), blocks=4)
    for busy in view.records:
        routed = choose_chain(
            view, range(4), RouteWish(), rng=np.random.default_rng(0), unannounced={busy: 30}
        )
        assert routed.chain[0].peer != busy
        assert math.isfinite(routed.expected_step_s)


def test_any_chain_has_the_round_that_mode_load_would_give_it() -> None:
    for seed in range(6):
        view = random_swarm(np.random.default_rng(seed), peers=12, blocks=24)
        rng = np.random.default_rng(seed)
        best = choose_chain(view, range(24), RouteWish(), rng=rng)
        assert expected_round_s(view, best.chain) == pytest.approx(best.expected_step_s, rel=1e-12)
        least_s, _ = least_round(view, 0)
        for mode in ("latency", "throughput"):
            routed = choose_chain(view, range(24), RouteWish(mode=mode), rng=rng)
            assert expected_round_s(view, routed.chain) >= least_s * (1 - 1e-12)


def test_a_chain_of_machines_that_leave_has_no_expected_time() -> None:
    view = random_swarm(np.random.default_rng(0), peers=12, blocks=24)
    chain = choose_chain(view, range(24), RouteWish(), rng=np.random.default_rng(0)).chain
    leaving = replace(
        view, records={peer: replace(record, state="draining") for peer, record in view.records.items()}
    )
    assert expected_round_s(leaving, chain) == math.inf


@pytest.mark.parametrize("seed", range(12))
def test_a_search_that_follows_only_what_is_promising_finds_the_same_round(seed: int) -> None:
    """Against the search that follows everything, on swarms with and without gaps in what is known of delays."""
    rng = np.random.default_rng(seed)
    view = random_swarm(
        rng, peers=int(rng.choice([6, 30, 80])), blocks=40, pinged_peers=None if seed % 2 else 5
    )
    graph = chain_graph(view, range(40), either_way=True, early_exits=True)
    sessions = rng.integers(0, 20, graph.servers).astype(np.float64)
    terms = LoadTerms(graph)
    cost = terms.cost(100, sessions, round_s=0.1)
    closing_s = closing_delays_s(graph)
    laid = edges(graph, cost)
    entering = laid.entering - cost.entry[graph.entering]
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for first in range(len(entering)):
        alone = np.full(len(entering), np.inf)
        alone[first] = entering[first]
        best = min(best, shortest_path(graph, replace(laid, entering=alone, leaving=closing_s[:, first])))
    found_s, path = shortest_round(graph, cost, closing_s)
    assert found_s >= best[0] and (found_s == best[0] or len(entering) > MAX_FIRST_HOPS)
    assert terms.round_s(cost, path, closed=True) == pytest.approx(found_s, rel=1e-12)
