"""Which sessions a hop waits for."""

import pytest

from plait.scheduling.rounds import Round, gather_until_s, wait_until_s

STEP_S = 0.04


def away(*, due_s: float) -> Round:
    """A session that left a second before it is due."""
    return Round(left_s=due_s - 1.0, took_s=1.0)


def test_a_session_that_is_about_to_be_back_is_waited_for():
    until_s = wait_until_s([away(due_s=10.03)], first=True, hops=2, now_s=10.0, since_s=10.0, step_s=STEP_S)
    assert until_s is not None
    assert 10.03 < until_s <= 10.05


@pytest.mark.parametrize(
    "rounds",
    [
        [],
        [Round()],
        [Round(took_s=0.01)],  # it is here
        [Round(left_s=9.99)],  # it has not been round yet
        [away(due_s=10.06)],
        [away(due_s=9.98)],
    ],
    ids=["none", "new", "here", "first round", "too far away", "late"],
)
def test_nobody_else_is(rounds: list[Round]):
    assert wait_until_s(rounds, first=True, hops=2, now_s=10.0, since_s=10.0, step_s=STEP_S) is None


def test_waiting_ends_however_many_are_about_to_be_back():
    rounds = [away(due_s=10.0 + 0.01 * number) for number in range(20)]
    assert wait_until_s(rounds, first=True, hops=2, now_s=10.05, since_s=10.0, step_s=STEP_S) is None


def test_later_hops_wait_a_moment_for_what_left_the_hop_before_together():
    rounds = [away(due_s=10.5)]
    until_s = wait_until_s(rounds, first=False, hops=2, now_s=10.0, since_s=10.0, step_s=STEP_S)
    assert until_s is not None and until_s == pytest.approx(10.002)
    assert wait_until_s(rounds, first=False, hops=2, now_s=until_s, since_s=10.0, step_s=STEP_S) is None
    assert (
        wait_until_s([Round(took_s=0.1)], first=False, hops=2, now_s=10.0, since_s=10.0, step_s=STEP_S)
        is None
    )


def test_many_do_not_wait_long_for_one_but_one_for_many() -> None:
    here = [Round(took_s=0.08)] * 7
    away = [Round(left_s=10.0 - 0.05, took_s=0.08)]  # 30 ms away, in a round of 120 ms
    assert wait_until_s([*here, *away], first=True, hops=3, now_s=10.0, since_s=10.0, step_s=STEP_S) is None
    until_s = wait_until_s([here[0], *away * 7], first=True, hops=3, now_s=10.0, since_s=10.0, step_s=STEP_S)
    assert until_s is not None and 10.03 < until_s <= 10.045


def test_who_left_together_is_waited_for_though_the_round_takes_longer_this_time() -> None:
    here = Round(took_s=0.13, went_s=9.9)
    behind = Round(left_s=9.9, took_s=0.08)  # was due 50 ms ago
    until_s = wait_until_s([here, behind], first=True, hops=2, now_s=10.03, since_s=10.03, step_s=STEP_S)
    assert until_s == pytest.approx(10.04)
    behind.left_s = 9.85
    elsewhere = Round(left_s=9.95, took_s=0.04)
    assert (
        wait_until_s([here, elsewhere], first=True, hops=2, now_s=10.03, since_s=10.03, step_s=STEP_S) is None
    )


def test_groups_that_go_round_three_hops_evenly_spaced_meet() -> None:
    def until_s(hops: int) -> float | None:
        rounds = [Round(took_s=0.08), Round(left_s=9.98, took_s=0.08)]  # one is 1.5 steps away
        return wait_until_s(rounds, first=True, hops=hops, now_s=10.0, since_s=10.0, step_s=STEP_S)

    assert until_s(2) is None
    assert until_s(3) is not None


def test_later_hops_wait_longer_for_what_ran_in_the_step_before_or_after() -> None:
    here = Round(took_s=0.08, went_s=9.9)

    def until_s(left_s: float) -> float | None:
        rounds = [here, Round(left_s=left_s, took_s=0.08)]
        return wait_until_s(rounds, first=False, hops=3, now_s=10.0, since_s=10.0, step_s=STEP_S)

    assert until_s(9.9) == until_s(9.94) == pytest.approx(10.01)
    assert until_s(9.96) == pytest.approx(10.002)


def test_a_round_takes_as_long_as_the_last_one():
    way = Round()
    way.leave(1.0)
    way.come_back(1.2)
    assert way.due_s is None
    way.leave(2.0)
    assert way.due_s == pytest.approx(2.2)


def test_coming_back_twice_changes_nothing():
    way = Round(left_s=1.0)
    way.come_back(1.2)
    way.come_back(5.0)
    assert way.took_s == pytest.approx(0.2)


@pytest.mark.parametrize("waits", [True, False])
def test_sessions_that_began_apart_share_their_steps_only_if_they_wait_for_each_other(waits: bool):
    steps = steps_of_two_hops(tokens=50, start_s={"early": 0.0, "late": 0.5 * STEP_S}, waits=waits)
    if waits:
        assert steps < 60
    else:
        assert steps == 100


def steps_of_two_hops(*, tokens: int, start_s: dict[str, float], waits: bool) -> int:
    """Steps of a first hop with sessions that go round two, each of which takes STEP_S for whatever is there."""
    rounds = {name: Round() for name in start_s}
    at_first_s = dict(start_s)  # when each is there, or will be
    left = dict.fromkeys(start_s, tokens)
    second_free_s = now_s = 0.0
    steps = 0
    while at_first_s:
        now_s = since_s = max(now_s, min(at_first_s.values()))
        while True:
            for name, at_s in at_first_s.items():
                if at_s <= now_s:
                    rounds[name].come_back(at_s)
            until_s = wait_until_s(
                list(rounds.values()), first=True, hops=2, now_s=now_s, since_s=since_s, step_s=STEP_S
            )
            if until_s is None or not waits:
                break
            now_s = min([until_s, *(at_s for at_s in at_first_s.values() if at_s > now_s)])
        here = [name for name, at_s in at_first_s.items() if at_s <= now_s]
        steps += 1
        now_s += STEP_S
        second_free_s = max(second_free_s, now_s) + STEP_S
        for name in here:
            rounds[name].leave(now_s)
            left[name] -= 1
            at_first_s[name] = second_free_s
            if not left[name]:
                del at_first_s[name], rounds[name]
    return steps


def test_only_few_sessions_over_one_chain_wait_for_each_other() -> None:
    def until_s(*rounds: Round) -> float | None:
        return gather_until_s(rounds, now_s=10.0, since_s=10.0, step_s=STEP_S)

    def going(*chain: str, left_s: float | None = None) -> Round:
        return Round(chain=chain, left_s=left_s, took_s=1.0)

    soon = going("a", "b", left_s=9.03)
    assert until_s(going("a", "b"), soon) is not None
    assert until_s(soon) is None
    assert until_s(going("a", "c"), soon) is None
    assert until_s(*[going("a", "b")] * 15, soon) is not None
    assert until_s(*[going("a", "b")] * 16, soon) is None
