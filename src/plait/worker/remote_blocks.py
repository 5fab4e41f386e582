# pyright: standard
"""Queries to the machines that hold borrowed KV blocks, and the parts that come back.

The engine's thread asks (`ask`) and waits (`take`); messages are sent and taken on the event loop. A holder that
refuses, is lost, or has not answered by the deadline has lost the blocks, as far as this step goes: the engine undoes
the step and computes again what used them.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.engine import HolderShare, KvLoans, Partial, PartialAsk
from plait.errors import BadFrame, BlocksLost
from plait.ids import PeerId
from plait.kvcache import wire_blocks
from plait.wire import MAX_ATTENDED_TOKENS, Attend, Attended, AttendMessage, AttendRefused, DtypeName

DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NAMES: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in DTYPES.items()}
MESSAGE_BYTES = 4 << 20
"""A query, and its answer, of a long chunk of a prompt are cut into messages of about this size."""
REMEMBERED_LISTS = 16
"""Of a creditor's blocks, by number; creditors remember more (`lent_attention.py`)."""

PostAttend = Callable[[PeerId, AttendMessage, Sequence[memoryview]], None]


@dataclass(slots=True, eq=False)
class _Part:
    """Rows of one query that one holder attends."""

    share: HolderShare
    shape: tuple[int, int, int]
    """Of the part that is due: tokens, heads, value_dim."""
    wide: torch.dtype
    pending: "_Pending"
    partial: Partial | None = None
    lost: str = ""


@dataclass(slots=True, eq=False)
class _Pending:
    """What was asked of several holders; `parts` of each in the order of their rows."""

    parts: list[list[_Part]]
    deadline_s: float
    left: int
    give_up: Callable[["_Pending"], None]
    done: threading.Event = field(default_factory=threading.Event)

    def take(self) -> list[Partial]:
        """As `PendingParts.take`."""
        in_time = self.done.wait(max(0.0, self.deadline_s - time.monotonic()))
        missing = [part for parts in self.parts for part in parts if part.partial is None]
        if missing:
            self.give_up(self)
            # Whoever was only slower than one that lost them still has its blocks.
            lost = [part for part in missing if part.lost] if in_time else missing
            numbers = dict.fromkeys(number for part in lost for number in part.share.numbers)
            why = lost[0].lost or "it has not answered in time"
            raise BlocksLost(
                f"KV blocks lent by {lost[0].share.creditor[:8]} are lost: {why}", kv_blocks=tuple(numbers)
            )
        return [
            Partial(*(torch.cat(tensors) for tensors in zip(*(part.partial for part in parts), strict=True)))
            for parts in self.parts
        ]


class RemoteBlocks:
    """Where the borrowed blocks of an engine are: its store's `RemoteKv`, over `post`.

    `query_bytes_total` went out, `part_bytes_total` came back.
    """

    def __init__(
        self,
        loans: KvLoans,
        post: PostAttend,
        *,
        heads: Callable[[int], tuple[int, int]],
        deadline_s: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """`heads` gives the heads and the dimension of values of a block of the model."""
        self.query_bytes_total = 0
        self.part_bytes_total = 0
        self._loans = loans
        self._post = post
        self._heads = heads
        self._deadline_s = deadline_s
        self._loop = loop
        self._waiting: dict[int, _Part] = {}
        self._next = 1
        self._listings: dict[PeerId, OrderedDict[tuple[object, ...], int]] = {}
        self._latest: dict[PeerId, tuple[int, HolderShare]] = {}
        self._next_listing = 1

    # -- in the engine's thread ------------------------------------------------------------------------------

    def ask(self, asked: PartialAsk) -> _Pending:
        """Send a query to the holders of these blocks; returns at once."""
        query = asked.query.detach().cpu().contiguous()
        tokens = query.shape[0]
        heads, value_dim = self._heads(asked.block)
        exact = self._loans.store.extents.dtype == torch.uint8 or query.dtype == torch.float64
        wide = torch.float64 if exact else torch.float32  # the kernels add up in float64
        row_bytes = max(query[0].nbytes, heads * (value_dim + 2) * wide.itemsize)
        rows = max(1, min(MAX_ATTENDED_TOKENS, MESSAGE_BYTES // row_bytes))
        pending = _Pending([], time.monotonic() + self._deadline_s, 0, self._give_up)
        sends: list[tuple[_Part, int, int]] = []
        for share in self._loans.shares(asked):
            parts: list[_Part] = []
            for first in range(0, tokens, rows):
                count = min(rows, tokens - first)
                part = _Part(share, (count, heads, value_dim), wide, pending)
                parts.append(part)
                sends.append((part, first, count))
            pending.parts.append(parts)
        pending.left = len(sends)
        self._loop.call_soon_threadsafe(self._send, asked, query, sends)
        return pending

    def _give_up(self, pending: _Pending) -> None:
        """Nobody waits for these any more."""
        self._loop.call_soon_threadsafe(self._forget, pending)

    # -- on the event loop -----------------------------------------------------------------------------------

    def _send(self, asked: PartialAsk, query: Tensor, sends: Sequence[tuple[_Part, int, int]]) -> None:
        for part, first, count in sends:
            request, self._next = self._next, self._next + 1
            self._waiting[request] = part
            rows = query[first : first + count]
            self.query_bytes_total += rows.nbytes
            creditor = part.share.creditor
            listing, base, kept = self._listing(creditor, part.share)
            message = Attend(
                request=request,
                block=asked.block,
                position=asked.position + first,
                tokens=count,
                dtype=_NAMES[query.dtype],
                listing=listing,
                base=base,
                blocks=wire_blocks(part.share.blocks[kept:]),
                starts=part.share.starts[kept:],
            )
            self._post(creditor, message, (tensor_bytes(rows),))

    def _listing(self, creditor: PeerId, share: HolderShare) -> tuple[int, int, int]:
        """Number of a list, that of the one it continues (itself, if it was sent before), and how much that has."""
        known = self._listings.setdefault(creditor, OrderedDict())
        key = (share.blocks, share.starts)
        number = known.get(key)
        if number is not None:
            known.move_to_end(key)
            return number, number, len(share.blocks)
        number, self._next_listing = self._next_listing, self._next_listing + 1
        known[key] = number
        if len(known) > REMEMBERED_LISTS:
            known.popitem(last=False)
        base, before = self._latest.get(creditor, (0, None))
        self._latest[creditor] = number, share
        if before is not None:
            kept = len(before.blocks)
            if share.blocks[:kept] == before.blocks and share.starts[:kept] == before.starts:
                return number, base, kept
        return number, 0, 0

    def on_answer(
        self, peer: PeerId, message: Attended | AttendRefused, tensors: tuple[memoryview, ...]
    ) -> None:
        """A holder has answered.

        Raises:
            BadFrame: what came is not the part that was asked for.
        """
        part = self._waiting.get(message.request)
        if part is None or part.share.creditor != peer:
            return
        del self._waiting[message.request]
        if isinstance(message, AttendRefused):
            part.lost = "it does not have them any more" if message.why == "lost" else "it is too busy"
        else:
            self.part_bytes_total += sum(each.nbytes for each in tensors)
            tokens, heads, _ = part.shape
            shapes = ((tokens, heads), (tokens, heads), part.shape)
            sizes = [torch.Size(shape).numel() * part.wide.itemsize for shape in shapes]
            if [each.nbytes for each in tensors] != sizes:
                part.lost = "what it sent is no part of an attention"
                self._finish(part)
                raise BadFrame(f"a part of an attention of {sizes} bytes was asked for, and other came")
            part.partial = Partial(
                *(
                    torch.frombuffer(each, dtype=part.wide).view(shape)
                    for each, shape in zip(tensors, shapes, strict=True)
                )
            )
            if not _sound(part.partial):
                part.partial, part.lost = None, "what it sent is not finite"
                self._finish(part)
                raise BadFrame("a part of an attention that is not finite")
        self._finish(part)

    def on_lost(self, peer: PeerId) -> None:
        """The link to a holder is gone: what was asked of it will not come, and it forgets our lists."""
        self._listings.pop(peer, None)
        self._latest.pop(peer, None)
        for request, part in list(self._waiting.items()):
            if part.share.creditor == peer:
                del self._waiting[request]
                part.lost = "the link to it is gone"
                self._finish(part)

    def _finish(self, part: _Part) -> None:
        part.pending.left -= 1
        if not part.pending.left or part.lost:
            part.pending.done.set()

    def _forget(self, pending: _Pending) -> None:
        for request, part in list(self._waiting.items()):
            if part.pending is pending:
                del self._waiting[request]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]  it is one


def _sound(part: Partial) -> bool:
    """Whether it can be merged: one that sees no key has a greatest score of minus infinity, and nothing else."""
    finite = bool(torch.isfinite(part.weight).all() and torch.isfinite(part.summed).all())
    return finite and not bool((torch.isnan(part.most) | (part.most == torch.inf)).any())
