"""Hidden states of consecutive positions of one sequence, held in host memory."""

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY_TOKENS = 16


class RowBuffer:
    """Rows float32 [positions, hidden] for the positions from `start` to `end`; grows at its end, shrinks at both."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.end = start
        self._rows: NDArray[np.float32] | None = None

    @property
    def held_bytes(self) -> int:
        """Size of the rows it holds."""
        return 0 if self._rows is None else (self.end - self.start) * self._rows.shape[1] * 4

    def append(self, rows: NDArray[np.float32]) -> None:
        """Copy rows [positions, hidden] to the end."""
        held, added = self.end - self.start, len(rows)
        if self._rows is None or held + added > len(self._rows):
            capacity = max(_FIRST_CAPACITY_TOKENS, held + added, 2 * held)
            grown = np.empty((capacity, rows.shape[1]), np.float32)
            if self._rows is not None:
                grown[:held] = self._rows[:held]
            self._rows = grown
        self._rows[held : held + added] = rows
        self.end += added

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """The rows of these positions, as a view; they stay as they are until the buffer is cut below `end`."""
        assert self._rows is not None and self.start <= start < end <= self.end
        return self._rows[start - self.start : end - self.start]

    def cut(self, end: int) -> None:
        """Forget the positions from `end` on; one below `start` leaves it empty there."""
        if end < self.start:
            self.start = self.end = end
            self._rows = None
        self.end = min(self.end, end)

    def forget_before(self, start: int) -> None:
        """Forget the positions below `start` and give their memory back."""
        start = min(start, self.end)
        if start <= self.start:
            return
        kept = None if start == self.end or self._rows is None else self.rows(start, self.end).copy()
        self.start, self._rows = start, kept
