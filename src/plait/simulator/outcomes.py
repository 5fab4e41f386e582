"""What became of each request, kept in a few numbers: times as the client sees them.

Nothing of a request is kept but these numbers and its gaps between tokens, so that memory grows with requests in
flight, and by some tens of bytes with those that are over. Definitions are those of `plait.metrics`.
"""

from array import array
from dataclasses import dataclass, field
from typing import Literal

Ending = Literal["finished", "failed", "refused"]
"""`failed`: it began and could not be ended. `refused`: nobody had room for it in time, or it can never be served."""
_ENDINGS: tuple[Ending, ...] = ("finished", "failed", "refused")


@dataclass(slots=True)
class Outcomes:
    """Columns, one entry for each request that is over, in the order in which they ended.

    `first_s` and `end_s` count from the request's arrival; both 0 unless it got tokens. `gaps_s` are those of all
    requests, `widest_gap_s` the widest of each. `retries`: how often it lost a machine and went on elsewhere.
    """

    number: "array[int]" = field(default_factory=lambda: array("q"))
    arrival_s: "array[float]" = field(default_factory=lambda: array("d"))
    prompt_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    output_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    first_s: "array[float]" = field(default_factory=lambda: array("d"))
    end_s: "array[float]" = field(default_factory=lambda: array("d"))
    widest_gap_s: "array[float]" = field(default_factory=lambda: array("d"))
    retries: "array[int]" = field(default_factory=lambda: array("q"))
    ending: "array[int]" = field(default_factory=lambda: array("b"))
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    reasons: dict[str, int] = field(default_factory=dict[str, int])
    """Why requests failed or were refused, and how many."""

    def __len__(self) -> int:
        return len(self.number)

    def add(
        self,
        *,
        number: int,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int,
        first_s: float,
        end_s: float,
        widest_gap_s: float,
        retries: int,
        ending: Ending,
        reason: str = "",
    ) -> None:
        """Note one request that is over."""
        self.number.append(number)
        self.arrival_s.append(arrival_s)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        self.first_s.append(first_s)
        self.end_s.append(end_s)
        self.widest_gap_s.append(widest_gap_s)
        self.retries.append(retries)
        self.ending.append(_ENDINGS.index(ending))
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def ended(self, ending: Ending) -> list[int]:
        """Rows of the requests that ended so."""
        code = _ENDINGS.index(ending)
        return [row for row, each in enumerate(self.ending) if each == code]
