"""Which sessions a hop waits for, so that those over one chain share their steps.

Sessions that began at different moments go round their chain one behind the other, and would stay so: each group pays
for passes over the weights of its own, at every hop. Waiting once brings two groups together for good. What it takes
away is that hops compute different groups at the same time. So it is done only for so few sessions that a step takes
about as long over all of them as over one, and only for those that will be back soon, by the time their last round
took. Of two groups that could wait for each other, that one does for which fewer sessions wait for less long.

Only first hops wait that long: if two hops of a chain did, each could hold what the other waits for. The others let in
what left the hop before in one step, which comes message by message, and wait a little longer for sessions whose last
steps here followed each other.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

SHARED_TOKENS = 16
"""A step over so many takes about as long as over one: it reads the weights once, and computes meanwhile."""
_PATIENCE_STEPS, _LATER_PATIENCE_STEPS = 1.25, 0.05
"""The first for a chain of two hops: two groups that go round k hops evenly spaced are k / 2 steps apart."""
_LATE_STEPS = 0.25
_SLACK = 1.1
"""Two groups of one size half a round apart: one of them must not find that the other should wait."""


@dataclass(slots=True)
class Round:
    """A session's way from a hop round the chain and back: when it left, and how long the last one took, which began
    at `went_s`.

    `chain`: its hops, each by whatever tells it from others; `first`: this hop is the first of them.
    """

    chain: tuple[object, ...] = ()
    first: bool = True
    left_s: float | None = None
    took_s: float | None = None
    went_s: float | None = None

    def leave(self, now_s: float) -> None:
        """Its outputs go on to the next hop."""
        self.left_s = now_s

    def come_back(self, now_s: float) -> None:
        """What it computes next is here."""
        if self.left_s is not None:
            self.took_s, self.went_s, self.left_s = now_s - self.left_s, self.left_s, None

    @property
    def due_s(self) -> float | None:
        """When it should be back; None if it is here, or has not been round yet."""
        return None if self.left_s is None or self.took_s is None else self.left_s + self.took_s


def gather_until_s(rounds: Collection[Round], *, now_s: float, since_s: float, step_s: float) -> float | None:
    """What a hop does whose sessions go these rounds: until when to wait before a step, or None to begin it.

    Only a few sessions that all go the same way are waited for; see `wait_until_s`.
    """
    if not 1 < len(rounds) <= SHARED_TOKENS:
        return None
    one = next(iter(rounds))
    if any(each.chain != one.chain for each in rounds):
        return None
    return wait_until_s(
        rounds, first=one.first, hops=len(one.chain), now_s=now_s, since_s=since_s, step_s=step_s
    )


def wait_until_s(
    rounds: Collection[Round], *, first: bool, hops: int, now_s: float, since_s: float, step_s: float
) -> float | None:
    """Until when to wait for others before a step that could have begun at `since_s`; None: begin it.

    `first`: at the first of the chain's `hops`. `step_s` is what a step of few tokens takes: what is saved, at this
    hop, each time that two groups are one.
    """
    away = [each for each in rounds if each.due_s is not None]
    here = [each for each in rounds if each.left_s is None]
    late_s = _LATE_STEPS * step_s
    # Who left no later than somebody who is back is right behind, also where the whole round took longer this time.
    back_s = max((each.went_s for each in here if each.went_s is not None), default=-math.inf)
    if not first:
        near = any(each.left_s is not None and each.left_s <= back_s + step_s + late_s for each in away)
        end_s = since_s + (late_s if near else _LATER_PATIENCE_STEPS * step_s)
        return end_s if away and now_s < end_s else None
    most_s = _PATIENCE_STEPS * step_s * max(hops / 2, 1)
    expected = sorted(
        (max(due_s, since_s) if left_s <= back_s + late_s else due_s, took_s)
        for left_s, took_s, due_s in ((each.left_s, each.took_s, each.due_s) for each in away)
        if left_s is not None and took_s is not None and due_s is not None
    )
    end_s = since_s
    for count, (due_s, way_s) in enumerate((each for each in expected if now_s < each[0] + late_s), 1):
        gap_s = max(due_s - since_s, 0.0)
        if gap_s <= min(most_s, _SLACK * (way_s + step_s) * count / (len(here) + count)):
            end_s = due_s + late_s
    return end_s if now_s < end_s else None
