"""Which passes to measure: rows and contexts a factor of 1.33 to 1.5 apart, and every third of them held out."""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.costs import Operation
from plait.errors import BadSetup

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_CONTEXTS = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_DECODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LEAST_REACH = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One measurement: `row` and `place` are the keys of `plait.costs.tables`."""

    operation: Operation
    row: int
    place: int
    held_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileGrid:
    """Bounds of what is measured.

    `kv_blocks` of `block_tokens` are what the KV memory holds. `sequence_tokens`: the longest sequence.
    """

    step_tokens: int
    context_tokens: int
    sequences: int
    kv_blocks: int
    block_tokens: int
    sequence_tokens: int

    def __post_init__(self) -> None:
        if min(self.step_tokens, self.sequences) < 1 or self.context_tokens < 0:
            raise BadSetup("a profile needs at least one token and one sequence, and no negative context")
        if self.sequence_tokens < 2 or self.room_tokens(1) < self.sequence_tokens:
            raise BadSetup(
                f"the KV memory holds {self.room_tokens(1)} tokens and a profile wants room for a sequence of "
                f"{self.sequence_tokens}; raise --kv-cache-memory"
            )

    def room_tokens(self, sequences: int) -> int:
        """Tokens that each of so many sequences has room for."""
        return self.kv_blocks // sequences * self.block_tokens

    @property
    def most_context_tokens(self) -> int:
        """Of all decoding sequences of a step together; one prompt reaches as far too."""
        points = [point for point in self.points() if point.operation == "decode"]
        return max(point.row * point.place for point in points)

    def points(self) -> tuple[GridPoint, ...]:
        """Everything to measure, small before large."""
        rows = _up_to(_ROWS, min(self.step_tokens, self.room_tokens(1)))
        decodes = _up_to(_DECODES, min(self.sequences, self.step_tokens, self.kv_blocks))
        result = _curve("dense", rows)
        result += _curve("head", decodes)
        result += self._grid("prefill", [row for row in rows if row > 1])
        result += self._grid("decode", decodes)
        return result

    def _grid(self, operation: Operation, rows: Sequence[int]) -> tuple[GridPoint, ...]:
        reaches = [(row, self._reach(operation, row)) for row in rows]
        # Nothing could be blended with a row that is much shorter than the others.
        kept = [pair for pair in reaches if pair[1] >= _LEAST_REACH * max(reach for _, reach in reaches)]
        result: list[GridPoint] = []
        for number, (row, reach) in enumerate(kept):
            places = _up_to(_CONTEXTS, reach)
            whole_row = _held_out(number, len(kept))
            result.extend(
                GridPoint(
                    operation=operation,
                    row=row,
                    place=place,
                    held_out=whole_row or _held_out(index, len(places)),
                )
                for index, place in enumerate(places)
            )
        return tuple(result)

    def _reach(self, operation: Operation, row: int) -> int:
        """The longest context of a row; negative where there is no room for the row itself."""
        new, sequences = (row, 1) if operation == "prefill" else (1, row)
        room_tokens = min(self.sequence_tokens, self.room_tokens(sequences))
        return min(self.context_tokens, room_tokens - new)


def _curve(operation: Operation, places: Sequence[int]) -> tuple[GridPoint, ...]:
    return tuple(
        GridPoint(operation=operation, row=0, place=place, held_out=_held_out(index, len(places)))
        for index, place in enumerate(places)
    )


def _up_to(places: Sequence[int], most: int) -> list[int]:
    """The places up to a bound, which is one of them."""
    return sorted({*(place for place in places if place < most), most})


def _held_out(index: int, count: int) -> bool:
    """Every third, but never the last: a table is not asked to extrapolate."""
    return index % 3 == 2 and index < count - 1
