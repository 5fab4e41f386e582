"""What a request asks of its route: a server's default, or a field of the request."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from plait.cluster import SwarmView
from plait.errors import BadRequest
from plait.ids import PeerId
from plait.routing.chain import RouteMode
from plait.routing.objectives import LATENCY_AND_THROUGHPUT, ObjectiveName, check_objectives
from plait.routing.picks import Balanced, Pick, parse_pick

MAX_EVALUATIONS = 100_000
BALANCED = Balanced()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteWish:
    """How to choose a chain.

    `mode`:
        `load`        least expected time of a decoding round, with the sessions that the peers announce (the default)
        `latency`     PETALS' min_latency: Dijkstra on its cost model
        `throughput`  PETALS' max_throughput: a random walk that favours long spans
        `exact`       a point of the whole front of `objectives`
        `tradeoff`    the same front, searched for by NSGA-II (NSGA-III from three objectives)
        `pinned`      the peers in `pinned`, in that order
    `need_tokens`: the session's greatest length, prompt and answer; 0 is unknown. `pick`: which point of the front.
    `max_hops`: the most hops that a chain of a front may have. `evaluations`: chains that `tradeoff` may evaluate.
    `slack_fraction`: what `exact` may miss, as a part of the front's extent; 0 misses nothing. `early_exits`:
    chains of `exact` may leave a machine before its span ends (those of `load` always may, those of PETALS never;
    see `chain_graph`).
    """

    mode: RouteMode = "load"
    need_tokens: int = 0
    objectives: tuple[ObjectiveName, ...] = LATENCY_AND_THROUGHPUT
    pick: Pick = BALANCED
    pinned: tuple[PeerId, ...] = ()
    max_hops: int = 4096
    evaluations: int = 4000
    slack_fraction: float = 0.0
    early_exits: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(RouteMode):
            raise BadRequest(
                f"route mode {self.mode!r} is unknown; known are {', '.join(get_args(RouteMode))}",
                param="route",
            )
        check_objectives(self.objectives)
        if self.mode == "pinned" and not self.pinned:
            raise BadRequest("route mode 'pinned' needs the peers, in order", param="route")
        if self.need_tokens < 0 or self.max_hops < 1 or not 0 <= self.slack_fraction < 1:
            raise BadRequest(
                "need_tokens must be at least 0, max_hops at least 1, slack_fraction below 1", param="route"
            )
        if not 1 <= self.evaluations <= MAX_EVALUATIONS:
            raise BadRequest(f"evaluations must be 1 to {MAX_EVALUATIONS}", param="route")


def wish_of_fields(fields: Mapping[str, Any], default: RouteWish, view: SwarmView) -> RouteWish:
    """Read a request's route: `mode`, `pick`, `objectives`, `pinned` (names or ids of peers), `max_hops`,
    `evaluations`.

    Raises:
        BadRequest: an unknown field, or a value that is not allowed.
    """
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        match name, value:
            case "mode", str():
                changes["mode"] = value
            case "pick", str():
                changes["pick"] = parse_pick(value)
            case "objectives", [*names] if all(isinstance(objective, str) for objective in names):
                changes["objectives"] = check_objectives(names)
            case "pinned", [*peers] if peers and all(isinstance(peer, str) for peer in peers):
                changes["pinned"] = tuple(view.find(peer) for peer in peers)
                changes.setdefault("mode", "pinned")
            case (("max_hops" | "evaluations"), int()) if not isinstance(value, bool):
                changes[name] = value
            case _:
                raise BadRequest(
                    f"route field {name!r} with value {value!r} is not understood; known are mode, pick, objectives, "
                    "pinned, max_hops, evaluations",
                    param="route",
                )
    return replace(default, **changes)
