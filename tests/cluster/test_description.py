"""A described swarm is read whole or refused with the place of the mistake."""

import math
from typing import Any

import pytest

from plait.cluster import peer_id_of_name, swarm_of_description
from plait.errors import BadSetup

ATTIC = {
    "name": "attic",
    "first_block": 0,
    "end_block": 4,
    "rates": {"decode_tokens_per_s": 900},
    "rtts_s": {"attic": 0.0},
}
CELLAR = {"name": "cellar", "first_block": 4, "end_block": 8, "through": ["attic"], "load": {"sessions": 2}}


def describe(*machines: object, **more: object) -> dict[str, Any]:
    return {"blocks": 8, "machines": list(machines), **more}


def test_machines_are_named_by_name() -> None:
    view = swarm_of_description(
        describe({**ATTIC, "rtts_s": {"cellar": 0.002}}, CELLAR, rtts_s={"attic": 0.01})
    )
    attic, cellar = peer_id_of_name("attic"), peer_id_of_name("cellar")
    assert view.model_blocks == 8 and view.missing_blocks(range(8)) == ()
    assert view.records[attic].rates.decode_tokens_per_s == 900.0
    assert view.records[attic].rtts_s[cellar] == 0.002
    assert view.records[cellar].through == (attic,) and view.records[cellar].load.sessions == 2
    assert view.rtts_s == {attic: 0.01}
    assert view.records[cellar].expires_unix_s == math.inf


def test_what_status_prints_is_a_description() -> None:
    status = {
        "blocks": 8,
        "model": "tiny",
        "machines": [
            {
                "peer": peer_id_of_name(name),
                "name": "twin",
                "state": "online",
                "first_block": 0,
                "end_block": 8,
                "decode_tokens_per_s": 700.0,
                "sessions": 3,
                "price_per_hour": 0.5,
                "rtt_s": rtt_s,
                "linked": True,
            }
            for name, rtt_s in (("one", 0.004), ("two", None))
        ],
        "links": [{"from": peer_id_of_name("one"), "to": peer_id_of_name("two"), "rtt_s": 0.02}],
    }
    view = swarm_of_description(status)
    one, two = (view.records[peer_id_of_name(name)] for name in ("one", "two"))
    assert one.rates.decode_tokens_per_s == 700.0 and one.load.sessions == 3
    assert one.terms.price_per_hour == 0.5 and one.rtts_s == {two.peer: 0.02} and two.rtts_s == {}
    assert view.rtts_s == {one.peer: 0.004}


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (None, "must be names with values"),
        ([ATTIC], "must be names with values"),
        ({"machines": [ATTIC]}, "has `blocks`"),
        (describe(), "has `blocks`"),
        (describe("attic"), "a machine must be names"),
        (describe(ATTIC, ATTIC), "a name of its own"),
        (describe({**ATTIC, "colour": "red"}), "no field 'colour'"),
        (describe({**ATTIC, "rates": {"speed": 1}}), "no field 'speed'"),
        (describe({**ATTIC, "rates": {"decode_tokens_per_s": "fast"}}), "machine 'attic': "),
        (describe({**ATTIC, "rates": 3}), "rates of machine 'attic' must be names"),
        (describe({**ATTIC, "end_block": 9}), "model of 8 does not have"),
        (describe({**ATTIC, "first_block": 5}), "machine 'attic': blocks 5:4"),
        (describe({**ATTIC, "rtts_s": {"attic": -1}}), "round trip of machine 'attic' to 'attic'"),
        (describe({**ATTIC, "rtts_s": {"cellar": 1}}), "'cellar', which is no machine"),
        (describe(ATTIC, rtts_s={"attic": "near"}), "round trip of the gateway to 'attic'"),
    ],
)
def test_mistakes_are_named(description: object, words: str) -> None:
    with pytest.raises(BadSetup, match=words):
        swarm_of_description(description)
