"""The search for memory: whom it asks, in which order, how often, and that it always goes on."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from plait.ids import PeerId
from plait.kvcache import (
    AskCreditor,
    AskManager,
    Candidates,
    HuntAction,
    HuntEvent,
    KvBlockPool,
    LentBlock,
    LoanBook,
    LoanGranted,
    LoanHunt,
    LoanRefused,
    LoanTerms,
    NotGranted,
    PeerGone,
    TimePassed,
    Wanted,
    on_hunt_event,
)

A, B, C = (PeerId(name) for name in "abc")


def after(hunt: LoanHunt, *events: HuntEvent, now_s: float = 0.0) -> tuple[LoanHunt, tuple[HuntAction, ...]]:
    actions: tuple[HuntAction, ...] = ()
    for event in events:
        hunt, actions = on_hunt_event(hunt, event, now_s)
    return hunt, actions


def test_it_asks_the_manager_then_one_creditor_after_another() -> None:
    hunt, actions = after(LoanHunt(next_number=5), Wanted(8))
    assert actions == (AskManager(5, 8),)
    hunt, actions = after(hunt, Candidates(5, (A, B)))
    assert actions == (AskCreditor(A, 6, 8),) and hunt.settled == 5
    assert after(hunt, LoanRefused(B, 6, 0), LoanGranted(A, 5)) == (hunt, ()), "neither was asked that"
    hunt, actions = after(hunt, LoanRefused(A, 6, 3))
    assert actions == (AskCreditor(B, 7, 8),) and hunt.settled == 6
    hunt, actions = after(hunt, LoanGranted(B, 7))
    assert actions == () and hunt.resting and hunt.wanted_blocks == 0 and hunt.settled == 7


def test_the_last_one_is_asked_for_what_it_has() -> None:
    hunt, actions = after(LoanHunt(next_number=0), Wanted(8), Candidates(0, (A,)), LoanRefused(A, 1, 3))
    assert actions == (AskCreditor(A, 2, 3),)
    hunt, _ = after(hunt, LoanGranted(A, 2))
    assert hunt.resting and hunt.wanted_blocks == 5
    assert after(hunt, TimePassed())[1] == (AskManager(3, 5),)


def test_who_is_silent_or_gone_is_passed_over() -> None:
    hunt, _ = after(LoanHunt(next_number=0), Wanted(2), Candidates(0, (A, B, C)))
    assert after(hunt, TimePassed(), now_s=0.5) == (hunt, ())
    hunt, actions = after(hunt, PeerGone(B), TimePassed(), now_s=1.5)
    assert actions == (AskCreditor(C, 2, 2),)
    hunt, actions = after(hunt, PeerGone(C), now_s=1.6)
    assert actions == () and hunt.resting and hunt.failures == 1


def test_a_dead_manager_is_asked_again_less_and_less_often() -> None:
    hunt, now_s = LoanHunt(next_number=0), 0.0
    asked: list[float] = []
    hunt, actions = after(hunt, Wanted(1), now_s=now_s)
    while now_s < 60.0:
        asked += [now_s] * len(actions)
        now_s += 0.1
        hunt, actions = after(hunt, TimePassed(), now_s=now_s)
    gaps = [round(later - earlier) for earlier, later in pairwise(asked)]
    assert len(asked) > 5 and gaps == sorted(gaps) and gaps[0] == 1 and gaps[-1] == 6


def test_what_is_not_wanted_any_more_is_not_asked_for() -> None:
    hunt, _ = after(LoanHunt(next_number=0), Wanted(2), Candidates(0, (A, B)))
    hunt, actions = after(hunt, Wanted(0), LoanRefused(A, 1, 0))
    assert actions == () and hunt.resting


events = st.one_of(
    st.builds(Wanted, st.integers(0, 6)),
    st.builds(Candidates, st.integers(0, 40), st.lists(st.sampled_from([A, B, C]), max_size=3).map(tuple)),
    st.builds(PeerGone, st.sampled_from([A, B, C])),
    st.just(TimePassed()),
)


@settings(deadline=None)
@given(st.lists(st.tuples(events, st.floats(0.0, 2.0)), max_size=40), st.data())
def test_under_any_events_it_ends_or_gets_memory_and_nothing_stays_reserved(
    happenings: list[tuple[HuntEvent, float]], data: st.DataObject
) -> None:
    """Creditors answer, or their answer is lost; when all is over, a renewal leaves what the debtor knows of."""
    books = {peer: LoanBook(KvBlockPool(8), LoanTerms(lendable_blocks=6, lease_s=1e9)) for peer in (A, B, C)}
    known: dict[PeerId, list[LentBlock]] = {A: [], B: [], C: []}
    hunt, now_s, numbers = LoanHunt(next_number=0), 0.0, -1
    pending = list(happenings)
    while pending:
        event, pause_s = pending.pop(0)
        now_s += pause_s
        if isinstance(event, Candidates) and hunt.asked_manager is not None and data.draw(st.booleans()):
            event = replace(event, number=hunt.asked_manager)
        hunt, actions = on_hunt_event(hunt, event, now_s)
        for action in actions:
            assert action.number > numbers and action.kv_blocks >= 1
            numbers = action.number
            if isinstance(action, AskManager):
                continue
            answer = books[action.creditor].reserve(PeerId("d"), action.number, action.kv_blocks, now_s)
            if not data.draw(st.booleans()):
                continue
            if isinstance(answer, NotGranted):
                pending.insert(0, (LoanRefused(action.creditor, answer.number, answer.lendable_blocks), 0.1))
            else:
                known[action.creditor] += answer.blocks
                pending.insert(0, (LoanGranted(action.creditor, answer.number), 0.1))
    hunt, _ = after(hunt, Wanted(0), TimePassed(), now_s=now_s + 100.0)
    hunt, _ = after(hunt, TimePassed(), now_s=now_s + 200.0)
    assert hunt.resting
    for peer, book in books.items():
        assert book.renew(PeerId("d"), known[peer], hunt.settled, now_s) == ()
        assert book.lent_blocks == len(known[peer])
        book.check()
