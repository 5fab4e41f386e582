"""A record that cannot be true does not exist; one that can survives the wire."""

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from plait.cluster import PeerLoad, PeerRates, PeerRecord, PeerTerms, SwarmView, format_blocks
from plait.ids import PeerId

A, B, C = (PeerId(digit * 64) for digit in "abc")
RECORD = PeerRecord(
    peer=A,
    name="attic",
    model="tiny",
    first_block=2,
    end_block=5,
    addresses=("tls://192.0.2.4:7000",),
    through=(B,),
    rates=PeerRates(decode_tokens_per_s=300.0),
    load=PeerLoad(sessions=2, kv_free_tokens=10, kv_total_tokens=20),
    terms=PeerTerms(price_per_hour=0.4),
    rtts_s={B: 0.02, C: math.inf},
    expires_unix_s=100.0,
)


def test_a_record_survives_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(RECORD), type=PeerRecord) == RECORD


def test_an_address_of_irohs_alone_is_no_listening() -> None:
    iroh = "iroh://192.0.2.4:7001?relay=https://192.0.2.1"
    assert RECORD.is_listening and replace(RECORD, addresses=(iroh, *RECORD.addresses)).is_listening
    assert (
        not replace(RECORD, addresses=(iroh,)).is_listening and not replace(RECORD, addresses=()).is_listening
    )


@pytest.mark.parametrize(
    "change",
    [
        {"peer": "attic"},
        {"peer": "A" * 64},
        {"first_block": -1},
        {"first_block": 6},
        {"end_block": 10**6},
        {"state": "asleep"},
        {"rtts_s": {B: -1.0}},
        {"rtts_s": {B: math.nan}},
        {"rtts_s": {"b": 1.0}},
        {"through": ("b",)},
        {"addresses": ("tls://192.0.2.4:7000",) * 17},
        {"name": "x" * 257},
        {"memory_bytes": -1},
        {"expires_unix_s": math.nan},
    ],
)
def test_an_impossible_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(RECORD, **change)


def test_an_impossible_record_is_refused_as_it_is_decoded() -> None:
    fields = msgspec.to_builtins(RECORD) | {"first_block": 9}
    with pytest.raises(msgspec.ValidationError, match="blocks 9:5"):
        msgspec.convert(fields, PeerRecord)


@pytest.mark.parametrize("amount", [-1.0, math.inf, math.nan])
def test_rates_loads_and_terms_are_finite_and_not_negative(amount: float) -> None:
    with pytest.raises(ValueError, match="decode_tokens_per_s"):
        PeerRates(decode_tokens_per_s=amount)
    with pytest.raises(ValueError, match="step_s"):
        PeerLoad(step_s=amount)
    with pytest.raises(ValueError, match="busy_watts"):
        PeerTerms(busy_watts=amount)
    with pytest.raises(ValueError, match="kv_free_tokens"):
        PeerLoad(kv_free_tokens=5, kv_total_tokens=4)


def view(*records: PeerRecord, banned: frozenset[PeerId] = frozenset()) -> SwarmView:
    return SwarmView.of(records, model="tiny", model_blocks=8, unix_now_s=50.0, banned=banned)


def test_a_view_holds_the_newest_usable_record_of_each_peer() -> None:
    newer = replace(RECORD, sequence=3, end_block=6)
    others = (
        replace(RECORD, peer=B, expires_unix_s=50.0),
        replace(RECORD, peer=C, model="other"),
        replace(RECORD, peer=PeerId("d" * 64), end_block=9),
    )
    assert view(newer, RECORD, *others).records == {A: newer}


def test_holders_are_online_and_in_order() -> None:
    later, away = replace(RECORD, peer=C, first_block=4), replace(RECORD, peer=B, state="joining")
    assert [record.peer for record in view(later, away, RECORD).holders(4)] == [A, C]
    assert [record.peer for record in view(later, away, RECORD).holders(3)] == [A]
    assert view(later, away, RECORD).missing_blocks(range(8)) == (0, 1, 5, 6, 7)
    assert view(RECORD).missing_blocks(range(3, 10)) == (5, 6, 7, 8, 9)


def test_a_ban_is_ignored_where_it_would_leave_nobody() -> None:
    other = replace(RECORD, peer=B, first_block=4)
    banned = view(RECORD, other, banned=frozenset({A}))
    assert [record.peer for record in banned.holders(4)] == [B]
    assert [record.peer for record in banned.holders(3)] == [A]


def test_blocks_are_printed_as_spans() -> None:
    assert format_blocks((3, 4, 5, 9)) == "3:6, 9:10"
    assert format_blocks(()) == ""
