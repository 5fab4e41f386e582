# pyright: standard
"""A creditor's answers: attention over the blocks that it has lent, also while its own engine computes.

Small ones are computed on the event loop, long ones in a thread, one at a time for each debtor, so that none waits for
another's backlog. Whether the blocks are the debtor's is asked before and after: a generation rises whenever a block is
lent, so an answer that leaves was computed over the debtor's own content.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch

from plait.engine import KvLoans, Partial
from plait.errors import BadFrame, BadRequest, BlocksLost
from plait.ids import PeerId
from plait.kvcache import LentBlock, blocks_of
from plait.model import ModelSpec
from plait.wire import MAX_LOAN_BLOCKS, Attend, Attended, AttendRefused
from plait.worker.engine_thread import EngineThread
from plait.worker.remote_blocks import DTYPES, PostAttend, tensor_bytes

MAX_OPEN = 256
"""Queries of one debtor that are not answered yet; more are refused."""
REMEMBERED_LISTS = 64
"""Of each debtor, by number: more than a debtor thinks are remembered."""
SMALL_WORK = 4096
"""Tokens times keys that are attended at once, on the event loop: less than a thread's hand-over costs."""

Listing = tuple[tuple[LentBlock, ...], tuple[int, ...]]


class LentAttention:
    """Attends over lent blocks for their debtors; enter it to begin."""

    def __init__(
        self, loans: KvLoans, spec: ModelSpec, post: PostAttend, heard: Callable[[PeerId], None]
    ) -> None:
        self.answered_total = 0
        self._loans = loans
        self._spec = spec
        self._post = post
        self._heard = heard
        self._lists: dict[PeerId, OrderedDict[int, Listing]] = {}
        self._open: dict[PeerId, int] = {}
        self._turns: dict[PeerId, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._thread = await self._stack.enter_async_context(EngineThread())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    def on_query(self, peer: PeerId, message: Attend, tensors: tuple[memoryview, ...]) -> None:
        """A debtor asks.

        Raises:
            BadFrame: what came is no query over blocks.
        """
        listing = self._listing(peer, message)
        query = self._query(message, tensors)
        if listing is None or not self._loans.book.may_read(peer, listing[0]):
            self._post(peer, AttendRefused(message.request, "lost"), ())
            return
        self._heard(peer)
        if self._open.get(peer, 0) >= MAX_OPEN:
            self._post(peer, AttendRefused(message.request, "busy"), ())
            return
        keys = len(listing[0]) * self._loans.store.block_tokens
        if message.tokens * keys <= SMALL_WORK and not self._open:  # never two at once
            self._answer(peer, message, listing, self._attend(peer, message, listing, query))
            return
        self._open[peer] = self._open.get(peer, 0) + 1
        self._spawn(self._in_turn(peer, message, listing, query))

    def on_lost(self, peer: PeerId) -> None:
        """A debtor's link is gone, and with it what it has named by number."""
        self._lists.pop(peer, None)

    async def _in_turn(self, peer: PeerId, message: Attend, listing: Listing, query: torch.Tensor) -> None:
        try:
            async with self._turns.setdefault(peer, asyncio.Lock()):
                part = await self._thread.run(lambda: self._attend(peer, message, listing, query))
                self._answer(peer, message, listing, part)
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]
                self._turns.pop(peer, None)

    def _attend(self, peer: PeerId, message: Attend, listing: Listing, query: torch.Tensor) -> Partial | None:
        """None if the blocks are not the debtor's any more, or this is no query of the model's."""
        blocks, starts = listing
        try:
            with torch.inference_mode():
                return self._loans.attend(peer, blocks, starts, message.block, message.position, query)
        except (BlocksLost, BadRequest):
            return None

    def _answer(self, peer: PeerId, message: Attend, listing: Listing, part: Partial | None) -> None:
        if part is None or not self._loans.book.may_read(peer, listing[0]):
            self._post(peer, AttendRefused(message.request, "lost"), ())
            return
        self.answered_total += 1
        tensors = [tensor_bytes(each.cpu().contiguous()) for each in part]
        self._post(peer, Attended(message.request), tensors)

    def _query(self, message: Attend, tensors: tuple[memoryview, ...]) -> torch.Tensor:
        dtype, tokens = DTYPES[message.dtype], message.tokens
        if message.block not in self._loans.store.blocks:
            raise BadFrame(f"a query for block {message.block} of the model, which is not lent here")
        attention = self._spec.blocks[message.block].attention
        heads, dim = attention.heads, attention.cached_dim
        if len(tensors) != 1 or tensors[0].nbytes != tokens * heads * dim * dtype.itemsize:
            raise BadFrame(
                f"a query of {tokens} rows for block {message.block} was said to come, and other came"
            )
        query = torch.frombuffer(tensors[0], dtype=dtype).view(tokens, heads, dim)
        return query.to(self._loans.store.extents.device)

    def _listing(self, peer: PeerId, message: Attend) -> Listing | None:
        """The list that is meant; None if it is not known here."""
        known = self._lists.setdefault(peer, OrderedDict())
        if message.base == message.listing:
            if message.listing in known:
                known.move_to_end(message.listing)
            return known.get(message.listing)
        added = blocks_of(message.blocks)
        if len(added) != len(message.blocks.generations) or len(added) != len(message.starts):
            raise BadFrame("a list of blocks whose parts are of different lengths")
        base: Listing | None = known.get(message.base) if message.base else ((), ())
        if base is None:
            return None
        listing = (*base[0], *added), (*base[1], *message.starts)
        if len(listing[0]) > MAX_LOAN_BLOCKS or not _ascending(listing[1], message.position):
            raise BadFrame("a list of blocks that is too long, or out of order")
        known[message.listing] = listing
        if len(known) > REMEMBERED_LISTS:
            known.popitem(last=False)
        return listing

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ascending(starts: Sequence[int], position: int) -> bool:
    return all(one < other for one, other in pairwise(starts))
