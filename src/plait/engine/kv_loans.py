# pyright: standard
"""Lending and borrowing KV blocks, between the steps of an engine: the books of `kvcache.BlockLoans`, and the memory.

A creditor needs the model's shape and memory, no weights: it stores what it is sent and attends over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.engine.attention import Reach
from plait.engine.kernel_kv import KernelKvStore
from plait.engine.kv_store import KvStore
from plait.engine.partial import Partial
from plait.engine.remote_kv import PartialAsk
from plait.engine.split_attention import Shard, attend_shard, plan_shard
from plait.errors import BadRequest, BlocksLost
from plait.ids import PeerId
from plait.kvcache import BlockLoans, KvBlockPool, LentBlock, LoanScheduler, LoanTerms, RemoteBlock
from plait.model import ModelSpec


@dataclass(frozen=True, slots=True)
class OutgoingBlock:
    """A full block on its way: the number that will stand for it, where it goes, and its content, one extent."""

    borrowed: int
    place: RemoteBlock
    content: Tensor


@dataclass(frozen=True, slots=True)
class HolderShare:
    """What one creditor holds of what is asked: its blocks, where each begins, and the numbers that stand for them."""

    creditor: PeerId
    blocks: tuple[LentBlock, ...]
    starts: tuple[int, ...]
    numbers: tuple[int, ...]


class KvLoans(BlockLoans):
    """Both ends of one engine's loans. Call it between steps; `attend` also during them, in one thread at a time.

    `first_generation` as for `BlockLoans`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: LoanScheduler,
        pool: KvBlockPool,
        store: KvStore | KernelKvStore,
        terms: LoanTerms,
        *,
        first_generation: int = 0,
    ) -> None:
        super().__init__(scheduler, pool, terms, first_generation=first_generation)
        self.store = store
        self._spec = spec
        self._planned: tuple[tuple[object, ...], Shard] | None = None

    # -- as creditor -----------------------------------------------------------------------------------

    def write(self, debtor: PeerId, block: LentBlock, content: Tensor) -> bool:
        """Take the content of a lent block; False if it is not the debtor's.

        Raises:
            BadRequest: it is not one extent.
        """
        extents = self.store.extents
        if content.shape != extents.shape[1:] or content.dtype != extents.dtype:
            raise BadRequest(
                f"a KV block here is {extents.shape[1]} numbers of {extents.dtype}, and what came is "
                f"{tuple(content.shape)} of {content.dtype}"
            )
        answer = self.book.fill(debtor, block)
        if answer == "write":
            self.store.write_blocks([block.kv_block], content[None])
        return answer != "refused"

    def attend(
        self,
        debtor: PeerId,
        blocks: Sequence[LentBlock],
        starts: Sequence[int],
        block: int,
        position: int,
        query: Tensor,
    ) -> Partial:
        """Attend a debtor's query [tokens, heads, dim] at `position` over blocks that hold tokens from `starts` on.

        Raises:
            BlocksLost: some of the blocks are not the debtor's, or not any more.
            BadRequest: the query does not fit the model.
        """
        if not self.book.may_read(debtor, blocks):
            raise BlocksLost("some of these KV blocks are not lent to you, or not any more")
        if block not in self.store.blocks:
            raise BadRequest(f"block {block} of the model is not here")
        attention = self._spec.blocks[block].attention
        tokens = query.shape[0] if query.dim() == 3 else 0
        if not tokens or query.shape[1] != attention.heads or query.shape[2] != attention.cached_dim:
            raise BadRequest(f"a query of shape {tuple(query.shape)} is not one of block {block}")
        if isinstance(self.store, KernelKvStore):
            return self.store.attend(block, [each.kv_block for each in blocks], starts, position, query)
        reach = Reach.of(attention)
        kv_heads = attention.heads if attention.latent else attention.kv_heads
        key = (reach, kv_heads, query.dtype, tuple(blocks), tuple(starts), position, tokens)
        if self._planned is None or self._planned[0] != key:  # one plan serves all blocks of the model
            shard = plan_shard(
                self.store,
                reach,
                kv_heads,
                query.dtype,
                [each.kv_block for each in blocks],
                starts,
                range(position, position + tokens),
            )
            self._planned = key, shard
        return attend_shard(self.store, self._planned[1], self.store.blocks.index(block), query, attention)

    def read(self, debtor: PeerId, block: LentBlock) -> Tensor:
        """The content of a lent block, one extent, for its debtor to take home or elsewhere.

        Raises:
            BlocksLost: it is not the debtor's, or not any more.
        """
        if not self.book.may_read(debtor, [block]):
            raise BlocksLost("this KV block is not lent to you, or not any more")
        return self.store.read_blocks([block.kv_block])[0]

    # -- as debtor -------------------------------------------------------------------------------------

    def start_moves(self, kv_blocks: int) -> list[OutgoingBlock]:
        """Choose up to so many full blocks to move out, as far as borrowed ones are empty, and copy their content."""
        return [
            OutgoingBlock(each.borrowed, each.place, self.store.read_blocks([each.source])[0])
            for each in self.begin_moves(kv_blocks)
        ]

    def take_home(self, borrowed: int, content: Tensor) -> bool:
        """Put the content of a borrowed block into one of our own; False if there is no room, or nobody needs it."""
        own = self.bring_home(borrowed)
        if own is None:
            return False
        self.store.write_blocks([own], content[None])
        return True

    def shares(self, asked: PartialAsk) -> list[HolderShare]:
        """Who holds which of the blocks asked for, in the order of their first ones."""
        found: dict[PeerId, list[tuple[LentBlock, int, int]]] = {}
        for number, start in zip(asked.kv_blocks, asked.starts, strict=True):
            place = self.debts.place(number)
            found.setdefault(place.creditor, []).append((place.block, start, number))
        return [HolderShare(creditor, *zip(*each, strict=True)) for creditor, each in found.items()]
