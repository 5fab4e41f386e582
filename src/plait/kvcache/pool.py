"""The blocks that a KV cache is cut into, by number; the tensors behind them live elsewhere.

A block is in one of three states:

    in use        reference count above 0: so many block tables (or reservations) hold it
    cached-free   count 0, but full, named in the prefix index and not yet overwritten: a request with the
                  same prefix may take it back (`share`); overwritten least recently freed first. It is the
                  only block of its name: as long as an equal one is in use, that one serves
    blank-free    count 0 and nothing worth keeping

Allocation takes blank blocks before cached ones. A table is released from its tail: a tail serves only
requests that also have its head, so it is the first to be overwritten. Kwon et al. 2023 (PagedAttention)
section 4; the cached-free state is that of vLLM's V1 engine.

Blocks that another machine lends have numbers from `kv_blocks` on (`debt_book.py` knows where they are). They are never
allocated: a full block of one's own is moved there. Tables, references and the prefix index treat them like any other;
when their last holder lets go, they are forgotten at once instead of cached.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

from plait.errors import KvCacheFull
from plait.kvcache.prefix import PrefixIndex


class KvBlockPool:
    """Who holds which of `kv_blocks` blocks of `block_tokens` tokens."""

    def __init__(self, kv_blocks: int, block_tokens: int = 16) -> None:
        assert kv_blocks >= 0 and block_tokens >= 1
        self.kv_blocks = kv_blocks
        self.block_tokens = block_tokens
        self._references = [0] * kv_blocks
        self._blank = list(range(kv_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index = PrefixIndex()
        self.promised_blocks = 0
        """Borrowed blocks to be filled: so many blocks of its own will be free once full ones have moved out."""
        self._borrowed: dict[int, None] = {}
        self._unheld: list[int] = []
        self._unused_numbers: list[int] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now, cached-free ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def used_blocks(self) -> int:
        """Blocks of its own that somebody holds."""
        return self.kv_blocks - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Free blocks that still hold a reusable prefix."""
        return len(self._cached)

    def references(self, kv_block: int) -> int:
        """How many hold this block."""
        return self._references[kv_block]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one sequence."""
        return -(-tokens // self.block_tokens)

    def allocate(self, kv_blocks: int) -> list[int]:
        """Take blocks whose content may be overwritten; all or nothing.

        Raises:
            KvCacheFull: fewer are free.
        """
        if kv_blocks > self.free_blocks:
            raise KvCacheFull(
                f"{kv_blocks} KV blocks wanted, {self.free_blocks} of {self.kv_blocks} free; "
                "retry once a running request has ended"
            )
        taken: list[int] = []
        for _ in range(kv_blocks):
            if self._blank:
                kv_block = self._blank.pop()
            else:
                kv_block, _ = self._cached.popitem(last=False)
                self._index.discard(kv_block)
            self._references[kv_block] = 1
            taken.append(kv_block)
        return taken

    def share(self, kv_blocks: Iterable[int]) -> None:
        """Hold blocks once more: those in use, or cached-free ones that `match` returned."""
        for kv_block in kv_blocks:
            if self._references[kv_block] == 0:
                del self._cached[kv_block]
            self._references[kv_block] += 1

    def fork(self, kv_blocks: Sequence[int]) -> list[int]:
        """A second block table over the same blocks."""
        self.share(kv_blocks)
        return list(kv_blocks)

    def release(self, kv_blocks: Sequence[int]) -> None:
        """Let go of the blocks of a table, given head first, freed tail first."""
        for kv_block in reversed(kv_blocks):
            left = self._references[kv_block] - 1
            assert left >= 0, f"kv_block {kv_block} was released more often than held"
            self._references[kv_block] = left
            if left == 0:
                if kv_block >= self.kv_blocks:
                    if kv_block in self._index:
                        self._index.discard(kv_block)
                    self._unheld.append(kv_block)
                elif kv_block not in self._index:
                    self._blank.append(kv_block)
                elif self._index.has_copy(kv_block):
                    self._index.discard(kv_block)
                    self._blank.append(kv_block)
                else:
                    self._cached[kv_block] = None

    def publish(self, kv_block: int, key: bytes) -> None:
        """Let others find this block, in use and fully computed, by the name of its content."""
        assert self._references[kv_block] > 0, f"kv_block {kv_block} was published by nobody who holds it"
        other = self._index.get(key)
        if other is not None and self._references[other] == 0:
            del self._cached[other]
            self._index.discard(other)
            self._blank.append(other)
        self._index.add(kv_block, key)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a chain; `share` them before anything else."""
        return self._index.match(keys)

    @property
    def borrowed_numbers(self) -> frozenset[int]:
        """The numbers of all borrowed blocks."""
        return frozenset(self._borrowed)

    def is_own(self, kv_block: int) -> bool:
        """Whether a block is this machine's memory."""
        return kv_block < self.kv_blocks

    def borrow(self, kv_blocks: int) -> list[int]:
        """Numbers for blocks that another machine lends, each held once, by the caller."""
        numbers: list[int] = []
        for _ in range(kv_blocks):
            if self._unused_numbers:
                number = self._unused_numbers.pop()
            else:
                number = len(self._references)
                self._references.append(0)
            self._references[number] = 1
            self._borrowed[number] = None
            numbers.append(number)
        return numbers

    def forget(self, numbers: Iterable[int]) -> None:
        """Borrowed blocks that only the caller holds are no more."""
        for number in numbers:
            assert self._references[number] == 1 and number not in self._index
            self._references[number] = 0
            del self._borrowed[number]
            self._unused_numbers.append(number)

    def take_unheld(self) -> list[int]:
        """Borrowed blocks that nobody holds any more; now the caller does, once each."""
        unheld, self._unheld = self._unheld, []
        for number in unheld:
            self._references[number] = 1
        return unheld

    def move(self, source: int, target: int) -> None:
        """`target`, held once by the caller, takes the place of `source`: its holders (whose tables the caller
        rewrites) and its name. `source` is free then, or unheld if it was borrowed.
        """
        assert self._references[target] == 1 and target not in self._index and self._references[source] > 0
        self._references[target], self._references[source] = self._references[source], 0
        if source in self._index:
            self._index.rename(source, target)
        if source < self.kv_blocks:
            self._blank.append(source)
        else:
            self._unheld.append(source)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given all block tables and reservations that exist."""
        held = Counter(chain.from_iterable(holders))
        blank, cached = set(self._blank), set(self._cached)
        if not self._adds_up(held, blank, cached):
            self._check_each(held, blank, cached)
            raise AssertionError("blocks do not add up")
        self._index.check()

    def _adds_up(self, held: Counter[int], blank: set[int], cached: set[int]) -> bool:
        """What `_check_each` asserts, without a loop over all blocks: that takes milliseconds for a large cache."""
        references, borrowed, named = self._references, self._borrowed, self._index.blocks()
        own = held.keys() - borrowed.keys() if borrowed else held.keys()
        return (
            len(blank) == len(self._blank)
            and blank.isdisjoint(cached)
            and blank.isdisjoint(held)
            and cached.isdisjoint(held)
            and len(blank) + len(cached) + len(own) == self.kv_blocks
            and max((max(each) for each in (blank, cached, own) if each), default=-1) < self.kv_blocks
            and list(map(references.__getitem__, held)) == list(held.values())
            and references.count(0) == len(references) - len(held)
            and blank.isdisjoint(named)
            and cached <= named
            and (named <= cached | held.keys())
            and set(self._unheld) == {number for number in borrowed if not references[number]}
        )

    def _check_each(self, held: Counter[int], blank: set[int], cached: set[int]) -> None:
        """Assert it block by block, to say which."""
        assert len(blank) == len(self._blank), "a block is twice in the free list"
        assert not blank & cached, "a block is blank and cached at once"
        for kv_block, references in enumerate(self._references):
            assert references == held[kv_block], (
                f"kv_block {kv_block}: {references} references, held by {held[kv_block]}"
            )
            if kv_block >= self.kv_blocks:
                assert references or kv_block not in self._index, f"lost kv_block {kv_block} has a name"
                assert references == 0 or kv_block in self._borrowed
                continue
            free = kv_block in blank or kv_block in cached
            assert free == (references == 0), f"kv_block {kv_block}: {references} references, free={free}"
            named = kv_block in self._index
            assert not (named and kv_block in blank), f"kv_block {kv_block} is blank but in the prefix index"
            assert named or kv_block not in cached, (
                f"kv_block {kv_block} is cached but not in the prefix index"
            )
        existing = self._borrowed.keys() | range(self.kv_blocks)
        assert not held.keys() - existing, "a table holds a block that does not exist"
        assert blank | cached <= set(range(self.kv_blocks)), "a borrowed block was freed like an own one"
        assert set(self._unheld) == {number for number in self._borrowed if not self._references[number]}
