"""The adviser: right by brute force on small swarms, and its sentences say what its numbers say."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.cluster import PeerRates, PeerRecord, SwarmView, peer_id_of_name
from plait.errors import BadSetup
from plait.placement import BlockCost, advise, explain_fit, explain_span, fitting_blocks
from plait.routing import HOP_OVERHEAD_S

MIB = 2**20
COST = BlockCost(weight_bytes=400 * MIB, kv_bytes_per_token=4096)
CONTEXT = 16384  # 64 MiB of cache a block


def machine(name: str, holds: int, rate: float, rtts_s: dict[str, float], **fields: object) -> PeerRecord:
    return PeerRecord(
        peer=peer_id_of_name(name),
        name=name,
        model="m",
        memory_bytes=holds * 464 * MIB + 1,
        rates=PeerRates(
            decode_tokens_per_s=rate, saturated_decode_tokens_per_s=6 * rate, prefill_tokens_per_s=20 * rate
        ),
        rtts_s={peer_id_of_name(other): rtt_s for other, rtt_s in rtts_s.items()},
        expires_unix_s=math.inf,
        **fields,  # type: ignore[arg-type]
    )


def view_of(*records: PeerRecord, blocks: int) -> SwarmView:
    return SwarmView.of(records, model="m", model_blocks=blocks, unix_now_s=0.0)


def test_memory_decides_how_many_blocks_fit() -> None:
    assert COST.block_bytes(CONTEXT) == 464 * MIB
    assert fitting_blocks(464 * MIB * 3, COST, context_tokens=CONTEXT) == 3
    assert fitting_blocks(464 * MIB * 3, COST, context_tokens=CONTEXT, reserve_bytes=1) == 2
    assert fitting_blocks(10, COST, context_tokens=CONTEXT, reserve_bytes=100) == 0
    words = explain_fit(464 * MIB * 3, COST, context_tokens=CONTEXT, reserve_bytes=MIB)
    assert words == (
        "1.4 GiB hold 2 blocks of 464.0 MiB each: 400.0 MiB of weights and 64.0 MiB of cache for 16,384 tokens, "
        "beside 1.0 MiB for the rest"
    )
    with pytest.raises(BadSetup):
        BlockCost(weight_bytes=0, kv_bytes_per_token=1)


def test_fewer_machines_are_faster_where_the_link_costs_more_than_it_saves() -> None:
    attic = machine("attic", 17, 1200.0, {"cellar": 0.0004, "laptop": 0.024}, first_block=0, end_block=14)
    cellar = machine("cellar", 13, 800.0, {"laptop": 0.024}, first_block=14, end_block=24)
    laptop = machine("laptop", 8, 400.0, {}, first_block=0, end_block=6)
    advice = advise(view_of(attic, cellar, laptop, blocks=24), COST, context_tokens=CONTEXT)
    best = advice.sets[0]
    assert best.blocks == ((attic.peer, 17), (cellar.peer, 7))
    assert best.step_s == pytest.approx(17 / 1200 + 7 / 800 + 0.0004 + 2 * HOP_OVERHEAD_S)
    assert best.tokens_per_s == pytest.approx(480.0)  # 14 and 10 blocks: 514 and 480; 15 and 9: 480 and 533
    assert advice.sentences == (
        "2 of 3 machines are the fastest for one user: 'attic' and 'cellar' take 24.3 ms a token, all together 49.9 ms",
        "'laptop' would save no computing a token and add 24.3 ms of links and hops: leave it out for one user",
        *(
            sentence
            for sentence in advice.sentences
            if sentence.startswith(
                ("'attic' gets 17 of 24 blocks, as many as it holds", "'cellar' gets 7 of 24")
            )
        ),
        "many users at once get the most from 'attic', 'cellar' and 'laptop': up to 600 tokens/s together, where "
        "'attic' and 'cellar' give 480",
    )
    assert len(advice.sentences) == 5
    assert "blocks 6:14 would be served by nobody" in explain_span(
        view_of(attic, cellar, laptop, blocks=24), attic.peer, COST, context_tokens=CONTEXT
    )


def test_all_machines_are_used_where_they_are_needed() -> None:
    near = {"b": 0.0001, "a": 0.0001}
    view = view_of(machine("a", 6, 100.0, near), machine("b", 6, 100.0, near), blocks=12)
    advice = advise(view, COST, context_tokens=CONTEXT)
    assert advice.sentences[0].startswith("all 2 machines together are the fastest")
    assert "without it the model does not fit" in advice.sentences[1]


def test_too_little_memory_is_said_with_what_is_missing() -> None:
    advice = advise(view_of(machine("a", 5, 100.0, {}), blocks=12), COST, context_tokens=CONTEXT)
    assert advice.sets == ()
    assert advice.sentences[0].startswith("1 machine holds 5 of 12 blocks; 7 more need 3.2 GiB")


def test_one_machine_alone() -> None:
    advice = advise(view_of(machine("a", 12, 100.0, {}), blocks=12), COST, context_tokens=CONTEXT)
    assert advice.sentences == ("'a' alone answers one user with 120.5 ms a token",)


def test_too_many_machines_are_not_tried() -> None:
    many = [machine(f"m{number}", 2, 100.0, {}) for number in range(13)]
    advice = advise(view_of(*many, blocks=12), COST, context_tokens=CONTEXT)
    assert advice.sets == () and "13 machines are too many" in advice.sentences[0]


@st.composite
def few_machines(draw: st.DrawFn) -> SwarmView:
    names = [f"m{number}" for number in range(draw(st.integers(1, 4)))]
    rtts = st.dictionaries(st.sampled_from(names), st.sampled_from([0.0, 0.01, 0.1, 0.4]))
    records = [
        machine(name, draw(st.integers(0, 5)), draw(st.sampled_from([50.0, 100.0, 400.0])), draw(rtts))
        for name in names
    ]
    return view_of(*records, blocks=draw(st.integers(1, 6)))


@settings(deadline=None)
@given(few_machines())
def test_every_set_is_the_best_by_brute_force(view: SwarmView) -> None:
    """All orders of the machines and all ways to cut the blocks."""
    advice = advise(view, COST, context_tokens=CONTEXT)
    found = {frozenset(peer for peer, _ in one.blocks): one for one in advice.sets}
    records = list(view.records.values())
    for size in range(1, len(records) + 1):
        for members in itertools.combinations(records, size):
            step_s, tokens_per_s = brute_force(members, view.model_blocks)
            one = found.pop(frozenset(record.peer for record in members), None)
            if math.isinf(step_s):
                assert one is None
                continue
            assert one is not None
            assert one.step_s == pytest.approx(step_s)
            assert one.tokens_per_s == pytest.approx(tokens_per_s)
            assert sum(blocks for _, blocks in one.blocks) == view.model_blocks
    assert not found


def brute_force(members: tuple[PeerRecord, ...], blocks: int) -> tuple[float, float]:
    best_s, most = math.inf, 0.0
    holds = [record.memory_bytes // (464 * MIB) for record in members]
    cuts = [cut for cut in itertools.product(*(range(1, hold + 1) for hold in holds)) if sum(cut) == blocks]
    for cut in cuts:
        compute_s = sum(
            count / record.rates.decode_tokens_per_s for count, record in zip(cut, members, strict=True)
        )
        for order in itertools.permutations(members):
            ring_s = sum(
                one_way_s(order[number], order[(number + 1) % len(order)])
                for number in range(len(order) if len(order) > 1 else 0)
            )
            best_s = min(best_s, compute_s + ring_s + len(members) * HOP_OVERHEAD_S)
        rates = [
            record.rates.saturated_decode_tokens_per_s / count
            for count, record in zip(cut, members, strict=True)
        ]
        most = max(most, min(rates))
    return best_s, most


def one_way_s(sender: PeerRecord, receiver: PeerRecord) -> float:
    rtt_s = sender.rtts_s.get(receiver.peer, receiver.rtts_s.get(sender.peer))
    return 0.15 if rtt_s is None else rtt_s / 2


def test_a_machine_that_announces_no_memory_holds_what_it_serves() -> None:
    record = replace(machine("a", 1, 100.0, {}), memory_bytes=0, first_block=0, end_block=4)
    advice = advise(view_of(record, blocks=4), COST, context_tokens=CONTEXT)
    assert advice.sets[0].blocks == ((record.peer, 4),)
