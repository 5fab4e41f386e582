"""The part of a list that is needed: what a failure takes, without what only happens to be there."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def shrunk(
    items: Sequence[Item], shows: Callable[[tuple[Item, ...]], bool], *, attempts: int = 200
) -> tuple[Item, ...]:
    """A subsequence that still `shows` what all items show: halves are left out, then quarters, down to single ones
    (Zeller and Hildebrandt 2002, ddmin, without its test of the parts by themselves).

    It is asked at most so many times. What is left out never comes back, so that the end is smaller, not the least.
    """
    left, size = tuple(items), len(items)
    while size:
        start, before = 0, len(left)
        while start < len(left):
            if not attempts:
                return left
            attempts -= 1
            fewer = left[:start] + left[start + size :]
            if shows(fewer):
                left = fewer
            else:
                start += size
        if size == 1 and len(left) == before:
            break
        size = max(1, size // 2)
    return left
