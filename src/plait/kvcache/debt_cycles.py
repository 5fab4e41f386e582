"""Debts that lead nowhere: an instance that lends what it then has to borrow.

Debts are a directed graph, debtor to creditor. On a cycle everybody could keep as many blocks at home as its smallest
debt has, and nobody would need a block more; so that many are taken home by each, and one edge is gone. Then whoever
has both debts and free memory takes home what fits. Remote blocks only become fewer. After DGFM of Infinite-LLM (Lin et
al. 2024, version 1); the order, which makes the result the same everywhere, is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from plait.ids import PeerId

Debts = Mapping[tuple[PeerId, PeerId], int]
"""Blocks by (debtor, creditor)."""


@dataclass(frozen=True, slots=True)
class CycleSettlement:
    """Each of `members`, who borrows from the next (the last from the first), takes `kv_blocks` home."""

    members: tuple[PeerId, ...]
    kv_blocks: int


@dataclass(frozen=True, slots=True)
class TakeHome:
    """`debtor` moves so many blocks from `creditor` into free memory of its own."""

    debtor: PeerId
    creditor: PeerId
    kv_blocks: int


def settle_cycles(debts: Debts) -> tuple[tuple[CycleSettlement, ...], dict[tuple[PeerId, PeerId], int]]:
    """The settlements that leave no cycle, in order, and the debts that remain."""
    left = {edge: blocks for edge, blocks in sorted(debts.items()) if blocks > 0}
    settlements: list[CycleSettlement] = []
    while (members := _cycle(left)) is not None:
        edges = list(zip(members, members[1:] + members[:1], strict=True))
        kv_blocks = min(left[edge] for edge in edges)
        for edge in edges:
            left[edge] -= kv_blocks
            if not left[edge]:
                del left[edge]
        settlements.append(CycleSettlement(members, kv_blocks))
    return tuple(settlements), left


def plan_take_home(debts: Debts, free_blocks: Mapping[PeerId, int]) -> tuple[TakeHome, ...]:
    """What debtors with free memory take home, largest debts first; `free_blocks` are those they can spare."""
    left = dict(free_blocks)
    homeward: list[TakeHome] = []
    for (debtor, creditor), owed in sorted(debts.items(), key=lambda each: (each[0][0], -each[1], each[0])):
        kv_blocks = min(owed, left.get(debtor, 0))
        if kv_blocks > 0:
            left[debtor] -= kv_blocks
            homeward.append(TakeHome(debtor, creditor, kv_blocks))
    return tuple(homeward)


def _cycle(debts: Debts) -> tuple[PeerId, ...] | None:
    """A cycle of the graph, beginning with its smallest member; None if there is none."""
    creditors: dict[PeerId, list[PeerId]] = {}
    for debtor, creditor in sorted(debts):
        creditors.setdefault(debtor, []).append(creditor)
    done: set[PeerId] = set()
    for start in creditors:
        path: list[PeerId] = []
        choices = [iter([start])]
        while choices:
            following = next(choices[-1], None)
            if following is None:
                choices.pop()
                if path and choices:
                    done.add(path.pop())
            elif following in path:
                cycle = path[path.index(following) :]
                first = cycle.index(min(cycle))
                return tuple(cycle[first:] + cycle[:first])
            elif following not in done:
                path.append(following)
                choices.append(iter(creditors.get(following, ())))
    return None
