"""Messages by which machines lend each other KV memory, and attend over what they have lent (kvcache/ says how).

    instance → manager    LoanBeat, LoanWant             manager → instance   LoanBeatAsk, LoanCandidates
                                                                             MoveOrder, HomeOrder, YieldOrder
    debtor → creditor     LoanReserve                    creditor → debtor    LoanGrant, LoanNo
                          BlockContent (a tensor)                             BlockStored
                          BlockAsk                                            BlockTold (a tensor), BlockGone
                          LoanRelease, LoanRenew                              LoanLost, LoanRecall
                          Attend (a tensor)                                   Attended (three), AttendRefused

The manager is one of the instances that lend to each other, and holds nothing that `LoanBeat` does not bring back.
Blocks are named by the number that they have at their creditor, and the generation under which it lent them.
"""

from typing import Annotated, Literal

from msgspec import Meta

from plait.wire.bounded import Bounded, Count, PeerIdField

MAX_LOAN_PEERS = 1024
MAX_LOAN_BLOCKS = 16384
"""In one message; a reservation, a renewal and a list that is attended have no more in all."""
MAX_BEAT_CHANGES = 256
MAX_CANDIDATES_TOLD = 3
MAX_ATTENDED_TOKENS = 4096
"""Rows of one query: a longer chunk of a prompt comes in several."""

KvBlockNumber = Annotated[int, Meta(ge=0, lt=2**31)]
BlockCount = Annotated[int, Meta(ge=0, le=MAX_LOAN_BLOCKS)]
Generation = Annotated[int, Meta(ge=0, lt=2**62)]
KvBlockNumbers = Annotated[tuple[KvBlockNumber, ...], Meta(max_length=MAX_LOAN_BLOCKS)]
Generations = Annotated[tuple[Generation, ...], Meta(max_length=MAX_LOAN_BLOCKS)]
Starts = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**24)], ...], Meta(max_length=MAX_LOAN_BLOCKS)]
LoanRequest = Annotated[str, Meta(max_length=128)]
Debts = Annotated[dict[PeerIdField, Annotated[int, Meta(ge=0, le=2**31)]], Meta(max_length=MAX_LOAN_PEERS)]
DtypeName = Literal["float32", "float64", "bfloat16", "float16"]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]


class WireBlocks(Bounded, frozen=True):
    """Lent blocks: their numbers at the creditor, and as many generations."""

    kv_blocks: KvBlockNumbers
    generations: Generations


class WirePlacement(Bounded, frozen=True):
    """So many blocks of a request lie at `holder`; 0 where there were some."""

    request: LoanRequest
    holder: PeerIdField
    kv_blocks: Annotated[int, Meta(ge=0, le=2**31)]


class WireLayerTimes(Bounded, frozen=True):
    """Seconds of one layer, as `kvcache.LayerTimes` has them."""

    layers: Annotated[int, Meta(ge=1, le=4096)]
    flat_s: Seconds
    per_request_s: Seconds
    per_token_s: Seconds
    per_holder_s: Seconds


class LoanBeat(Bounded, frozen=True, tag="loan_beat", kw_only=True):
    """What an instance says of itself; `kvcache.DebtHeartbeat` has the same names."""

    number: Count
    whole: bool
    kv_blocks: KvBlockNumber
    free_blocks: KvBlockNumber
    lendable_blocks: KvBlockNumber
    spare_blocks: KvBlockNumber
    running: Count
    waiting: Count
    attended_tokens: Count
    mean_request_tokens: Annotated[float, Meta(ge=0, le=2**31)]
    lent: Debts
    borrowed: Debts
    changes: Annotated[tuple[WirePlacement, ...], Meta(max_length=MAX_BEAT_CHANGES)]
    starving: Annotated[int, Meta(ge=-(2**62), le=2**62)] | None
    times: WireLayerTimes | None


class LoanBeatAsk(Bounded, frozen=True, tag="loan_beat_ask"):
    """A heartbeat is missing before that one: send a whole one."""

    number: Count


class LoanWant(Bounded, frozen=True, tag="loan_want"):
    """Who could lend so many blocks? `one_way_s` are distances that the debtor knows."""

    number: Count
    kv_blocks: BlockCount
    one_way_s: Annotated[dict[PeerIdField, Seconds], Meta(max_length=MAX_LOAN_PEERS)]


class LoanCandidates(Bounded, frozen=True, tag="loan_candidates"):
    number: Count
    creditors: Annotated[tuple[PeerIdField, ...], Meta(max_length=MAX_CANDIDATES_TOLD)]


class LoanReserve(Bounded, frozen=True, tag="loan_reserve"):
    number: Count
    kv_blocks: Annotated[int, Meta(ge=1, le=MAX_LOAN_BLOCKS)]


class LoanGrant(Bounded, frozen=True, tag="loan_grant"):
    number: Count
    blocks: WireBlocks


class LoanNo(Bounded, frozen=True, tag="loan_no"):
    """No reservation; `lendable_blocks` could have been lent."""

    number: Count
    lendable_blocks: KvBlockNumber


class BlockContent(Bounded, frozen=True, tag="block_content"):
    """The content of a lent block, as the one tensor of the message."""

    kv_block: KvBlockNumber
    generation: Generation


class BlockStored(Bounded, frozen=True, tag="block_stored"):
    """The content is kept, or (not `accepted`) the block is not the sender's."""

    kv_block: KvBlockNumber
    generation: Generation
    accepted: bool


class BlockAsk(Bounded, frozen=True, tag="block_ask"):
    kv_block: KvBlockNumber
    generation: Generation


class BlockTold(Bounded, frozen=True, tag="block_told"):
    kv_block: KvBlockNumber
    generation: Generation


class BlockGone(Bounded, frozen=True, tag="block_gone"):
    """The block asked for is not the asker's, or not any more."""

    kv_block: KvBlockNumber
    generation: Generation


class LoanRelease(Bounded, frozen=True, tag="loan_release"):
    blocks: WireBlocks


class LoanRenew(Bounded, frozen=True, tag="loan_renew"):
    """The sender has exactly `blocks`, of loans numbered up to `settled`."""

    blocks: WireBlocks
    settled: Annotated[int, Meta(ge=-1, le=2**53)]


class LoanKeep(Bounded, frozen=True, tag="loan_keep"):
    """The sender computes a long step, and lives."""


class LoanLost(Bounded, frozen=True, tag="loan_lost"):
    """Of the blocks that a renewal named, the debtor has not these."""

    blocks: WireBlocks


class LoanRecall(Bounded, frozen=True, tag="loan_recall"):
    """The creditor takes these blocks back in `within_s`."""

    blocks: WireBlocks
    within_s: Seconds


class MoveOrder(Bounded, frozen=True, tag="move_order"):
    """Borrow so many blocks from `creditor` and move there what is oldest of the request."""

    request: LoanRequest
    creditor: PeerIdField
    kv_blocks: Annotated[int, Meta(ge=1, le=MAX_LOAN_BLOCKS)]


class HomeOrder(Bounded, frozen=True, tag="home_order"):
    """Take so many blocks home from `creditor`."""

    creditor: PeerIdField
    kv_blocks: Annotated[int, Meta(ge=1, le=MAX_LOAN_BLOCKS)]


class YieldOrder(Bounded, frozen=True, tag="yield_order"):
    """Several cannot go on because each holds what another lacks: give up yours for a while."""


class Attend(Bounded, frozen=True, tag="attend", kw_only=True):
    """Attend the query that comes with this, first row at `position`, over blocks lent to the sender.

    They are those of list `listing`, which is that of `base` (0: empty) and then `blocks`, whose tokens begin at
    `starts`; a list that was named before is meant by its number alone (`base` is `listing`). `block` is the model's.
    """

    request: Count
    block: Annotated[int, Meta(ge=0, le=4096)]
    position: Annotated[int, Meta(ge=0, le=2**24)]
    tokens: Annotated[int, Meta(ge=1, le=MAX_ATTENDED_TOKENS)]
    dtype: DtypeName
    listing: Annotated[int, Meta(ge=1, le=2**53)]
    base: Count
    blocks: WireBlocks
    starts: Starts


class Attended(Bounded, frozen=True, tag="attended"):
    """Tensors: most and weight [tokens, heads], summed [tokens, heads, dim], in float32 (float64 for such a query)."""

    request: Count


class AttendRefused(Bounded, frozen=True, tag="attend_refused"):
    """Lost: the blocks are not the asker's. Busy: it has asked too much at once."""

    request: Count
    why: Literal["lost", "busy"]


LoanBooking = (
    LoanBeat
    | LoanBeatAsk
    | LoanWant
    | LoanCandidates
    | LoanReserve
    | LoanGrant
    | LoanNo
    | BlockContent
    | BlockStored
    | BlockAsk
    | BlockTold
    | BlockGone
    | LoanRelease
    | LoanRenew
    | LoanKeep
    | LoanLost
    | LoanRecall
    | MoveOrder
    | HomeOrder
    | YieldOrder
)
"""What changes books, between steps."""
AttendMessage = Attend | Attended | AttendRefused
LoanMessage = LoanBooking | AttendMessage
