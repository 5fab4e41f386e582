"""Rare branches, made frequent in trials only: what one machine in a thousand does, one in ten does here.

The habit is FoundationDB's. In a run these branches are taken when something is full, late or lost; then everything
else is disturbed as well, and who falls over cannot be told from who was pushed.
"""

from plait.simulator.random_streams import stream


class Buggify:
    """Draws from a stream of its own; with a fraction of 0 it draws nothing and changes nothing."""

    def __init__(self, seed: int, fraction: float) -> None:
        self._fraction = fraction
        self._rng = stream(seed, "buggify")

    @property
    def strikes(self) -> bool:
        """Whether the rare thing happens this time."""
        return self._fraction > 0 and bool(self._rng.random() < self._fraction)
