"""What a device draws, and the joules of a run: a base for all the time, and what happens above it.

After LLMServingSim 2.0 (2026): an accelerator is active while it computes, on standby for a while after, then idle; a
byte moved costs energy of its own. Durations are in seconds here, also that of standby.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MEMORY_J_PER_BYTE = 8 * 6e-12
"""DRAM, read or written: 6 pJ per bit, LLMServingSim 2.0's bundled example."""
LINK_J_PER_BYTE = 8 * 4e-12
"""A link between devices: 4 pJ per bit, the same source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerDraw:
    """Watts of one device. Without `standby_watts` it is idle as soon as it has nothing to do."""

    idle_watts: float = 0.0
    busy_watts: float = 0.0
    standby_watts: float | None = None
    standby_s: float = 0.0

    def step_j(self, busy_s: float, moved_bytes: float = 0.0) -> float:
        """Joules of a step, beyond the idle draw."""
        return (self.busy_watts - self.idle_watts) * busy_s + MEMORY_J_PER_BYTE * moved_bytes

    def run_j(self, busy: Iterable[tuple[float, float]], end_s: float) -> float:
        """Joules from 0 to `end_s` with the device busy in the given intervals, which ascend and do not overlap."""
        standby_watts = self.idle_watts if self.standby_watts is None else self.standby_watts
        joules = self.idle_watts * end_s
        waking_s = 0.0  # until when the device is on standby
        free_s = 0.0
        for start_s, stop_s in busy:
            joules += (standby_watts - self.idle_watts) * max(0.0, min(waking_s, start_s) - free_s)
            joules += (self.busy_watts - self.idle_watts) * (stop_s - start_s)
            free_s, waking_s = stop_s, stop_s + self.standby_s
        return joules + (standby_watts - self.idle_watts) * max(0.0, min(waking_s, end_s) - free_s)
