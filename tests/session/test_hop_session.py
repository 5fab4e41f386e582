"""One session at one hop, alone: whatever peers send, it neither breaks nor says what it should not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_swarm import FACTS, GATEWAY, HIDDEN, SESSION, VOCAB, peer_named, wish_for

from plait.ids import PeerId
from plait.session import (
    CutOff,
    Feed,
    Forget,
    Forward,
    HopAction,
    HopSession,
    SampledRow,
    Tell,
    Unreadable,
)
from plait.wire import ChainHop, Fault, Fence, Fenced, OpenSession, Resume, Step, Taken, Tokens

HOPS = tuple(ChainHop(peer_named(number), 2 * number - 2, 2 * number) for number in (1, 2, 3))


def opened(index: int, *, prompt_tokens: int = 40, answer_tokens: int = 60, drafts: int = 4) -> HopSession:
    wish = wish_for(6, prompt_tokens, answer_tokens)
    opening = OpenSession(
        session=SESSION,
        epoch=1,
        index=index,
        hops=HOPS,
        model="model",
        prompt_tokens=prompt_tokens,
        max_tokens=wish.max_tokens,
        wire_format="float32",
        sampling=wish.sampling if index == 2 else None,
        draft_tokens=drafts,
        arrived_unix_s=0.0,
        held=False,
    )
    return HopSession(opening, own=HOPS[index].peer, gateway=GATEWAY, facts=FACTS)


def rows(tokens: int) -> np.ndarray:
    return np.zeros((tokens, HIDDEN), np.float32)


def step(number: int, start: int, tokens: int, *, samples: int = 0, drafts: int = 0, epoch: int = 1) -> Step:
    return Step(SESSION, epoch, number, start, (1,) * tokens, samples, drafts)


def kinds(actions: list[HopAction]) -> list[type]:
    return [type(action) for action in actions]


def test_a_long_prompt_is_fed_slice_by_slice_and_sent_within_the_window() -> None:
    first = opened(0, prompt_tokens=7000)
    (feed,) = first.on_step(GATEWAY, step(1, 0, 7000, samples=1), None)
    sent = 0
    fed_ahead: list[int] = []
    while isinstance(feed, Feed):
        actions = first.on_output(feed.start, len(feed.token_ids), rows(len(feed.token_ids)), ())
        sent = max(
            [sent, *(one.step.start + len(one.step.token_ids) for one in actions if isinstance(one, Forward))]
        )
        feeds = [one for one in actions if isinstance(one, Feed)]
        if not feeds:  # the window is full until the next hop has taken something
            fed_ahead.append(sent)
            feeds = [
                one for one in first.on_taken(HOPS[1].peer, Taken(SESSION, 1, sent)) if isinstance(one, Feed)
            ]
        feed = feeds[0] if feeds else None
    assert sent == 7000
    assert fed_ahead[0] == 2048
    assert first.kept.end == 7000


def test_messages_of_other_epochs_and_old_numbers_are_dropped() -> None:
    middle = opened(1)
    assert kinds(middle.on_step(HOPS[0].peer, step(1, 0, 10), rows(10))) == [Feed]
    for old in (step(1, 0, 10), step(2, 10, 5, epoch=2), step(2, 10, 5, epoch=3)):
        assert middle.on_step(HOPS[0].peer, old, rows(len(old.token_ids))) == []
    assert kinds(middle.on_step(HOPS[0].peer, step(2, 10, 5), rows(5))) == [Feed]
    (fault,) = middle.on_step(HOPS[0].peer, step(4, 15, 5), rows(5))
    assert isinstance(fault, Tell)
    assert isinstance(fault.message, Fault)
    assert fault.message.code == "gap"
    assert middle.on_step(HOPS[0].peer, step(5, 20, 5), rows(5)) == []


@pytest.mark.parametrize("sender", [GATEWAY, HOPS[2].peer, peer_named(9)])
def test_only_the_hop_before_is_listened_to(sender: PeerId) -> None:
    middle = opened(1)
    assert kinds(middle.on_step(sender, step(1, 0, 10), rows(10))) == [CutOff]
    assert kinds(middle.on_step(sender, step(1, 0, 10), Unreadable("nonsense"))) == [CutOff]
    assert kinds(middle.on_step(HOPS[0].peer, step(1, 0, 10), rows(10))) == [Feed]


@pytest.mark.parametrize(("index", "lost"), [(0, 1), (1, 2), (2, 0)])
def test_a_hop_that_cannot_reach_who_gets_its_outputs_says_so(index: int, lost: int) -> None:
    """The last one's tokens go to the first."""
    hop = opened(index)
    for other in range(3):
        if other != lost:
            assert hop.on_lost(HOPS[other].peer) == []
    assert hop.on_lost(HOPS[lost].peer) == [
        Tell(GATEWAY, Fault(SESSION, 1, HOPS[lost].peer, "unreachable", "the next hop cannot be reached"))
    ]


def test_a_fenced_hop_says_what_it_knows_and_runs_nothing_before_it_is_resumed() -> None:
    middle = opened(1)
    middle.on_step(HOPS[0].peer, step(1, 0, 40, samples=1), rows(40))
    middle.on_output(0, 30, rows(30), ())
    forget, fenced = middle.on_fence(Fence(SESSION, 2, 40, 1))
    assert forget == Forget(30)
    assert isinstance(fenced, Tell)
    assert fenced.message == Fenced(SESSION, 2, 30, 0)
    assert middle.on_output(30, 10, rows(10), ()) == []
    assert middle.on_fence(Fence(SESSION, 2, 40, 1)) == []
    assert middle.on_step(HOPS[0].peer, step(1, 30, 10, samples=1, epoch=2), rows(10)) == []
    actions = middle.on_resume(Resume(SESSION, 2, 1, HOPS, 40, 30, 20))
    assert kinds(actions) == [Forward, Feed]
    replayed = actions[0]
    assert isinstance(replayed, Forward)
    assert (replayed.step.start, len(replayed.step.token_ids)) == (20, 10)


def test_guesses_that_the_gateway_does_not_confirm_are_not_known() -> None:
    middle = opened(1)
    middle.on_step(HOPS[0].peer, step(1, 0, 40, samples=1), rows(40))
    middle.on_output(0, 40, rows(40), ())
    guessed = Step(SESSION, 1, 2, 40, (7, 8, 9), 3, 2)
    middle.on_step(HOPS[0].peer, guessed, rows(3))
    middle.on_output(40, 3, rows(3), ())
    for tokens, last, known in ((42, 8, 42), (42, 5, 41), (43, 9, 43), (44, 3, 43), (41, 7, 41)):
        again = opened(1)
        again.on_step(HOPS[0].peer, step(1, 0, 40, samples=1), rows(40))
        again.on_output(0, 40, rows(40), ())
        again.on_step(HOPS[0].peer, guessed, rows(3))
        again.on_output(40, 3, rows(3), ())
        told = again.on_fence(Fence(SESSION, 2, tokens, last))[-1]
        assert isinstance(told, Tell)
        assert isinstance(told.message, Fenced)
        assert told.message.known == known


def small(top: int) -> st.SearchStrategy[int]:
    return st.integers(0, top)


PEERS = st.sampled_from([GATEWAY, *(hop.peer for hop in HOPS), peer_named(9)])
TOKEN_IDS = st.lists(st.integers(0, VOCAB + 1), min_size=1, max_size=6).map(tuple)
MESSAGES = st.one_of(
    st.builds(
        Step,
        st.just(SESSION),
        st.integers(1, 3),
        st.integers(1, 4),
        small(110),
        TOKEN_IDS,
        small(7),
        small(4),
    ),
    st.builds(
        Tokens,
        st.just(SESSION),
        st.integers(1, 3),
        st.integers(1, 4),
        small(110),
        TOKEN_IDS,
        st.none(),
        st.sampled_from(["", "stop", "length"]),
    ),
    st.builds(Taken, st.just(SESSION), st.integers(1, 3), small(110)),
    st.builds(Fence, st.just(SESSION), st.integers(1, 4), small(110), st.integers(0, VOCAB)),
    st.builds(
        Resume,
        st.just(SESSION),
        st.integers(1, 4),
        small(4),
        st.sampled_from([HOPS, HOPS[:1], HOPS[1:], HOPS[::-1]]),
        small(110),
        small(110),
        small(110),
    ),
)


@settings(max_examples=400)
@given(index=small(2), things=st.lists(st.tuples(PEERS, MESSAGES, small(6), st.booleans()), max_size=40))
def test_no_message_breaks_it(
    index: int, things: list[tuple[PeerId, Step | Tokens | Taken | Fence | Resume, int, bool]]
) -> None:
    session = opened(index, prompt_tokens=4, answer_tokens=100)
    fed: list[Feed] = []
    computed = 0
    for sender, message, amount, runs in things:
        match message:
            case Step():
                right = len(message.token_ids)
                given_rows = None if session.first else rows(amount if amount > 3 else right)
                actions = session.on_step(sender, message, given_rows)
            case Tokens():
                actions = session.on_tokens(sender, message)
            case Taken():
                actions = session.on_taken(sender, message)
            case Fence():
                actions = session.on_fence(message)
            case Resume():
                actions = session.on_resume(message)
        while True:
            for action in actions:
                match action:
                    case Feed():
                        assert not session.held
                        computed = min(computed, action.start)
                        fed.append(action)
                    case Forget(known):
                        fed.clear()
                        computed = known
                    case Forward(step=sent):
                        assert sent.epoch == session.epoch
                        assert not session.held
                    case _:
                        pass
            if not (runs and fed):
                break
            feed = fed.pop(0)
            tokens = len(feed.token_ids)
            samples = [SampledRow(1, None)] if session.last and feed.sample_rows else []
            actions = session.on_output(feed.start, tokens, None if session.last else rows(tokens), samples)
        assert session.kept.end <= session.kept.start + 110
