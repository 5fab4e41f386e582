# pyright: standard
"""What the sessions of a span were fed, kept for as long as it may have to be computed again.

A span that does not begin the model gets hidden states, which nobody here can make again. When its KV blocks run out,
the policy takes those of the latest session, and later that session computes them anew from what is kept here. Inputs
lie in pages, as keys and values do: pages are promised when a session opens, for its prompt, and taken as it grows. The
memory is what `SpanInputs` was made with, whatever sessions do.

The alternative is to reserve every session's KV blocks for its longest possible answer, as PETALS does: then nothing is
ever taken back and nothing need be kept. But most answers end far from their limit, which often is the whole context,
so most of that memory would stay empty, and a worker's throughput lies in how many sessions it batches. What keeping
costs: 4 * hidden bytes a token, as much as the keys and values of four to seven blocks of a 7B model with grouped
heads. That is little beside a long span; beside a span of one or two blocks it is more than the KV cache itself.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from plait.errors import BadSetup
from plait.kvcache import KvBlockPool
from plait.units import format_bytes

INPUTS_PER_KV_TOKEN = 1.5
"""Tokens whose inputs are kept for each token of KV memory. Above 1, so that sessions can wait for blocks with their
prompts here already; not far above, since who would wait long is served sooner by another chain."""

_FLOAT32_BYTES = 4


class SpanInputs:
    """Pages of `page_tokens` inputs; the tables that say which pages a session has are the caller's.

    `hidden` None is for the model's first block alone: its inputs are token ids, which the scheduler knows, so pages
    are only counted. The same bound on what may wait then holds for every span.
    """

    def __init__(self, pages: int, page_tokens: int, hidden: int | None) -> None:
        self._pool = KvBlockPool(pages, page_tokens)
        self._rows: np.ndarray | None = None
        if hidden is not None:
            try:
                # numpy's zeros are pages of the kernel's that are handed out on first touch.
                self._rows = np.zeros((pages * page_tokens, hidden), dtype=np.float32)
            except MemoryError:
                size = format_bytes(pages * self.page_bytes(page_tokens, hidden))
                raise BadSetup(
                    f"the inputs kept beside the KV cache need {size}, more than this machine gives; ask for a smaller "
                    "cache"
                ) from None

    @staticmethod
    def page_bytes(page_tokens: int, hidden: int | None) -> int:
        """Memory of a page."""
        return 0 if hidden is None else page_tokens * hidden * _FLOAT32_BYTES

    @property
    def total_tokens(self) -> int:
        """Inputs that all pages hold."""
        return self._pool.kv_blocks * self._pool.block_tokens

    def fits(self, table: Sequence[int], tokens: int) -> bool:
        """Whether a table could grow to hold so many inputs now."""
        return self._pool.blocks_for(tokens) - len(table) <= self._pool.free_blocks

    def resize(self, table: list[int], tokens: int) -> None:
        """Let a table hold exactly so many inputs; what lies in the pages it keeps stays.

        Raises:
            KvCacheFull: there are not enough pages.
        """
        pages = self._pool.blocks_for(tokens)
        if pages > len(table):
            table += self._pool.allocate(pages - len(table))
        self._pool.release(table[pages:])
        del table[pages:]

    def write(self, table: Sequence[int], start: int, hidden: Tensor) -> None:
        """Keep inputs [tokens, hidden] from position `start` on."""
        assert self._rows is not None
        self._rows[self._places(table, start, len(hidden))] = hidden.to("cpu", torch.float32).numpy()

    def read(self, parts: Iterable[tuple[Sequence[int], int, int]]) -> Tensor:
        """Inputs of several sessions, one after the other: (table, first position, tokens) each."""
        assert self._rows is not None
        places = [self._places(*part) for part in parts]
        rows = self._rows.take(places[0] if len(places) == 1 else np.concatenate(places), axis=0)
        return torch.from_numpy(rows)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that pages are held by these tables and nobody else."""
        self._pool.check(tables)

    def _places(self, table: Sequence[int], start: int, tokens: int) -> np.ndarray:
        page_tokens = self._pool.block_tokens
        if tokens == 1:  # decoding, mostly
            return np.array([table[start // page_tokens] * page_tokens + start % page_tokens])
        positions = np.arange(start, start + tokens)
        return np.asarray(table)[positions // page_tokens] * page_tokens + positions % page_tokens
