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
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

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

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` could hand out now, cached-free ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def used_blocks(self) -> int:
        """Blocks that somebody holds."""
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
                if kv_block not in self._index:
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

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given all block tables and reservations that exist."""
        held = Counter(kv_block for table in holders for kv_block in table)
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is twice in the free list"
        assert not blank & cached, "a block is blank and cached at once"
        for kv_block, references in enumerate(self._references):
            assert references == held[kv_block], (
                f"kv_block {kv_block}: {references} references, held by {held[kv_block]}"
            )
            free = kv_block in blank or kv_block in cached
            assert free == (references == 0), f"kv_block {kv_block}: {references} references, free={free}"
            named = kv_block in self._index
            assert not (named and kv_block in blank), f"kv_block {kv_block} is blank but in the prefix index"
            assert named or kv_block not in cached, (
                f"kv_block {kv_block} is cached but not in the prefix index"
            )
        assert not held.keys() - range(self.kv_blocks), "a table holds a block that does not exist"
        self._index.check()
