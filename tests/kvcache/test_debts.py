"""The ledger, cycles of debts, and the plan that says who lends to whom."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.ids import PeerId, RequestId
from plait.kvcache import (
    DebtHeartbeat,
    DebtLedger,
    InstanceLoad,
    LayerTimes,
    LendingRules,
    MovableRequest,
    PlacementChange,
    StepSample,
    after_move,
    best_move,
    fit_layer_times,
    plan_lending,
    plan_take_home,
    settle_cycles,
)

A, B, C, D = (PeerId(name) for name in "abcd")
peers = st.sampled_from([A, B, C, D])
graphs = st.dictionaries(
    st.tuples(peers, peers).filter(lambda edge: edge[0] != edge[1]), st.integers(1, 9), max_size=9
)


def heartbeat(
    instance: PeerId, number: int, *, whole: bool = False, lendable_blocks: int = 0, **told: object
) -> DebtHeartbeat:
    nothing: dict[str, object] = {"lent": {}, "borrowed": {}, "changes": ()}
    return DebtHeartbeat(
        instance=instance,
        number=number,
        whole=whole,
        kv_blocks=10,
        free_blocks=5,
        lendable_blocks=lendable_blocks,
        running=1,
        waiting=0,
        **(nothing | told),  # pyright: ignore[reportArgumentType]
    )


def test_a_ledger_that_missed_something_asks_for_all_and_knows_it_then() -> None:
    change = PlacementChange(RequestId("r"), B, 3)
    ledger = DebtLedger()
    assert not ledger.hear(heartbeat(A, 4, changes=(change,)), 0.0)
    assert ledger.rows == {}
    assert ledger.hear(heartbeat(A, 5, whole=True, changes=(change,)), 1.0)
    assert ledger.placement(A) == {RequestId("r"): {B: 3}}
    assert ledger.hear(heartbeat(A, 6, changes=(PlacementChange(RequestId("r"), B, 0),)), 2.0)
    assert ledger.placement(A) == {}
    assert not ledger.hear(heartbeat(A, 8), 3.0), "heartbeat 7 is missing"
    assert ledger.hear(heartbeat(A, 6, changes=(change,)), 3.0) and ledger.placement(A) == {}, "it came twice"


@given(st.data())
def test_a_ledger_that_died_knows_the_same_after_one_round(data: st.DataObject) -> None:
    lives, restarted = DebtLedger(), DebtLedger()
    placed: dict[PeerId, dict[tuple[RequestId, PeerId], int]] = {A: {}, B: {}}
    number = 0
    for number in range(data.draw(st.integers(1, 6))):
        for instance, known in placed.items():
            request, holder = RequestId(data.draw(st.sampled_from("rst"))), data.draw(peers)
            known[request, holder] = blocks = data.draw(st.integers(0, 3))
            change = PlacementChange(request, holder, blocks)
            assert lives.hear(heartbeat(instance, number, whole=number == 0, changes=(change,)), 0.0)
    for instance, known in placed.items():
        everything = tuple(PlacementChange(*key, blocks) for key, blocks in known.items() if blocks)
        assert not restarted.hear(heartbeat(instance, number + 1), 1.0)
        assert restarted.hear(heartbeat(instance, number + 1, whole=True, changes=everything), 1.0)
        assert lives.hear(heartbeat(instance, number + 1), 1.0)
        assert restarted.placement(instance) == lives.placement(instance)
    assert restarted.rows.keys() == lives.rows.keys()


def test_the_ledger_names_debts_that_both_ends_tell_differently() -> None:
    ledger = DebtLedger()
    ledger.hear(heartbeat(A, 0, whole=True, lent={B: 4}), 0.0)
    assert ledger.disagreements() == (), "the other end is not known yet"
    ledger.hear(heartbeat(B, 0, whole=True, borrowed={A: 3}), 5.0)
    [found] = ledger.disagreements()
    assert (found.debtor, found.creditor, found.lent_blocks, found.borrowed_blocks) == (B, A, 4, 3)
    assert ledger.debts() == {(B, A): 3}
    assert ledger.forget_silent(1.0) == (A,) and ledger.disagreements() == () and ledger.debts() == {}


def test_candidates_are_near_ones_with_enough_then_those_with_most() -> None:
    ledger = DebtLedger()
    for instance, lendable in ((A, 9), (B, 20), (C, 8), (D, 3), (PeerId("e"), 2), (PeerId("f"), 0)):
        ledger.hear(heartbeat(instance, 0, whole=True, lendable_blocks=lendable), 0.0)
    assert ledger.candidates(A, 8, {B: 0.2, C: 0.1}) == (C, B, D)
    assert ledger.candidates(B, 10, {}) == (A, C, D)
    assert ledger.candidates(PeerId("f"), 30, {D: 0.0}) == (B, A, C)


def net_lent(debts: dict[tuple[PeerId, PeerId], int]) -> dict[PeerId, int]:
    return {
        peer: sum(
            blocks * ((creditor == peer) - (debtor == peer)) for (debtor, creditor), blocks in debts.items()
        )
        for peer in (A, B, C, D)
    }


@given(graphs)
def test_settling_leaves_no_cycle_and_nobody_better_or_worse_off(
    debts: dict[tuple[PeerId, PeerId], int],
) -> None:
    settlements, left = settle_cycles(debts)
    assert net_lent(left) == net_lent(debts)
    assert all(0 < blocks <= debts[edge] for edge, blocks in left.items()), "no debt grows"
    moved = sum(len(each.members) * each.kv_blocks for each in settlements)
    assert sum(left.values()) == sum(debts.values()) - moved
    remaining = set(left)
    while remaining:
        ends = {debtor for debtor, _ in remaining}
        leaves = {edge for edge in remaining if edge[1] not in ends}
        assert leaves, f"a cycle among {remaining}"
        remaining -= leaves
    assert settle_cycles(dict(reversed(debts.items()))) == (settlements, left)


def test_three_who_borrow_from_each_other_take_the_smallest_debt_home() -> None:
    [settlement], left = settle_cycles({(B, C): 5, (A, B): 3, (C, A): 4})
    assert settlement.members == (A, B, C) and settlement.kv_blocks == 3
    assert left == {(B, C): 2, (C, A): 1}


@given(graphs, st.dictionaries(peers, st.integers(0, 12)))
def test_what_goes_home_fits_and_is_owed(
    debts: dict[tuple[PeerId, PeerId], int], free: dict[PeerId, int]
) -> None:
    homeward = plan_take_home(debts, free)
    for peer in (A, B, C, D):
        taken = sum(each.kv_blocks for each in homeward if each.debtor == peer)
        owed = sum(blocks for (debtor, _), blocks in debts.items() if debtor == peer)
        assert taken == min(owed, free.get(peer, 0))
    assert all(0 < each.kv_blocks <= debts[each.debtor, each.creditor] for each in homeward)


TIMES = LayerTimes(layers=4, flat_s=1e-3, per_request_s=2e-4, per_token_s=1e-7, per_holder_s=2e-5)
RULES = LendingRules(small_batch=4)
BLOCK_TOKENS = 16


def load(id: PeerId, **fields: object) -> InstanceLoad:
    values: dict[str, object] = {
        "times": TIMES,
        "running": 1,
        "waiting": 0,
        "kv_blocks": 100,
        "free_blocks": 0,
        "lendable_blocks": 0,
        "attended_tokens": 1600,
        "mean_request_tokens": 320.0,
    }
    return InstanceLoad(id=id, **(values | fields))  # pyright: ignore[reportArgumentType]


def crowded(id: PeerId, **fields: object) -> InstanceLoad:
    """One long request fills the memory; others wait."""
    request = MovableRequest(RequestId(f"long-{id}"), 1600, 99)
    return load(id, **({"waiting": 5, "requests": (request,)} | fields))


def empty(id: PeerId, free_blocks: int = 90) -> InstanceLoad:
    return load(id, free_blocks=free_blocks, lendable_blocks=free_blocks, attended_tokens=160)


def test_a_crowded_instance_moves_its_long_request_to_the_emptiest() -> None:
    moves = plan_lending([crowded(A), empty(B, 30), empty(C, 90)], RULES, BLOCK_TOKENS, 0.0)
    assert moves[0].debtor == A and moves[0].creditor == C and moves[0].request == "long-a"
    assert moves[0].gain_fraction >= RULES.least_gain_fraction
    assert sum(move.kv_blocks for move in moves) <= 99


@pytest.mark.parametrize(
    "instances",
    [
        [crowded(A, waiting=0), empty(B)],
        [crowded(A, running=4), empty(B)],
        [crowded(A, moved_s=-1.0), empty(B)],
        [crowded(A), crowded(B)],
    ],
    ids=[
        "nobody waits",
        "the batch is large",
        "it moved just now",
        "nobody has room",
    ],
)
def test_nothing_moves_where_nothing_is_gained(instances: list[InstanceLoad]) -> None:
    assert plan_lending(instances, RULES, BLOCK_TOKENS, 0.0) == ()


def test_slow_links_keep_blocks_at_home() -> None:
    slow = LayerTimes(layers=4, flat_s=1e-3, per_request_s=2e-4, per_token_s=1e-7, per_holder_s=0.05)
    far = [crowded(A, times=slow), empty(B)]
    assert plan_lending(far, RULES, BLOCK_TOKENS, 0.0) == ()


@pytest.mark.parametrize("knee", [1, 4, 8])
def test_times_are_found_again_from_noisy_steps(knee: int) -> None:
    times = LayerTimes(layers=4, flat_s=2e-4 * knee, per_request_s=2e-4, per_token_s=3e-7, per_holder_s=1e-4)
    rng = np.random.default_rng(knee)
    samples = [
        StepSample(
            requests, tokens, holders, 4 * times.seconds(requests, tokens, holders) * rng.normal(1, 0.02)
        )
        for requests, tokens, holders in product((1, 2, 4, 8, 16), (100, 1000, 5000), (0, 1, 2))
    ]
    found = fit_layer_times(samples, 4)
    for name in ("flat_s", "per_request_s", "per_token_s", "per_holder_s"):
        assert getattr(found, name) == pytest.approx(getattr(times, name), rel=0.15), name


def test_a_fit_never_claims_that_work_saves_time() -> None:
    samples = [StepSample(requests, 100 * requests, 0, 1.0 - 0.01 * requests) for requests in (1, 2, 3, 4)]
    found = fit_layer_times(samples, 1)
    assert found.per_token_s >= 0 and found.per_holder_s >= 0 and found.flat_s > 0


def total(loads: list[InstanceLoad]) -> float:
    return sum(each.throughput for each in loads)


def best_by_trying_all(
    loads: dict[PeerId, InstanceLoad], debtors: list[PeerId], creditors: list[PeerId]
) -> float:
    """The best throughput over all amounts, in steps of ten blocks, of each debtor's one request at each creditor."""
    best = -math.inf
    pairs = list(product(debtors, creditors))
    for amounts in product(range(0, 100, 10), repeat=len(pairs)):
        state = dict(loads)
        movable = {debtor: loads[debtor].requests[0].movable_blocks for debtor in debtors}
        for (debtor, creditor), blocks in zip(pairs, amounts, strict=True):
            if not blocks:
                continue
            if blocks > movable[debtor] or blocks > state[creditor].lendable_blocks:
                break
            movable[debtor] -= blocks
            state[debtor], state[creditor] = after_move(state[debtor], state[creditor], blocks, BLOCK_TOKENS)
        else:
            best = max(best, total(list(state.values())))
    return best


def best_fraction(debtors: int, creditors: int, seed: int) -> float:
    """What the greedy plan makes of a small swarm, as a fraction of the best plan there is."""
    rng = np.random.default_rng(seed)
    ids = [A, B, C, D]
    loads = {
        each: crowded(
            each,
            waiting=int(rng.integers(1, 9)),
            running=int(rng.integers(1, 4)),
            mean_request_tokens=float(rng.integers(100, 600)),
        )
        for each in ids[:debtors]
    } | {each: empty(each, int(rng.integers(3, 10)) * 10) for each in ids[2 : 2 + creditors]}
    state = dict(loads)
    for move in plan_lending(list(loads.values()), RULES, BLOCK_TOKENS, 0.0):
        state[move.debtor], state[move.creditor] = after_move(
            state[move.debtor], state[move.creditor], move.kv_blocks, BLOCK_TOKENS
        )
    assert all(each.free_blocks >= 0 and each.lendable_blocks >= 0 for each in state.values())
    assert total(list(state.values())) >= total(list(loads.values()))
    best = best_by_trying_all(loads, ids[:debtors], ids[2 : 2 + creditors])
    return total(list(state.values())) / best


def test_the_greedy_plan_is_near_the_best_of_all() -> None:
    """Small batches first is not always best: whose requests are short gains more from the same memory."""
    fractions = [
        best_fraction(debtors, creditors, seed)
        for debtors, creditors, seeds in ((1, 1, 40), (1, 2, 20), (2, 1, 40), (2, 2, 3))
        for seed in range(seeds)
    ]
    assert np.median(fractions) > 0.99 and min(fractions) > 0.97


def test_the_best_move_is_the_best_of_all_amounts() -> None:
    debtor, creditor = crowded(A), empty(B)
    blocks, gain = best_move(debtor, creditor, 99, BLOCK_TOKENS)
    values = [total(list(after_move(debtor, creditor, each, BLOCK_TOKENS))) for each in range(1, 91)]
    assert values[blocks - 1] == max(values)
    assert gain == pytest.approx(max(values) / total([debtor, creditor]) - 1)
