"""A swarm as somebody describes it, in a file: to see how requests would be routed, without the machines.

    blocks: 24
    rtts_s: {attic: 0.002}            # from the gateway
    machines:
      - name: attic
        first_block: 0
        end_block: 14
        rates: {decode_tokens_per_s: 1200}
        rtts_s: {cellar: 0.0004}

A machine has the fields of a `PeerRecord`; `peer` may be left out, and machines are named by name. What `plait status
--json` prints of a running swarm is a description too.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import msgspec

from plait.cluster.peer_record import PeerLoad, PeerRates, PeerRecord, PeerTerms
from plait.cluster.swarm_view import SwarmView
from plait.cluster.synthetic import peer_id_of_name
from plait.errors import BadSetup
from plait.ids import PeerId

_MODEL = "described"
_PARTS = {"rates": PeerRates, "load": PeerLoad, "terms": PeerTerms}


def swarm_of_description(description: object) -> SwarmView:
    """Read a description that was loaded from YAML or JSON.

    Raises:
        BadSetup: it is none; the message says where.
    """
    whole = _mapping(description, "a swarm's description")
    if "links" in whole:
        whole = _of_status(whole)
    machines: object = whole.get("machines")
    blocks: object = whole.get("blocks")
    if not isinstance(machines, list) or not machines or not isinstance(blocks, int) or blocks < 1:
        raise BadSetup("a swarm's description has `blocks`, a number, and `machines`, a list")
    given = [_mapping(machine, "a machine") for machine in cast("list[object]", machines)]
    peers = [PeerId(str(machine.get("peer") or peer_id_of_name(_name(machine)))) for machine in given]
    if len(set(peers)) < len(peers):
        raise BadSetup("every machine of a swarm's description needs a name of its own")
    ids: dict[str, PeerId] = {peer: peer for peer in peers}
    ids |= {_name(machine): peer for machine, peer in zip(given, peers, strict=True)}
    records = [_record(machine, peer, ids) for machine, peer in zip(given, peers, strict=True)]
    outside = [record.name for record in records if record.end_block > blocks]
    if outside:
        raise BadSetup(f"machine {outside[0]!r} serves blocks that a model of {blocks} does not have")
    rtts_s = _rtts(whole.get("rtts_s") or {}, ids, "the gateway")
    return SwarmView.of(records, model=_MODEL, model_blocks=blocks, unix_now_s=0.0, rtts_s=rtts_s, version=1)


def _name(machine: Mapping[str, Any]) -> str:
    return str(machine.get("name"))


def _record(machine: Mapping[str, Any], peer: PeerId, ids: Mapping[str, PeerId]) -> PeerRecord:
    name = _name(machine)
    known = {field.name for field in fields(PeerRecord)}
    values: dict[str, Any] = {}
    for key, value in machine.items():
        if key not in known:
            raise BadSetup(f"machine {name!r} has no field {key!r}; known are {', '.join(sorted(known))}")
        if key in _PARTS:
            part = _mapping(value, f"{key} of machine {name!r}")
            unknown = set(part) - {field.name for field in fields(_PARTS[key])}
            if unknown:
                raise BadSetup(f"{key} of machine {name!r} have no field {min(unknown)!r}")
            values[key] = part
        elif key == "rtts_s":
            values[key] = _rtts(value, ids, f"machine {name!r}")
        elif key == "through" and isinstance(value, list):
            values[key] = [ids.get(str(other), str(other)) for other in cast("list[object]", value)]
        else:
            values[key] = value
    values |= {"peer": peer, "model": _MODEL, "expires_unix_s": math.inf}
    try:
        return msgspec.convert(values, PeerRecord)
    except msgspec.ValidationError as error:
        raise BadSetup(f"machine {name!r}: {error}") from None


def _rtts(value: object, ids: Mapping[str, PeerId], whose: str) -> dict[PeerId, float]:
    rtts_s: dict[PeerId, float] = {}
    for other, rtt_s in _mapping(value, f"rtts_s of {whose}").items():
        if not isinstance(rtt_s, int | float) or not rtt_s >= 0:
            raise BadSetup(f"the round trip of {whose} to {other!r} is no number of seconds: {rtt_s!r}")
        if other not in ids:
            raise BadSetup(f"{whose} has a round trip to {other!r}, which is no machine of the description")
        rtts_s[ids[other]] = float(rtt_s)
    return rtts_s


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    entries = cast("dict[object, Any]", value) if isinstance(value, dict) else {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in entries):
        raise BadSetup(f"{what} must be names with values, not {value!r:.60}")
    return cast("dict[str, Any]", entries)


def _of_status(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `plait status` prints, as a description: there, rates, load and terms are flat and links are a list."""
    rtts_s: dict[str, dict[str, float]] = {}
    for entry in _list(status["links"]):
        link = _mapping(entry, "a link")
        if link.get("rtt_s") is not None:
            rtts_s.setdefault(str(link.get("from")), {})[str(link.get("to"))] = link["rtt_s"]
    whole = {field.name for field in fields(PeerRecord)}
    machines: list[Mapping[str, Any]] = []
    own_rtts_s: dict[str, float] = {}
    for entry in _list(status.get("machines")):
        machine = _mapping(entry, "a machine")
        peer = str(machine.get("peer"))
        parts = {
            part: {field.name: machine[field.name] for field in fields(kind) if field.name in machine}
            for part, kind in _PARTS.items()
        }
        record = {key: value for key, value in machine.items() if key in whole}
        machines.append({**record, **parts, "rtts_s": rtts_s.get(peer, {})})
        if machine.get("rtt_s") is not None:
            own_rtts_s[peer] = machine["rtt_s"]
    return {"blocks": status.get("blocks"), "machines": machines, "rtts_s": own_rtts_s}


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
