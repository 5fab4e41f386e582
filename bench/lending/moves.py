"""What moving blocks costs the answers that go on meanwhile, at one rate of moving.

One answer streams on the debtor, whose pool it nearly fills. A prompt as long again arrives, which there is room for
only when blocks of the first have moved out, so many tokens at a step. Compared are the times between tokens of the
first answer while they move, and afterwards, when they have.
"""

import statistics
import threading
import time
from dataclasses import dataclass
from itertools import pairwise

from lending.asking import Wish, ask
from lending.small_pools import SmallPools

POOLS = {"debtor": 64, "creditor": 160}
PINNED = {"pinned": ["debtor"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moving:
    """One such pair. Medians of the times between tokens before the second prompt, while it waits, and after."""

    moved_tokens_per_step: int
    before_s: float
    moving_s: float
    moving_p95_s: float
    after_s: float
    steps_while_moving: int
    moved_blocks: int
    second_waited_s: float
    error: str


def one_pair(swarm: SmallPools, rate: int, turn: int) -> Moving:
    """Ask twice."""
    first = Wish(number=5000 + turn, prompt_tokens=600, answer_tokens=400)
    second = Wish(number=5500 + turn, prompt_tokens=700, answer_tokens=1)
    moved_before = swarm.loans("debtor")["moved_out_total"]
    arrived: list[float] = []
    waiting: list[threading.Thread] = []
    second_answers: list[tuple[float, str]] = []

    def ask_second() -> None:
        answer = ask(swarm.origin, second, route=PINNED)
        second_answers.append((time.time(), answer.error))

    def on_tokens(count: int) -> None:
        if count >= 100 and not arrived:
            arrived.append(time.time())
            waiting.append(threading.Thread(target=ask_second))
            waiting[0].start()

    answer = ask(swarm.origin, first, on_tokens, route=PINNED)
    waiting[0].join()
    from_s, (until_s, error) = arrived[0], second_answers[0]
    gaps = [(later, later - one) for one, later in pairwise(answer.unix_s)]
    before = [gap for at_s, gap in gaps[20:] if at_s < from_s]
    moving = [gap for at_s, gap in gaps if from_s <= at_s < until_s]
    after = [gap for at_s, gap in gaps if at_s >= until_s + 0.05]
    swarm.wait_free()
    return Moving(
        moved_tokens_per_step=rate,
        before_s=statistics.median(before),
        moving_s=statistics.median(moving) if moving else 0.0,
        moving_p95_s=sorted(moving)[int(0.95 * len(moving))] if moving else 0.0,
        after_s=statistics.median(after) if after else 0.0,
        steps_while_moving=len(moving),
        moved_blocks=swarm.loans("debtor")["moved_out_total"] - moved_before,
        second_waited_s=until_s - from_s,
        error="; ".join(filter(None, (answer.error, error))),
    )
