"""What a request may say about the machines that answer it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from plait.errors import BadRequest

RoutePick = Literal["balanced", "budget", "sampled", "weights"]
MAX_ASKED_PEERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAsk:
    """A wish about the route of one request through a swarm; what is None is as the server does it.

    `mode` is one of routing's modes. `pick` says which member of the front `tradeoff` and `exact` take: `budget` with
    `budget_s` seconds a token, `weights` with one weight for each objective. `peers`, by name or id and in order, are
    for `pinned`. `draft_tokens`: how many tokens may be guessed ahead.

    Raises:
        BadRequest: a value out of its range; `param` names it.
    """

    mode: str | None = None
    pick: RoutePick | None = None
    budget_s: float | None = None
    weights: tuple[float, ...] = ()
    peers: tuple[str, ...] = ()
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.pick is not None and self.pick not in get_args(RoutePick):
            raise _bad("pick", f"must be one of {', '.join(get_args(RoutePick))}, not {self.pick!r}")
        if self.budget_s is not None and not 0 < self.budget_s < math.inf:
            raise _bad("budget_s", f"must be a time in seconds above 0, not {self.budget_s}")
        if (self.pick == "budget") != (self.budget_s is not None):
            raise _bad("budget_s", "and pick 'budget' go together")
        if any(not 0 <= weight < math.inf for weight in self.weights):
            raise _bad("weights", "must be finite and at least 0")
        if (self.pick == "weights") != (sum(self.weights) > 0):
            raise _bad("weights", "(not all 0) and pick 'weights' go together")
        if self.mode == "pinned" and not self.peers:
            raise _bad("peers", "must name the machines of a pinned route")
        if self.peers and self.mode != "pinned":
            raise _bad("peers", "are for the mode 'pinned'")
        if len(self.peers) > MAX_ASKED_PEERS:
            raise _bad("peers", f"may be at most {MAX_ASKED_PEERS}")
        if self.draft_tokens is not None and not 0 <= self.draft_tokens <= 32:
            raise _bad("draft_tokens", f"must be between 0 and 32, not {self.draft_tokens}")


def _bad(field: str, rule: str) -> BadRequest:
    return BadRequest(f"route.{field} {rule}", param=f"route.{field}")
