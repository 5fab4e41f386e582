"""Where each hop goes on after the chain has changed, so that as little as possible is computed again."""

from collections.abc import Sequence


def plan_resume(known: Sequence[int], kept_from: Sequence[int], tokens: int) -> tuple[int, ...]:
    """How many positions each hop is to know when the session goes on: it computes those from there on again.

    Hop i has computed the positions below `known[i]` and keeps its outputs for those from `kept_from[i]` on (PETALS
    2023, section 3.2, keeps the inputs at the client instead). The gateway has `tokens` tokens. The last hop computes
    position `tokens` - 1 once more, because its sample is what comes next. From there back, a hop must send what its
    successor does not know: from what it keeps, or else by computing it again. So nobody knows more than it was sent,
    and hops that lost nothing compute nothing.
    """
    assert len(known) == len(kept_from) and tokens > 0
    planned: list[int] = []
    for hop in reversed(range(len(known))):
        if not planned:
            planned.append(min(known[hop], tokens - 1))
            continue
        successor = planned[-1]
        own = min(known[hop], tokens)
        planned.append(min(own, successor) if kept_from[hop] > successor else own)
    return tuple(reversed(planned))
