"""Sessions that start at once: values hop by hop, the front against every assignment of small swarms."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_swarms import every_chain, make_record, make_view, small_swarms
from test_load import plain_round_s

from plait.cluster import PeerRates, PeerRecord, PeerTerms, SwarmView, random_swarm
from plait.errors import BadRequest
from plait.routing import JointFront, JointObjectiveName, assign_chains, check_chain

TWO: tuple[JointObjectiveName, ...] = ("mean_round_s", "price")
ALL: tuple[JointObjectiveName, ...] = (
    "mean_round_s",
    "worst_round_s",
    "tokens_per_s",
    "price",
    "energy_j",
    "failure",
    "quantisation",
)
Chains = tuple[PeerRecord, ...]


def assigned(
    view: SwarmView,
    sessions: int,
    objectives: tuple[JointObjectiveName, ...] = TWO,
    evaluations: int = 1200,
) -> JointFront:
    return assign_chains(
        view,
        range(view.model_blocks),
        sessions=sessions,
        objectives=objectives,
        need_tokens=80,
        evaluations=evaluations,
        rng=np.random.default_rng(0),
    )


def plain_values(view: SwarmView, chains: tuple[Chains, ...], idle_s: float) -> dict[str, float]:
    """What an assignment comes to, chain by chain."""
    crossing: dict[str, int] = {}
    for record in itertools.chain.from_iterable(chains):
        crossing[record.peer] = crossing.get(record.peer, 0) + 1
    rounds_s: list[float] = []
    for chain in chains:
        crowded = tuple(
            replace(
                record,
                load=replace(record.load, sessions=record.load.sessions + crossing[record.peer] - 1),
            )
            for record in chain
        )
        rounds_s.append(plain_round_s(crowded, 80, idle_s))
    used = [view.records[peer] for peer in crossing]
    tokens_per_s = sum(1 / round_s for round_s in rounds_s)
    hazard = sum(1 / one.terms.mean_lifetime_s for one in used if one.terms.mean_lifetime_s)
    losses = {"int8": 1e-4, "int4": 1e-2}
    return {
        "mean_round_s": sum(rounds_s) / len(rounds_s),
        "worst_round_s": max(rounds_s),
        "tokens_per_s": tokens_per_s,
        "price": sum(one.terms.price_per_hour for one in used) / 3600 / tokens_per_s * 1e6,
        "energy_j": sum(one.terms.busy_watts for one in used) / tokens_per_s,
        "failure": 1 - float(np.exp(-80 * max(rounds_s) * hazard)),
        "quantisation": sum(
            losses.get(record.weight_format, 0.0) * blocks
            for chain in chains
            for record, blocks in zip(chain, _blocks_of(chain), strict=True)
        )
        / len(chains),
    }


def _blocks_of(chain: Chains) -> list[int]:
    ends = [0, *(record.end_block for record in chain)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def idle_round_s(view: SwarmView) -> float:
    chains = every_chain(view, range(view.model_blocks))
    nobody = (tuple(replace(r, load=replace(r.load, sessions=0)) for r in chain) for chain in chains)
    return min(plain_round_s(chain, 80, 1.0) for chain in nobody)


@settings(deadline=None, max_examples=25)
@given(small_swarms(max_peers=4, max_blocks=4), st.integers(1, 3))
def test_the_front_is_that_of_every_assignment_in_small_swarms(view: SwarmView, sessions: int) -> None:
    chains = list(every_chain(view, range(view.model_blocks)))
    if len(chains) ** sessions > 200:
        return
    assert assigned(view, sessions).exact
    idle_s = idle_round_s(view)
    front = assigned(view, sessions)
    every = np.array(
        [
            [plain_values(view, chosen, idle_s)[name] for name in TWO]
            for chosen in itertools.combinations_with_replacement(chains, sessions)
        ]
    )
    found = np.array([member.values for member in front.members])
    scale = np.maximum(np.abs(every).max(axis=0), 1e-12)
    for point in every:
        assert (found / scale <= point / scale + 1e-6).all(axis=1).any()


@settings(deadline=None, max_examples=25)
@given(small_swarms(max_peers=6), st.integers(1, 4), st.sampled_from([1200, 130]))
def test_values_are_what_they_say(view: SwarmView, sessions: int, evaluations: int) -> None:
    """Also where there are too many assignments to try all of them."""
    idle_s = idle_round_s(view)
    front = assigned(view, sessions, ALL, evaluations=evaluations)
    for member in (*front.members[:3], front.one_by_one):
        assert len(member.chains) == sessions
        for chain in member.chains:
            check_chain(chain, range(view.model_blocks))
        chosen = tuple(tuple(view.records[hop.peer] for hop in chain) for chain in member.chains)
        plain = plain_values(view, chosen, idle_s)
        assert member.values == pytest.approx([plain[name] for name in ALL], rel=1e-6, abs=1e-12)


def test_choosing_one_by_one_is_never_better() -> None:
    view = random_swarm(np.random.default_rng(0), peers=40, blocks=40)
    front = assigned(view, 8)
    in_turn = np.array(front.one_by_one.values)
    found = np.array([member.values for member in front.members])
    assert (found <= in_turn + 1e-12).all(axis=1).any()
    assert len(front.members) > 3 and found[:, 1].min() < 0.7 * in_turn[1]


def test_a_machine_in_use_is_paid_for_once() -> None:
    """Two slow machines that are cheap together and one fast one: eight sessions on one machine cost less than
    spread."""
    terms = PeerTerms(price_per_hour=1.0)
    rates = PeerRates(decode_tokens_per_s=100.0, saturated_decode_tokens_per_s=800.0)
    records = [make_record(name, 0, 4, rates=rates, terms=terms) for name in "abcd"]
    front = assigned(make_view(*records, blocks=4), 8)
    machines = [{hop.peer for chain in member.chains for hop in chain} for member in front.members]
    assert len(machines[0]) == 4, "the quickest spreads"
    assert len(machines[-1]) == 1, "the cheapest does not"


def test_the_same_seed_gives_the_same_front_and_mistakes_are_named() -> None:
    view = random_swarm(np.random.default_rng(0), peers=20, blocks=20)
    assert assigned(view, 3) == assigned(view, 3)
    with pytest.raises(BadRequest, match="sessions"):
        assigned(view, 0)
    with pytest.raises(BadRequest, match="two or more"):
        assigned(view, 2, ("price", "price"))
