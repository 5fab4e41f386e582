"""One session over a chain of model hops: its tokens are always those of one machine, whatever happens on the way."""

from itertools import pairwise

import numpy as np
import pytest
from model_swarm import GATEWAY, ModelSwarm, expected_tokens, peer_named, wish_for

from plait.errors import EngineFailure, NoCapacity, NoRoute
from plait.session import Heard, SessionTimes
from plait.wire import Tokens

FOUR = [range(3), range(3, 6), range(6, 9), range(9, 12)]
SPARES = [range(6), range(3, 9), range(6, 12)]


def answered(swarm: ModelSwarm) -> bool:
    """Whether the session ended with the right tokens and all it held is free."""
    assert swarm.error is None, swarm.error
    assert swarm.emitted == expected_tokens(swarm.session.wish)
    swarm.drain()
    return all(hop.session is None for hop in swarm.hops.values())


@pytest.mark.parametrize("cuts", [(), (1,), (11,), (4, 8), (1, 2, 3), (2, 5, 6, 11), (2, 4, 6, 8, 10)])
@pytest.mark.parametrize("drafts", [0, 5])
def test_any_cut_gives_the_tokens_of_one_machine(cuts: tuple[int, ...], drafts: int) -> None:
    bounds = [0, *cuts, 12]
    spans = [range(*pair) for pair in pairwise(bounds)]
    for seed in range(3):
        swarm = ModelSwarm(wish_for(12, 30, 40, drafts=drafts), spans, seed=seed)
        swarm.run()
        assert answered(swarm)
        assert len(swarm.session.hops) == len(spans)


def test_a_long_prompt_flows_in_slices_within_the_window() -> None:
    swarm = ModelSwarm(wish_for(3, 9000, 4), [range(1), range(1, 2), range(2, 3)], seed=1)
    swarm.run()
    assert answered(swarm)
    assert [swarm.work(hop) for hop in swarm.hops] == [9003] * 3


def test_an_answer_ends_at_a_stop_token_and_no_step_follows() -> None:
    wish = wish_for(4, 10, 60)
    stop = expected_tokens(wish)[11]
    wish = wish_for(4, 10, 60, stops=(stop,))
    assert 1 < len(expected_tokens(wish)) <= 12
    for drafts in (0, 4):
        wish = wish_for(4, 10, 60, stops=(stop,), drafts=drafts)
        swarm = ModelSwarm(wish, [range(2), range(2, 4)])
        swarm.run()
        assert answered(swarm)
        assert drafts or swarm.work(peer_named(1)) == 10 + len(swarm.emitted) - 1


def test_guessing_saves_rounds() -> None:
    plain = ModelSwarm(wish_for(4, 30, 60), [range(2), range(2, 4)])
    plain.run()
    guessing = ModelSwarm(wish_for(4, 30, 60, drafts=6), [range(2), range(2, 4)])
    guessing.run()
    assert answered(guessing)
    assert plain.rounds == 60
    assert guessing.rounds < 40


@pytest.mark.parametrize("lost", range(4))
def test_a_hop_lost_at_any_token_costs_its_own_span_only(lost: int) -> None:
    prompt_tokens, answer_tokens, computed_again = 8, 24, 0
    for at in range(answer_tokens):
        wish = wish_for(12, prompt_tokens, answer_tokens)
        swarm = ModelSwarm(wish, [*FOUR, *FOUR], seed=at)
        swarm.run(until_tokens=at)
        chain = swarm.session.hops
        if at == 0:  # somewhere while it opens or computes the prompt
            for _ in range(int(swarm.rng.integers(1, 12))):
                swarm.step()
            chain = swarm.session.hops
        swarm.kill(chain[lost].peer)
        swarm.run()
        assert answered(swarm)
        all_tokens = prompt_tokens + answer_tokens - 1
        for place, hop in enumerate(chain):
            again = swarm.work(hop.peer) - all_tokens
            if place != lost:
                # A token may have been sampled that the gateway had not heard of.
                assert 0 <= again <= 1, (at, place, again)
                computed_again += again
        replacement = swarm.session.hops[lost]
        assert replacement.blocks == chain[lost].blocks
        assert swarm.work(replacement.peer) == all_tokens
        if at:
            assert swarm.session.recoveries == 1
    assert computed_again < answer_tokens


@pytest.mark.parametrize("lost", [(0, 1), (1, 2), (2, 3), (0, 3), (0, 1, 2), (0, 1, 2, 3)])
def test_several_hops_lost_at_once(lost: tuple[int, ...]) -> None:
    for at in (1, 5, 12, 23):
        swarm = ModelSwarm(wish_for(12, 8, 24, drafts=3), [*FOUR, *FOUR], seed=at)
        swarm.run(until_tokens=at)
        chain = swarm.session.hops
        for place in lost:
            swarm.kill(chain[place].peer)
        swarm.run()
        assert answered(swarm)
        for place in {0, 1, 2} - set(lost):
            assert swarm.session.hops[place] == chain[place]
            assert max(swarm.hops[chain[place].peer].ran.values()) <= 2


@pytest.mark.parametrize("seed", range(12))
def test_a_hop_is_replaced_by_several_and_several_by_one(seed: int) -> None:
    swarm = ModelSwarm(wish_for(12, 12, 30), [range(4), range(4, 8), range(8, 12)], seed=seed)
    spares = ModelSwarm(wish_for(12, 12, 30), [range(3, 5), range(5, 6), range(5, 9), range(2, 12)])
    spares_of = {peer_named(10 + number): hop for number, hop in enumerate(spares.hops.values())}
    for peer, hop in spares_of.items():
        hop.peer = peer
    swarm.run(until_tokens=7)
    swarm.hops |= spares_of
    swarm.kill(peer_named(2))
    swarm.run(until_tokens=15)
    assert len(swarm.session.hops) >= 2
    swarm.kill(peer_named(3))
    swarm.run()
    assert answered(swarm)


def test_a_loss_during_replay_starts_the_replay_again() -> None:
    for steps in range(40):
        swarm = ModelSwarm(wish_for(12, 20, 16), [*FOUR, *FOUR, *FOUR], seed=steps)
        swarm.run(until_tokens=8)
        swarm.kill(swarm.session.hops[1].peer)
        for _ in range(steps):
            swarm.step()
        place = steps % 4
        if place < len(swarm.session.hops):
            swarm.kill(swarm.session.hops[place].peer)
        swarm.run()
        assert answered(swarm)


def test_outputs_that_are_kept_no_more_are_computed_again() -> None:
    swarm = ModelSwarm(wish_for(12, 20, 16), [*FOUR, *FOUR], seed=3)
    swarm.run(until_tokens=8)
    chain = swarm.session.hops
    first = swarm.hops[chain[0].peer].session
    assert first is not None
    held_bytes = first.kept.held_bytes
    first.forget_sent()
    assert first.kept.held_bytes == 0 < held_bytes
    swarm.kill(chain[1].peer)
    swarm.run()
    assert answered(swarm)
    assert swarm.work(chain[0].peer) > 20 + 16 - 1
    assert swarm.work(chain[2].peer) == 20 + 16 - 1


def test_without_holders_it_waits_and_then_names_the_blocks() -> None:
    swarm = ModelSwarm(wish_for(12, 8, 20), FOUR, times=SessionTimes(recovery_s=60))
    swarm.run(until_tokens=5)
    lost_at_s = swarm.now_s
    swarm.kill(peer_named(3))
    swarm.run()
    assert isinstance(swarm.error, NoRoute)
    assert swarm.error.missing_blocks == (6,)
    assert "6:7" in swarm.error.message
    assert swarm.now_s >= lost_at_s + 60
    assert swarm.emitted == expected_tokens(swarm.session.wish)[: len(swarm.emitted)]
    swarm.drain()
    assert all(hop.session is None for hop in swarm.hops.values())


def test_a_holder_that_returns_in_time_resumes_the_answer() -> None:
    for lost in range(4):
        swarm = ModelSwarm(wish_for(12, 8, 20), FOUR, seed=lost)
        swarm.run(until_tokens=5)
        swarm.kill(peer_named(lost + 1))
        swarm.drain()
        for _ in range(5):
            swarm.pass_time()
        assert not swarm.ended
        swarm.revive(peer_named(lost + 1))
        swarm.run()
        assert answered(swarm)


def test_nobody_there_at_all_is_an_error_that_names_the_blocks() -> None:
    swarm = ModelSwarm(wish_for(12, 8, 20), [range(6)])
    swarm.run()
    assert isinstance(swarm.error, NoRoute)
    assert swarm.error.missing_blocks == (6,)


def test_a_full_worker_is_left_for_another_and_all_full_is_no_capacity() -> None:
    for seed in range(6):
        swarm = ModelSwarm(wish_for(12, 8, 6), [*FOUR, *FOUR], seed=seed)
        full = swarm.session.hops[1].peer
        swarm.hops[full].full = True
        swarm.run()
        assert answered(swarm)
        assert not swarm.bans
    swarm = ModelSwarm(wish_for(12, 8, 6), FOUR)
    swarm.hops[peer_named(2)].full = True
    swarm.run()
    assert type(swarm.error) is NoCapacity
    assert swarm.now_s == 0


@pytest.mark.parametrize("frozen", range(4))
def test_a_hop_that_answers_nothing_is_replaced(frozen: int) -> None:
    for at in (0, 1, 9):
        swarm = ModelSwarm(wish_for(12, 8, 16), [*FOUR, *FOUR], seed=at)
        swarm.run(until_tokens=at)
        chain = swarm.session.hops
        swarm.hops[chain[frozen].peer].frozen = True
        swarm.run()
        assert swarm.error is None
        assert swarm.emitted == expected_tokens(swarm.session.wish)
        assert swarm.session.hops[frozen].peer != chain[frozen].peer
        assert chain[frozen].peer in {ban.peer for ban in swarm.bans}


def test_a_hop_that_answers_but_computes_nothing_is_replaced() -> None:
    swarm = ModelSwarm(wish_for(12, 8, 16), [*FOUR, *FOUR], seed=2)
    swarm.run(until_tokens=4)
    stuck = swarm.hops[swarm.session.hops[2].peer]
    stuck.run = lambda limit: []  # type: ignore[method-assign]
    for _ in range(100_000):
        if swarm.ended:
            break
        # All that can happen but the stuck engine has happened: time passes.
        idle = not any(swarm.links.values()) and all(
            hop is stuck or not hop.feeds for hop in swarm.hops.values()
        )
        if idle or not swarm.step():
            swarm.pass_time()
    assert swarm.error is None
    assert swarm.emitted == expected_tokens(swarm.session.wish)
    assert stuck.peer in {ban.peer for ban in swarm.bans}


def test_slow_hops_that_get_on_are_given_time() -> None:
    swarm = ModelSwarm(wish_for(12, 200, 3), [*FOUR, *FOUR], seed=4)
    swarm.most_tokens = 4
    stalls = 0
    for count in range(100_000):
        if swarm.ended:
            break
        if swarm.session.phase == "flowing" and not swarm.emitted and count % 60 == 59:
            stalls += 1
            swarm.pass_time()
        elif not swarm.step():
            swarm.pass_time()
    assert stalls > 3
    assert answered(swarm)
    assert not swarm.bans
    assert sum(1 for hop in swarm.hops.values() if hop.ran) == 4


def test_messages_that_come_twice_late_and_in_any_order_are_executed_once() -> None:
    for seed in range(30):
        swarm = ModelSwarm(wish_for(12, 20, 24, drafts=seed % 3 * 2), [*FOUR, *FOUR], seed=seed)
        swarm.duplicates = 0.5
        if seed % 2:
            swarm.run(until_tokens=8)
            swarm.kill(swarm.session.hops[seed % 4].peer)
        swarm.run()
        assert answered(swarm)
        if not seed % 3:
            survivors = [hop for hop in swarm.hops.values() if hop.alive and hop.ran]
            assert all(swarm.work(hop.peer) <= 20 + 24 for hop in survivors)


def test_a_message_that_is_missing_is_noticed() -> None:
    """A link that loses one message without breaking: what follows it shows the gap, or else the deadline does."""
    for seed in range(40):
        swarm = ModelSwarm(wish_for(12, 20, 24, drafts=seed % 2 * 3), FOUR, seed=seed)
        swarm.run(until_tokens=int(swarm.rng.integers(1, 20)))
        links = [link for link, queue in swarm.links.items() if queue and link[1] != GATEWAY]
        if not links:
            continue
        swarm.lose_message(links[int(swarm.rng.integers(len(links)))])
        swarm.run()
        assert answered(swarm)


def test_tokens_that_cannot_be_are_not_believed() -> None:
    lies = {
        "position": lambda s: Tokens(
            s.id, s.epoch, s._tokens_number + 1, len(s.token_ids) + 1, (1,), None, ""
        ),
        "vocabulary": lambda s: Tokens(
            s.id, s.epoch, s._tokens_number + 1, len(s.token_ids), (99,), None, ""
        ),
        "too many": lambda s: Tokens(s.id, s.epoch, s._tokens_number + 1, len(s.token_ids), (1, 2), None, ""),
        "end": lambda s: Tokens(s.id, s.epoch, s._tokens_number + 1, len(s.token_ids), (1,), None, "stop"),
    }
    for lie in lies.values():
        swarm = ModelSwarm(wish_for(12, 8, 16), [*FOUR, *FOUR], seed=1)
        swarm.run(until_tokens=4)
        liar = swarm.session.hops[-1].peer
        swarm.dispatch(Heard(liar, lie(swarm.session)))
        assert [ban.peer for ban in swarm.bans if ban.misbehaved] == [liar]
        swarm.run()
        assert answered(swarm)


def test_chains_that_never_give_a_token_end_the_session() -> None:
    swarm = ModelSwarm(wish_for(12, 8, 16), FOUR, seed=1, times=SessionTimes(recovery_s=10_000))
    for hop in swarm.hops.values():
        hop.feed = lambda feed: None  # type: ignore[method-assign]
    swarm.run()
    assert isinstance(swarm.error, EngineFailure)


def test_cancelling_frees_all_hops() -> None:
    for at in range(0, 16, 3):
        swarm = ModelSwarm(wish_for(12, 8, 16), FOUR, seed=at)
        swarm.run(until_tokens=at)
        for _ in range(at):
            swarm.step()
        if not swarm.ended:
            swarm.cancel()
        swarm.drain()
        assert swarm.ended
        assert all(hop.session is None for hop in swarm.hops.values())


def _chaos(seed: int) -> None:
    """Losses, returns, freezes, duplicates, missing messages and full workers, drawn from one seed."""
    rng = np.random.default_rng(seed)
    drafts = int(rng.integers(0, 6))
    wish = wish_for(12, int(rng.integers(1, 60)), int(rng.integers(1, 60)), drafts=drafts)
    swarm = ModelSwarm(wish, [*FOUR, *FOUR, *SPARES], seed=seed)
    swarm.duplicates = float(rng.choice([0.0, 0.2]))
    rate = float(rng.choice([0.002, 0.01, 0.04]))
    for _ in range(60_000):
        if swarm.ended:
            break
        hops = list(swarm.hops.values())
        if rng.random() < rate:
            hop = hops[int(rng.integers(len(hops)))]
            match int(rng.integers(5)):
                case 0 if hop.alive:
                    swarm.kill(hop.peer)
                case 1 if not hop.alive:
                    swarm.revive(hop.peer)
                case 2:
                    hop.full = not hop.full
                case 3:
                    swarm.pass_time()
                case _:
                    links = [link for link, queue in swarm.links.items() if queue and link[1] != GATEWAY]
                    if links and rng.random() < 0.2:
                        swarm.lose_message(links[int(rng.integers(len(links)))])
        elif not swarm.step():
            for hop in hops:
                if not hop.alive and rng.random() < 0.5:
                    swarm.revive(hop.peer)
            swarm.pass_time()
    assert swarm.ended
    tokens = expected_tokens(wish)
    if swarm.error is None:
        assert swarm.emitted == tokens
    else:
        assert isinstance(swarm.error, NoCapacity | EngineFailure), swarm.error
        assert swarm.emitted == tokens[: len(swarm.emitted)]
    swarm.drain()
    assert all(hop.session is None for hop in hops if hop.alive)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_the_tokens_are_right(seed: int) -> None:
    _chaos(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_whatever_happens_the_tokens_are_right_at_length(first: int) -> None:
    for seed in range(first, first + 100):
        _chaos(1000 + seed)
