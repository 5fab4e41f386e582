"""What a request may say about the machines that answer it."""

from collections.abc import Mapping
from dataclasses import dataclass

from plait.errors import BadRequest

MAX_ASKED_DRAFT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAsk:
    """A wish about the route of one request through a swarm; what is left out is as the server does it.

    `mode`, `pick`, `objectives`, `pinned` (names or ids of machines, in order), `max_hops` and `evaluations` are for
    `routing.wish_of_fields`, which checks them. `draft_tokens`: how many tokens may be guessed ahead.

    Raises:
        BadRequest: `draft_tokens` is out of its range.
    """

    mode: str | None = None
    pick: str | None = None
    objectives: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    max_hops: int | None = None
    evaluations: int | None = None
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and not 0 <= self.draft_tokens <= MAX_ASKED_DRAFT_TOKENS:
            raise BadRequest(
                f"route.draft_tokens must be between 0 and {MAX_ASKED_DRAFT_TOKENS}, not {self.draft_tokens}",
                param="route",
            )

    @property
    def fields(self) -> Mapping[str, object]:
        """What was said of the route, by name."""
        said: dict[str, object] = {
            "mode": self.mode,
            "pick": self.pick,
            "objectives": list(self.objectives) or None,
            "pinned": list(self.pinned) or None,
            "max_hops": self.max_hops,
            "evaluations": self.evaluations,
        }
        return {name: value for name, value in said.items() if value is not None}
