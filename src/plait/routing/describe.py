"""What was chosen, as JSON: for the gateway's answers and the command line."""

import math
from typing import Any

from plait.cluster import SwarmView
from plait.routing.chain import Chain, Routed
from plait.routing.load import expected_round_s


def routed_fields(routed: Routed, view: SwarmView) -> dict[str, Any]:
    """Mode, chain, expected times, reasons and front.

    `expected_step_s` is what the mode counts (PETALS' modes: PETALS' data path), `expected_round_s` what a token over
    this chain takes here. What is not finite is null; machines have their names beside their ids.
    """
    return {
        "mode": routed.mode,
        "chain": _chain_fields(routed.chain, view),
        "expected_step_s": _finite(routed.expected_step_s),
        "expected_round_s": _finite(expected_round_s(view, routed.chain)),
        "reasons": list(routed.reasons),
        "front": {
            "objectives": list(routed.front.objectives),
            "exact": routed.front.exact,
            "members": [
                {
                    "chain": _chain_fields(member.chain, view),
                    "values": [_finite(value) for value in member.values],
                }
                for member in routed.front.members
            ],
        },
    }


def _chain_fields(chain: Chain, view: SwarmView) -> list[dict[str, Any]]:
    return [
        {
            "peer": hop.peer,
            "name": view.records[hop.peer].name if hop.peer in view.records else "",
            "first_block": hop.span.start,
            "end_block": hop.span.stop,
        }
        for hop in chain
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
