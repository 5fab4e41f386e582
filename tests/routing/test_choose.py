"""What a wish may say, what a choice returns, and what happens when nothing can be chosen."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from small_swarms import make_record, make_view

from plait.cluster import PeerLoad, PeerRates, PeerRecord, SwarmView, peer_id_of_name, random_swarm
from plait.errors import BadRequest, NoCapacity, NoRoute
from plait.routing import (
    Balanced,
    Budget,
    LatencyFirst,
    RouteMode,
    Router,
    RouteWish,
    Sampled,
    ThroughputFirst,
    alternatives,
    choose_chain,
    parse_pick,
    wish_of_fields,
)

A, B, C, D = (peer_id_of_name(name) for name in "abcd")
RNG = np.random.default_rng(0)


def peers(view: SwarmView, wish: RouteWish, **more: object) -> list[str]:
    routed = choose_chain(view, range(view.model_blocks), wish, rng=RNG, **more)  # type: ignore[arg-type]
    return [view.records[hop.peer].name for hop in routed.chain]


def test_blocks_without_a_holder_are_named() -> None:
    view = make_view(make_record("a", 0, 3), make_record("b", 5, 8), blocks=9)
    with pytest.raises(NoRoute, match=r"blocks 3:5, 8:9 \(2 peers known\)") as caught:
        choose_chain(view, range(9), RouteWish(), rng=RNG)
    assert caught.value.missing_blocks == (3, 4, 8)
    assert isinstance(caught.value, NoCapacity)
    with pytest.raises(NoRoute, match="blocks 0:3"):
        choose_chain(view, range(3), RouteWish(), rng=RNG, without=frozenset({A}))


def test_joining_draining_and_offline_peers_serve_nothing() -> None:
    for state in ("joining", "draining", "offline"):
        view = make_view(make_record("a", 0, 3), make_record("b", 0, 3, state=state), blocks=3)
        assert peers(view, RouteWish(mode="latency")) == ["a"]


def test_bans_hold_unless_they_leave_nobody() -> None:
    records = (make_record("a", 0, 4), make_record("b", 0, 2), make_record("c", 2, 4))
    assert peers(make_view(*records, blocks=4, banned=frozenset({A})), RouteWish()) == ["b", "c"]
    assert peers(make_view(*records, blocks=4, banned=frozenset({A, B, C})), RouteWish()) == ["a"]
    # Of a banned peer only what nobody else serves is used.
    view = make_view(records[0], records[1], blocks=4, banned=frozenset({A}))
    routed = choose_chain(view, range(4), RouteWish(), rng=RNG)
    assert [(view.records[hop.peer].name, hop.span) for hop in routed.chain] == [
        ("b", range(2)),
        ("a", range(2, 4)),
    ]


def test_a_repair_counts_the_links_to_its_neighbours() -> None:
    near = make_record("near", 2, 4)
    far = make_record("far", 2, 4)
    first = make_record("a", 0, 2, rtts_s={near.peer: 0.2, far.peer: 0.01})
    last = make_record("b", 4, 6)
    gateway = {near.peer: 0.001, far.peer: 0.3}
    far = replace(far, rtts_s={last.peer: 0.01})
    near = replace(near, rtts_s={last.peer: 0.2})
    view = make_view(first, near, far, last, blocks=6, rtts_s=gateway)
    for mode in ("latency", "load"):
        wish = RouteWish(mode=mode)  # type: ignore[arg-type]
        alone = choose_chain(view, range(2, 4), RouteWish(mode="latency"), rng=RNG)
        between = choose_chain(view, range(2, 4), wish, rng=RNG, after=first.peer, before=last.peer)
        assert [hop.peer for hop in alone.chain] == [near.peer]
        assert [hop.peer for hop in between.chain] == [far.peer]


def test_pinned_peers_are_taken_in_their_order_or_refused() -> None:
    view = make_view(
        make_record("a", 0, 4),
        make_record("b", 2, 6),
        make_record("c", 4, 6),
        make_record("d", 4, 6, state="draining"),
        blocks=6,
    )
    assert peers(view, RouteWish(mode="pinned", pinned=(A, B))) == ["a", "b"]
    cases = [
        ((A,), BadRequest, r"cover blocks 0:4"),
        ((B,), BadRequest, r"holds blocks 2:6, but block 0 is next"),
        ((A, B, C), BadRequest, r"leave it out"),
        ((peer_id_of_name("x"),), BadRequest, r"not in this swarm"),
        ((A, D), NoRoute, r"is draining"),
    ]
    for pinned, kind, words in cases:
        with pytest.raises(kind, match=words):
            peers(view, RouteWish(mode="pinned", pinned=pinned))


def test_alternatives_avoid_a_peer() -> None:
    view = random_swarm(np.random.default_rng(0), peers=60, blocks=80)
    wish = RouteWish(mode="exact", objectives=("network_s", "compute_s"))
    front = choose_chain(view, range(80), wish, rng=RNG).front
    dead = front.members[0].chain[0].peer
    left = alternatives(front, frozenset({dead}))
    assert 0 < len(left) < len(front.members)
    assert all(hop.peer != dead for member in left for hop in member.chain)
    assert alternatives(front, frozenset()) == front.members


@pytest.mark.parametrize(
    ("text", "pick"),
    [
        ("balanced", Balanced()),
        ("latency-first", LatencyFirst()),
        ("throughput-first", ThroughputFirst()),
        ("sampled", Sampled()),
        ("budget=0.4", Budget(0.4)),
        ("weights=0.7,0.3", Balanced((0.7, 0.3))),
    ],
)
def test_picks_are_read(text: str, pick: object) -> None:
    assert parse_pick(text) == pick


@pytest.mark.parametrize(
    "text", ["", "best", "budget", "budget=x", "budget=-1", "budget=inf", "weights=1", "weights=0,0"]
)
def test_other_picks_are_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_pick(text)


def test_picks_take_the_point_they_promise() -> None:
    view = random_swarm(np.random.default_rng(1), peers=60, blocks=80)

    def values(pick: object) -> tuple[float, ...]:
        wish = RouteWish(mode="exact", objectives=("network_s", "compute_s"), pick=pick)  # type: ignore[arg-type]
        routed = choose_chain(view, range(80), wish, rng=RNG)
        return next(member.values for member in routed.front.members if member.chain == routed.chain)

    wish = RouteWish(mode="exact", objectives=("network_s", "compute_s"))
    every = np.array([m.values for m in choose_chain(view, range(80), wish, rng=RNG).front.members])
    assert values(LatencyFirst()) == tuple(every[every[:, 0].argmin()])
    assert values(ThroughputFirst()) == tuple(every[every[:, 1].argmin()])
    assert values(Balanced((1.0, 0.0))) == values(LatencyFirst())
    limit = float(np.median(every[:, 0]))
    within = every[every[:, 0] <= limit]
    assert values(Budget(limit)) == tuple(within[within[:, 1].argmin()])
    assert values(Budget(0.0)) == values(LatencyFirst())
    shares = (every - every.min(axis=0)) / np.ptp(every, axis=0)
    assert values(Balanced()) == tuple(every[shares.max(axis=1).argmin()])
    assert len({values(Sampled()) for _ in range(60)}) > 3
    with pytest.raises(BadRequest, match="3 weights for 2 objectives"):
        values(Balanced((1.0, 1.0, 1.0)))


def test_the_rate_is_shown_as_a_rate() -> None:
    view = make_view(make_record("a", 0, 2, rates=PeerRates(prefill_tokens_per_s=500.0)), blocks=2)
    routed = choose_chain(view, range(2), RouteWish(mode="exact"), rng=RNG)
    assert routed.front.members[0].values[1] == 250.0


def test_a_wish_is_read_from_a_request() -> None:
    view = make_view(make_record("attic", 0, 2), make_record("cellar", 2, 4), blocks=4)
    default = RouteWish(mode="latency")
    fields = {"mode": "exact", "pick": "budget=2", "objectives": ["step_s", "price"], "max_hops": 3}
    wish = wish_of_fields(fields, default, view)
    assert wish == RouteWish(mode="exact", pick=Budget(2.0), objectives=("step_s", "price"), max_hops=3)
    attic, cellar = peer_id_of_name("attic"), peer_id_of_name("cellar")
    pinned = wish_of_fields({"pinned": ["attic", cellar[:6]]}, default, view)
    assert pinned == RouteWish(mode="pinned", pinned=(attic, cellar))
    assert wish_of_fields({}, default, view) == default


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "fastest"},
        {"mode": "pinned"},
        {"mode": 3},
        {"speed": 1},
        {"objectives": ["step_s"]},
        {"objectives": ["step_s", "step_s"]},
        {"objectives": ["step_s", "beauty"]},
        {"pinned": []},
        {"pinned": ["nobody"]},
        {"max_hops": 0},
        {"max_hops": True},
        {"evaluations": 10**9},
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(fields: dict[str, object]) -> None:
    view = make_view(make_record("attic", 0, 2), blocks=2)
    with pytest.raises(BadRequest):
        wish_of_fields(fields, RouteWish(), view)


def test_a_full_cache_is_avoided_if_there_is_another() -> None:
    full = PeerLoad(kv_free_tokens=99, kv_total_tokens=1000)
    fast = PeerRates(decode_tokens_per_s=10_000.0)
    view = make_view(make_record("a", 0, 2, rates=fast, load=full), make_record("b", 0, 2), blocks=2)
    for mode in ("latency", "load", "exact"):
        assert peers(view, RouteWish(mode=mode, need_tokens=99)) == ["a"]  # type: ignore[arg-type]
        assert peers(view, RouteWish(mode=mode, need_tokens=100)) == ["b"]  # type: ignore[arg-type]


def test_a_router_keeps_what_holds_and_drops_what_does_not() -> None:
    view = random_swarm(np.random.default_rng(0), peers=30, blocks=40)
    router, rng = Router(), np.random.default_rng(0)
    wish = RouteWish(mode="tradeoff", evaluations=300)
    first = router.choose(view, range(40), wish, rng=rng)
    assert router.choose(view, range(40), wish, rng=rng).front is first.front
    other_pick = router.choose(view, range(40), replace(wish, pick=Sampled()), rng=rng)
    assert other_pick.front is first.front
    longer = router.choose(view, range(40), replace(wish, need_tokens=10**6), rng=rng)
    assert longer.front is not first.front
    dead = first.chain[0].peer
    later = replace(
        view, version=2, records={peer: record for peer, record in view.records.items() if peer != dead}
    )
    again = router.choose(later, range(40), wish, rng=rng)
    assert all(hop.peer != dead for member in again.front.members for hop in member.chain)


@pytest.mark.parametrize("mode", ["exact", "tradeoff"])
def test_a_front_outlives_announcements_that_do_not_matter_to_it(mode: RouteMode) -> None:
    view = random_swarm(np.random.default_rng(0), peers=30, blocks=40)
    rng = np.random.default_rng(0)

    def kept_after(change: Callable[[PeerRecord], PeerRecord]) -> bool:
        router = Router()
        wish = RouteWish(mode=mode, evaluations=100)
        first = router.choose(view, range(40), wish, rng=rng)
        records = {peer: change(record) for peer, record in view.records.items()}
        again = router.choose(replace(view, records=records, version=2), range(40), wish, rng=rng)
        return again.front is first.front

    def with_rtts(factor: float) -> Callable[[PeerRecord], PeerRecord]:
        return lambda record: replace(
            record, rtts_s={peer: factor * rtt_s for peer, rtt_s in record.rtts_s.items()}
        )

    def with_rates(factor: float, name: str) -> Callable[[PeerRecord], PeerRecord]:
        return lambda record: replace(
            record, rates=replace(record.rates, **{name: factor * getattr(record.rates, name)})
        )

    assert kept_after(lambda record: replace(record, sequence=9, load=replace(record.load, sessions=7)))
    assert kept_after(with_rtts(1.1)) and not kept_after(with_rtts(1.5))
    assert kept_after(with_rates(1.02, "decode_tokens_per_s"))
    assert not kept_after(with_rates(1.2, "decode_tokens_per_s"))
    assert not kept_after(with_rates(0.01, "network_tokens_per_s"))
    blocks = min(view.records.values(), key=lambda record: record.first_block)
    moved = replace(blocks, end_block=blocks.end_block + 1)
    assert not kept_after(lambda record: moved if record.peer == moved.peer else record)


def test_a_router_counts_its_own_sessions_until_they_are_announced() -> None:
    alike = {"rates": PeerRates(decode_tokens_per_s=100.0, saturated_decode_tokens_per_s=100.0)}
    records = [make_record(name, 0, 4, rtts_s={}, **alike) for name in "abcd"]
    view = make_view(*records, blocks=4, version=1)
    router, rng = Router(), np.random.default_rng(0)
    chosen = [router.choose(view, range(4), RouteWish(), rng=rng).chain[0].peer for _ in range(8)]
    assert sorted(chosen.count(peer) for peer in (A, B, C, D)) == [2, 2, 2, 2]
    # The next records count them: what the router remembers is not added again.
    news = [
        replace(record, sequence=1, load=PeerLoad(sessions=0 if record.peer == A else 9))
        for record in records
    ]
    view = make_view(*news, blocks=4, version=2)
    assert router.choose(view, range(4), RouteWish(), rng=rng).chain[0].peer == A


def test_an_infinite_round_trip_is_five_seconds() -> None:
    view = make_view(make_record("a", 0, 1), blocks=1, rtts_s={A: math.inf})
    routed = choose_chain(view, range(1), RouteWish(mode="latency"), rng=RNG)
    assert routed.expected_step_s == pytest.approx(5 + 0.018 + 1 / 300 + 5)


def test_a_session_that_ended_counts_no_more_though_it_is_still_announced() -> None:
    """A lone client keeps its machine: what is announced there is its own last session."""
    rates = PeerRates(decode_tokens_per_s=100.0, saturated_decode_tokens_per_s=100.0)
    records = [make_record(name, 0, 4, rates=rates) for name in "ab"]
    view = make_view(*records, blocks=4, version=1)
    router, rng = Router(), np.random.default_rng(0)
    first = router.choose(view, range(4), RouteWish(), rng=rng)
    here = first.chain[0].peer
    busy = [
        replace(record, sequence=1, load=PeerLoad(sessions=int(record.peer == here))) for record in records
    ]
    view = make_view(*busy, blocks=4, version=2)
    router.ended(view, [hop.peer for hop in first.chain])
    chosen = [
        router.choose(view, range(4), RouteWish(), rng=np.random.default_rng(seed)) for seed in range(2)
    ]
    assert sorted(routed.chain[0].peer for routed in chosen) == sorted((A, B))
    # Without it, the machine that the client has left counts as taken.
    other = Router().choose(view, range(4), RouteWish(), rng=rng)
    assert other.chain[0].peer != here
