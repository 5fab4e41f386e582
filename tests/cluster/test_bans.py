"""Bans double with each failure in a row, end by themselves, and are forgotten after a success."""

from plait.cluster import Bans
from plait.ids import PeerId

A, B = PeerId("a" * 64), PeerId("b" * 64)


def test_each_failure_in_a_row_doubles_the_ban() -> None:
    bans = Bans().after_failure(A, 100.0)
    assert bans.banned(114.9) == {A} and bans.banned(115.0) == frozenset()
    bans = bans.after_failure(A, 200.0)
    assert bans.banned(229.9) == {A} and bans.banned(230.0) == frozenset()


def test_a_success_ends_the_streak() -> None:
    bans = Bans().after_failure(A, 0.0).after_failure(A, 0.0).after_failure(B, 0.0).after_success(A)
    assert bans.banned(1.0) == {B}
    assert bans.after_failure(A, 0.0).by_peer[A].until_s == 15.0
    assert bans.after_success(A) is bans


def test_no_ban_is_longer_than_an_hour() -> None:
    bans = Bans()
    for _ in range(100):
        bans = bans.after_failure(A, 0.0)
    assert bans.by_peer[A].until_s == 3600.0
