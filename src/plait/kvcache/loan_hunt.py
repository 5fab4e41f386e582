"""How a debtor comes by memory: it asks whom to ask, then asks them one after another.

    resting ──wanted──▶ choosing ──candidates──▶ asking ──granted──▶ resting
       ▲                   │ none, manager gone      │ refused, silent, gone: the next one
       └─────waits─────────┴──────── nobody left ────┘

Nothing is retried at once: after a hunt in vain the debtor waits, longer each time, up to a bound; what it wants then
is looked at anew. Whoever manages the ledger may die at any moment: that is a hunt in vain. A creditor that does not
answer may have granted: its number is settled as soon as the hunt has moved on, so the next renewal tells it what the
debtor does not have (`LoanBook.renew`). Pull of blocks after Infinite-LLM (Lin et al. 2024, version 1); waiting and
deadlines are ours.
"""

from dataclasses import dataclass, replace
from typing import assert_never

from plait.ids import PeerId

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many blocks are short now; 0: none are, any more."""

    kv_blocks: int


@dataclass(frozen=True, slots=True)
class Candidates:
    """The manager's answer to `AskManager` of that number."""

    number: int
    creditors: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class LoanGranted:
    """A creditor granted the reservation of that number."""

    creditor: PeerId
    number: int


@dataclass(frozen=True, slots=True)
class LoanRefused:
    """A creditor refused it; it could have lent `lendable_blocks`."""

    creditor: PeerId
    number: int
    lendable_blocks: int


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A peer, the manager maybe, is gone."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing else happened; the clock is to be looked at."""


HuntEvent = Wanted | Candidates | LoanGranted | LoanRefused | PeerGone | TimePassed


@dataclass(frozen=True, slots=True)
class AskManager:
    """Ask the manager who could lend so many blocks."""

    number: int
    kv_blocks: int


@dataclass(frozen=True, slots=True)
class AskCreditor:
    """Ask a creditor to reserve so many blocks under that number."""

    creditor: PeerId
    number: int
    kv_blocks: int


HuntAction = AskManager | AskCreditor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoanHunt:
    """A debtor's search for memory. `next_number` begins above all that this debtor ever used."""

    next_number: int
    answer_within_s: float = 1.0
    wanted_blocks: int = 0
    asked_blocks: int = 0
    asked_manager: int | None = None
    asked_creditor: tuple[PeerId, int] | None = None
    left: tuple[PeerId, ...] = ()
    until_s: float = 0.0
    """When the one who was asked has taken too long; between hunts, when the next may begin."""
    failures: int = 0
    """Hunts in vain in a row."""

    @property
    def resting(self) -> bool:
        """Whether nobody is being asked."""
        return self.asked_manager is None and self.asked_creditor is None

    @property
    def settled(self) -> int:
        """All reservations numbered up to this have been answered, or given up."""
        return self.next_number - 1 if self.asked_creditor is None else self.asked_creditor[1] - 1


def on_hunt_event(hunt: LoanHunt, event: HuntEvent, now_s: float) -> tuple[LoanHunt, tuple[HuntAction, ...]]:
    """What the search does next."""
    match event:
        case Wanted(kv_blocks):
            return _begin(replace(hunt, wanted_blocks=kv_blocks), now_s)
        case Candidates(number, creditors):
            if number != hunt.asked_manager:
                return hunt, ()
            return _ask_next(replace(hunt, asked_manager=None, left=creditors), now_s)
        case LoanGranted(creditor, number):
            if hunt.asked_creditor != (creditor, number):
                return hunt, ()
            got = replace(hunt, asked_creditor=None, left=(), failures=0, until_s=now_s)
            return replace(got, wanted_blocks=max(0, hunt.wanted_blocks - hunt.asked_blocks)), ()
        case LoanRefused(creditor, number, lendable_blocks):
            if hunt.asked_creditor != (creditor, number):
                return hunt, ()
            if 0 < lendable_blocks < hunt.asked_blocks and not hunt.left:
                return _ask(hunt, creditor, lendable_blocks, now_s)
            return _ask_next(hunt, now_s)
        case PeerGone(peer):
            hunt = replace(hunt, left=tuple(each for each in hunt.left if each != peer))
            if hunt.asked_creditor is not None and hunt.asked_creditor[0] == peer:
                return _ask_next(hunt, now_s)
            return hunt, ()
        case TimePassed():
            if hunt.resting or now_s < hunt.until_s:
                return _begin(hunt, now_s)
            return _ask_next(replace(hunt, asked_manager=None), now_s)
        case _:
            assert_never(event)


def _begin(hunt: LoanHunt, now_s: float) -> tuple[LoanHunt, tuple[HuntAction, ...]]:
    if not hunt.wanted_blocks or not hunt.resting or now_s < hunt.until_s:
        return hunt, ()
    number = hunt.next_number
    begun = replace(
        hunt,
        next_number=number + 1,
        asked_manager=number,
        asked_blocks=hunt.wanted_blocks,
        until_s=now_s + hunt.answer_within_s,
    )
    return begun, (AskManager(number, hunt.wanted_blocks),)


def _ask_next(hunt: LoanHunt, now_s: float) -> tuple[LoanHunt, tuple[HuntAction, ...]]:
    """Go on to the next candidate; with none left, or nothing wanted any more, the hunt has ended."""
    if hunt.left and hunt.wanted_blocks:
        return _ask(replace(hunt, left=hunt.left[1:]), hunt.left[0], hunt.wanted_blocks, now_s)
    pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**hunt.failures)
    failures = min(hunt.failures + 1, 30)
    ended = replace(hunt, asked_manager=None, asked_creditor=None, left=(), failures=failures)
    return replace(ended, until_s=now_s + pause_s), ()


def _ask(
    hunt: LoanHunt, creditor: PeerId, kv_blocks: int, now_s: float
) -> tuple[LoanHunt, tuple[HuntAction, ...]]:
    number = hunt.next_number
    asking = replace(
        hunt,
        next_number=number + 1,
        asked_creditor=(creditor, number),
        asked_blocks=kv_blocks,
        until_s=now_s + hunt.answer_within_s,
    )
    return asking, (AskCreditor(creditor, number, kv_blocks),)
