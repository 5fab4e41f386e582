"""The block pool against a model that keeps everything in plain lists and a trie of full blocks."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from plait.errors import KvCacheFull
from plait.kvcache import KvBlockPool, chain_keys

BLOCK_TOKENS = 2
Path = tuple[tuple[int, ...], ...]


class PoolMachine(RuleBasedStateMachine):
    """Tables over a small pool.

    The model: `ends` maps each filled block to the path of full blocks that it ends; `freed` lists
    cached-free blocks in the order in which they were freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvBlockPool(8, BLOCK_TOKENS)
        self.tables: list[list[int]] = []
        self.ends: dict[int, Path] = {}
        self.freed: list[int] = []
        self.blank = set(range(8))

    @rule(
        path=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=5).map(tuple),
        reuse=st.booleans(),
    )
    def start_a_table(self, path: Path, reuse: bool) -> None:
        """Find the cached prefix of a path, allocate the rest, fill and publish it."""
        keys: list[bytes] = []
        chain_keys(keys, b"root", [token for block in path for token in block], len(path), BLOCK_TOKENS)
        prefix = self.pool.match(keys)
        longest = 0
        while longest < len(path) and path[: longest + 1] in self.ends.values():
            longest += 1
        assert [self.ends[block] for block in prefix] == [path[: end + 1] for end in range(longest)]
        if not reuse:
            prefix = []
        revived = [block for block in prefix if block in self.freed]
        missing = len(path) - len(prefix)
        if missing > self.pool.free_blocks - len(revived):
            with pytest.raises(KvCacheFull):
                self.pool.allocate(self.pool.free_blocks + 1)
            return
        self.pool.share(prefix)
        self.freed = [block for block in self.freed if block not in revived]
        fresh = self.pool.allocate(missing)
        for block in fresh:
            if self.blank:
                assert block in self.blank, "a cached block was overwritten while a blank one was free"
                self.blank.remove(block)
            else:
                assert block == self.freed.pop(0), "the block freed longest ago is overwritten first"
                del self.ends[block]
        table = prefix + fresh
        for end, block in enumerate(table):
            self.pool.publish(block, keys[end])
            for stale in [other for other in self.freed if self.ends[other] == path[: end + 1]]:
                self.make_blank(stale)
            self.ends[block] = path[: end + 1]
        self.tables.append(table)

    def make_blank(self, kv_block: int) -> None:
        if kv_block in self.freed:
            self.freed.remove(kv_block)
        del self.ends[kv_block]
        self.blank.add(kv_block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork_a_table(self, data: st.DataObject) -> None:
        self.tables.append(self.pool.fork(data.draw(st.sampled_from(self.tables))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release_a_table(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if not any(block in other for other in self.tables):
                if list(self.ends.values()).count(self.ends[block]) > 1:
                    self.make_blank(block)
                else:
                    self.freed.append(block)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.free_blocks == len(self.blank) + len(self.freed)
        assert self.pool.cached_blocks == len(self.freed)
        assert self.pool.used_blocks == len({block for table in self.tables for block in table})


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolAgainstTheModel = PoolMachine.TestCase


def test_a_full_pool_says_how_full_it_is() -> None:
    pool = KvBlockPool(3)
    pool.allocate(2)
    with pytest.raises(KvCacheFull, match="2 KV blocks wanted, 1 of 3 free"):
        pool.allocate(2)
    assert pool.free_blocks == 1


def test_a_table_is_overwritten_from_its_tail() -> None:
    pool = KvBlockPool(3, BLOCK_TOKENS)
    table = pool.allocate(3)
    for place, block in enumerate(table):
        pool.publish(block, bytes([place]))
    pool.release(table)
    assert [pool.allocate(1)[0] for _ in range(3)] == table[::-1]


def test_a_revived_block_is_overwritten_last() -> None:
    pool = KvBlockPool(2, BLOCK_TOKENS)
    first, second = pool.allocate(2)
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.release([first])
    pool.release([second])
    pool.share(pool.match([b"first"]))
    pool.release([first])
    assert pool.allocate(1) == [second]
    assert pool.match([b"first"]) == [first]
    assert pool.match([b"second"]) == []


def test_check_finds_a_leak_and_a_double_holder() -> None:
    pool = KvBlockPool(4)
    table = pool.allocate(2)
    pool.check([table])
    with pytest.raises(AssertionError, match="1 references, held by 0"):
        pool.check([])
    with pytest.raises(AssertionError, match="1 references, held by 2"):
        pool.check([table, table])
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(table * 2)


def _free_twice(pool: Any) -> None:
    pool._blank.append(pool._blank[0])


def _lose_a_free_block(pool: Any) -> None:
    pool._blank.pop()


def _hold_once_more(pool: Any) -> None:
    pool._references[pool._blank[0]] += 1


def _free_what_is_held(pool: Any) -> None:
    pool._blank.append(pool._references.index(1))


def _cache_what_is_blank(pool: Any) -> None:
    pool._cached[pool._blank.pop()] = None


def _name_what_is_blank(pool: Any) -> None:
    pool._index.add(pool._blank[0], b"name")


def _free_what_does_not_exist(pool: Any) -> None:
    pool._blank[0] = 64


@pytest.mark.parametrize(
    "damage",
    [
        _free_twice,
        _lose_a_free_block,
        _hold_once_more,
        _free_what_is_held,
        _cache_what_is_blank,
        _name_what_is_blank,
        _free_what_does_not_exist,
    ],
    ids=lambda damage: damage.__name__,
)
def test_books_that_do_not_add_up_are_found(damage: Callable[[Any], None]) -> None:
    pool = KvBlockPool(64, 4)
    tables = [pool.allocate(5), pool.allocate(3)]
    pool.check(tables)
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check(tables)
