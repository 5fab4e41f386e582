"""Which sessions a hop waits for, so that those over one chain share their steps.

Sessions that began at different moments go round their chain one behind the other, and would stay so: each group pays
for passes over the weights of its own, at every hop. Waiting once brings two groups together for good. What it takes
away is that hops compute different groups at the same time. So it is done only for so few sessions that a step takes
about as long over all of them as over one, and only for one that is about to be back, by the time its last round took.

Only first hops wait that long: if two hops of a chain did, each could hold what the other waits for. The others let in
what left the hop before in one step, which comes message by message.
"""

from collections.abc import Iterable
from dataclasses import dataclass

SHARED_TOKENS = 16
"""A step over so many takes about as long as over one: it reads the weights once, and computes meanwhile."""
_PATIENCE_STEPS, _LATER_PATIENCE_STEPS = 1.25, 0.05
_LATE_STEPS = 0.25


@dataclass(slots=True)
class Round:
    """A session's way from a hop round the chain and back: when it left, and how long the last one took."""

    left_s: float | None = None
    took_s: float | None = None

    def leave(self, now_s: float) -> None:
        """Its outputs go on to the next hop."""
        self.left_s = now_s

    def come_back(self, now_s: float) -> None:
        """What it computes next is here."""
        if self.left_s is not None:
            self.took_s, self.left_s = now_s - self.left_s, None

    @property
    def due_s(self) -> float | None:
        """When it should be back; None if it is here, or has not been round yet."""
        return None if self.left_s is None or self.took_s is None else self.left_s + self.took_s


def wait_until_s(
    rounds: Iterable[Round], *, first: bool, now_s: float, since_s: float, step_s: float
) -> float | None:
    """Until when to wait for others before a step that could have begun at `since_s`; None: begin it.

    `first`: at the first hop of the chain. `step_s` is what a step of few tokens takes: what is saved, at this hop,
    each time that two groups are one.
    """
    due_s = [each.due_s for each in rounds if each.due_s is not None]
    if first:
        end_s, late_s = since_s + _PATIENCE_STEPS * step_s, _LATE_STEPS * step_s
        due_s = [each_s for each_s in due_s if each_s <= end_s and now_s < each_s + late_s]
        end_s = min(end_s, max(due_s, default=0.0) + late_s)
    else:
        end_s = since_s + _LATER_PATIENCE_STEPS * step_s
    return end_s if due_s and now_s < end_s else None
