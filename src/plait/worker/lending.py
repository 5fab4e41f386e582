# pyright: standard
"""The lending of one engine, live: its agent, the queries to and from others, and its share of the network.

`kvcache.LendingAgent` decides everything; here it is given messages, losses and time between the engine's steps, and
what it wants done is done. Queries travel beside that, at any time.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import torch

from plait.cluster import PeerLending
from plait.engine import KvLoans, SpanEngine
from plait.errors import BadFrame, BadSetup
from plait.ids import PeerId, SessionId
from plait.kvcache import (
    LendingAction,
    LendingAgent,
    LendingOptions,
    LoansChanged,
    LoanTerms,
    Send,
    SendContent,
    StepSample,
    WriteContent,
)
from plait.wire import (
    Attend,
    Attended,
    AttendMessage,
    AttendRefused,
    BlockContent,
    BlockTold,
    Buffer,
    LoanBooking,
    LoanGrant,
    LoanKeep,
    LoanLost,
    LoanMessage,
    LoanRecall,
    LoanRelease,
    LoanRenew,
    Message,
)
from plait.worker.lent_attention import LentAttention
from plait.worker.remote_blocks import RemoteBlocks, tensor_bytes

log = logging.getLogger(__name__)

MAX_QUEUED = 512
"""Messages of one peer that wait for a step to end; more are dropped, as if they had been lost."""
MAX_QUEUED_CONTENTS = 64
"""Of these, messages with the content of a block."""
LARGEST_EXTENT_BYTES = 24 << 20
"""What fits in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LendingLimits:
    """How far a worker goes in lending and borrowing, and how long it waits.

    `lend_fraction`: most of its KV blocks that are lent at once; `keep_free_fraction` stays free for its own.
    `deadline_s`: how long the parts of a step may take to come. `wait_s`: how long a session may wait for memory that
    nobody lends, before it ends.
    """

    options: LendingOptions = field(default_factory=LendingOptions)
    lend_fraction: float = 0.5
    keep_free_fraction: float = 0.05
    borrow_tokens: int = 0
    lease_s: float = 5.0
    recall_s: float = 5.0
    deadline_s: float = 5.0
    wait_s: float = 60.0

    def terms(self, kv_blocks: int) -> LoanTerms:
        """What a machine with so many KV blocks lends."""
        return LoanTerms(
            lendable_blocks=int(self.lend_fraction * kv_blocks),
            keep_free_blocks=math.ceil(self.keep_free_fraction * kv_blocks),
            lease_s=self.lease_s,
            recall_s=self.recall_s,
        )


Post = Callable[[PeerId, Message, Sequence[Buffer]], None]


class WorkerLending:
    """What a `SpanWorker` lends and borrows; it enters this and calls it.

    `command` has something done between two steps, at once if none runs. `group` says who lends the same blocks, with
    one-way times as far as they are known; set it before entering. `first_number` as for the agent.
    """

    def __init__(
        self,
        peer: PeerId,
        engine: SpanEngine,
        limits: LendingLimits,
        *,
        post: Post,
        command: Callable[[Callable[[], None]], None],
        first_number: int,
    ) -> None:
        assert engine.loans is not None
        loans = engine.loans
        if not loans.book.lent_blocks:  # a worker before this one may have lent with this engine
            loans.book.first_generation = max(loans.book.first_generation, first_number)
        if loans.store.extent_bytes > LARGEST_EXTENT_BYTES:
            raise BadSetup(
                f"a KV block takes {loans.store.extent_bytes} bytes here, more than a message carries; lower "
                "--block-size to lend KV memory"
            )
        self.limits = limits
        self.group: Callable[[], Mapping[PeerId, float | None]] = dict
        self._peer = peer
        self._engine = engine
        self._loans: KvLoans = loans
        self._post = post
        self._command = command
        self.agent = LendingAgent(
            peer, loans, limits.options, first_number=first_number, layers=len(engine.blocks)
        )
        self._attention = LentAttention(loans, engine.spec, self._post_attend, self._heard)
        self._group: Mapping[PeerId, float | None] = {}
        self._queued: dict[PeerId, int] = {}
        self._queued_contents: dict[PeerId, int] = {}
        self._keepers: list[PeerId] = []
        self._starving: tuple[SessionId, float] | None = None
        self._closing = False
        self.moved_bytes_total = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        spec = self._engine.spec

        def heads(block: int) -> tuple[int, int]:
            attention = spec.blocks[block].attention
            return attention.heads, attention.latent.kv_rank if attention.latent else attention.cached_dim

        self.remote = RemoteBlocks(
            self._loans, self._post_attend, heads=heads, deadline_s=self.limits.deadline_s, loop=self._loop
        )
        self._loans.store.remote = self.remote
        await self._attention.__aenter__()
        self._ticking = self._loop.create_task(self._tick_often())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The engine does not compute any more, and its sessions are closed: all that was borrowed goes back."""
        self._closing = True
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        self._carry_out(self.agent.part(self._loop.time()), ())
        await self._attention.__aexit__(kind, error, trace)

    # -- what the worker tells it ----------------------------------------------------------------------------

    def on_message(self, peer: PeerId, message: LoanMessage, tensors: tuple[memoryview, ...]) -> None:
        """A peer says something.

        Raises:
            BadFrame: what it says cannot be.
        """
        match message:
            case Attend():
                self._attention.on_query(peer, message, tensors)
            case Attended() | AttendRefused():
                self.remote.on_answer(peer, message, tensors)
            case _:
                self._check(message, tensors)
                self._queue(peer, message, tensors)

    def on_lost(self, peer: PeerId) -> None:
        """The link to a peer is gone."""
        self.remote.on_lost(peer)
        self._attention.on_lost(peer)
        self._command(lambda: self._carry_out(self.agent.on_gone(peer, self._loop.time()), ()))

    def before_step(self) -> None:
        """A step is about to be run."""
        self._carry_out(self.agent.before_step(self._loop.time()), ())
        self._keepers = self.agent.creditors

    def after_step(self, step_s: float) -> None:
        """A step is over."""
        engine, decoded = self._engine, self._engine.decoded
        sample = None
        if decoded is not None and step_s > 0:
            sample = StepSample(decoded.sessions, decoded.tokens, decoded.holders, step_s)
        starving = engine.starving
        if starving is None or self._starving is None or self._starving[0] != starving:
            self._starving = None if starving is None else (starving, self._loop.time())
        self._carry_out(self.agent.after_step(sample, starving is not None, self._loop.time()), ())

    def drain(self) -> None:
        """Lend no more, and call back what is lent."""
        self._command(lambda: self._carry_out(self.agent.leave(self._loop.time()), ()))

    def waited_too_long(self) -> tuple[SessionId, str] | None:
        """A session for which no memory has come in time, and what to say about it."""
        if self._starving is None or self._engine.starving != self._starving[0]:
            return None
        id, since_s = self._starving
        waited_s = self._loop.time() - since_s
        if waited_s < self.limits.wait_s:
            return None
        self._starving = None
        facts = self._loans.scheduler.lending_facts()
        return id, (
            f"it needs {max(1, facts.short_blocks)} KV blocks more than are free here, and no machine has lent them "
            f"for {waited_s:.0f} s; retry later, ask for fewer tokens, or start machines with more --kv-cache-memory"
        )

    def told(self) -> PeerLending:
        """What the swarm is told."""
        loans, counts = self._loans, self.agent.counts
        extents = loans.store.extents
        return PeerLending(
            layout=f"{type(loans.store).__name__} {extents.dtype} {extents.shape[1]} {loans.pool.block_tokens}",
            policy=self.limits.options.policy,
            manages=self.agent.manager(self._loop.time()) == self._peer,
            kv_blocks=loans.pool.kv_blocks,
            lent_blocks=loans.book.lent_blocks,
            borrowed_blocks=loans.debts.borrowed_blocks,
            empty_blocks=loans.debts.empty_blocks,
            moved_out_total=counts.moved_out_total,
            moved_home_total=counts.moved_home_total,
            recalled_total=counts.recalled_total,
            lost_total=loans.lost_total,
            granted_total=counts.granted_total,
            refused_total=counts.refused_total,
            query_bytes_total=self.remote.query_bytes_total,
            part_bytes_total=self.remote.part_bytes_total,
            moved_bytes_total=self.moved_bytes_total,
        )

    # -- parts of the above ----------------------------------------------------------------------------------

    def _queue(self, peer: PeerId, message: LoanBooking, tensors: tuple[memoryview, ...]) -> None:
        contents = bool(tensors)
        if (
            self._queued.get(peer, 0) >= MAX_QUEUED
            or contents * self._queued_contents.get(peer, 0) >= MAX_QUEUED_CONTENTS
        ):
            return
        _count(self._queued, peer, 1)
        _count(self._queued_contents, peer, contents)

        def handle() -> None:
            _count(self._queued, peer, -1)
            _count(self._queued_contents, peer, -contents)
            self._carry_out(self.agent.on_message(peer, message, self._loop.time()), tensors)

        self._command(handle)

    def _check(self, message: LoanBooking, tensors: tuple[memoryview, ...]) -> None:
        match message:
            case BlockContent() | BlockTold():
                extent_bytes = self._loans.store.extent_bytes
                if len(tensors) != 1 or tensors[0].nbytes != extent_bytes:
                    raise BadFrame(f"a KV block of {extent_bytes} bytes was said to come, and other came")
                return
            case LoanGrant() | LoanRelease() | LoanRenew() | LoanLost() | LoanRecall():
                if len(message.blocks.kv_blocks) != len(message.blocks.generations):
                    raise BadFrame("blocks and generations of different numbers")
            case _:
                pass
        if tensors:
            raise BadFrame(f"tensors came with {type(message).__name__}, which has none")

    def _carry_out(self, actions: Sequence[LendingAction], tensors: tuple[memoryview, ...]) -> None:
        store = self._loans.store
        for action in actions:
            match action:
                case Send(peer, message):
                    self._post(peer, message, ())
                case SendContent(peer, message, kv_block):
                    content = store.read_blocks([kv_block])[0].cpu()
                    self.moved_bytes_total += content.nbytes
                    self._post(peer, message, (tensor_bytes(content),))
                case WriteContent(kv_block):
                    content = torch.frombuffer(tensors[0], dtype=store.extents.dtype)
                    store.write_blocks([kv_block], content[None])
                case LoansChanged():
                    self._engine.loans_changed()

    def _heard(self, peer: PeerId) -> None:
        self.agent.heard(peer, self._loop.time())

    def _post_attend(self, peer: PeerId, message: AttendMessage, tensors: Sequence[memoryview]) -> None:
        self._post(peer, message, tensors)

    async def _tick_often(self) -> None:
        """Have the agent look at the clock between steps; creditors hear of this machine during long ones, too."""
        heartbeat_s = self.limits.options.heartbeat_s
        ticked = asyncio.Event()
        while not self._closing:
            ticked.clear()
            self._command(lambda: self._tick(ticked))
            while not ticked.is_set():
                try:
                    async with asyncio.timeout(heartbeat_s):
                        await ticked.wait()
                except TimeoutError:
                    for peer in self._keepers:
                        self._post(peer, LoanKeep(), ())
            await asyncio.sleep(heartbeat_s / 2)

    def _tick(self, ticked: asyncio.Event) -> None:
        ticked.set()
        now_s = self._loop.time()
        group = self.group()
        if group != self._group:
            self._group = group
            known_s = {peer: one_way_s for peer, one_way_s in group.items() if one_way_s is not None}
            self._carry_out(self.agent.set_group(list(group), known_s, now_s), ())
        self._carry_out(self.agent.on_tick(now_s), ())
        self._keepers = self.agent.creditors


def _count(counts: dict[PeerId, int], peer: PeerId, by: int) -> None:
    counts[peer] = counts.get(peer, 0) + by
    if not counts[peer]:
        del counts[peer]
