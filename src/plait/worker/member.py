"""One machine of a swarm: which blocks it serves, what it says of itself, when it moves and how it leaves.

    joining ── loaded ──▶ online ── better blocks elsewhere, or told to leave ──▶ draining ── no session left ──▶ …
       ▲                                                                                                       │
       └──────────────────────────────── it moves ◀────────────────────────────────────────────────────────────┤
                                                                                                 offline ◀─────┘

A machine claims its span before it loads it (`joining`), so that others choose differently: PETALS (2023), section 3.2.
While it drains it serves the sessions that it has and takes none; their gateways see the state and move them.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np

from plait.cluster import (
    PeerLending,
    PeerLoad,
    PeerProgress,
    PeerRates,
    PeerRecord,
    PeerState,
    PeerTerms,
    SwarmView,
    format_blocks,
)
from plait.errors import EngineFailure, PeerLost, ServingError
from plait.ids import PeerId
from plait.placement import better_span, choose_span
from plait.wire import LeaveAsk, Message
from plait.worker.async_engine import LoadProgress
from plait.worker.span_source import LoadedSpan, StageProgress
from plait.worker.span_worker import SpanWorker, SpanWorkerOptions
from plait.worker.swarm_engine import RunBlocking
from plait.worker.swarm_node import SwarmNode

log = logging.getLogger(__name__)

LOOK_S = 0.05
# How often a machine that joins says how far it is.
PROGRESS_S = 1.0
# Holders of a block that links are kept to, so that their round trips are known: as many as PETALS pings.
PINGED_HOLDERS = 5


class SpanSupply(Protocol):
    """What a member needs to know of its model and machine; `span_source.SpanSource` is the real one."""

    @property
    def model(self) -> str: ...
    @property
    def model_blocks(self) -> int: ...
    @property
    def hidden_bytes(self) -> int: ...
    @property
    def weight_format(self) -> str: ...
    @property
    def kv_format(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...

    def longest_span(self) -> int: ...

    def known_rates(self) -> PeerRates: ...

    async def load(
        self, blocks: range, holders: Callable[[], Sequence[PeerId]], on_progress: StageProgress
    ) -> LoadedSpan: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberOptions:
    """How one member behaves.

    `blocks`: its span; auto chooses, and may move later; none serves nothing. It waits up to `choose_wait_s` before it
    chooses, so that machines which start together choose one after the other, and looks for better blocks at random
    intervals of `rebalance_s` on average. `drain_timeout_s` is how long sessions may take to go elsewhere.
    `is_gateway`: it chooses chains too, so it measures the way to those that begin and end one.
    """

    name: str
    blocks: range | Literal["auto", "none"] = "auto"
    announce_s: float = 5.0
    choose_wait_s: float = 1.0
    rebalances: bool = True
    rebalance_s: float = 60.0
    balance_quality: float = 0.75
    ping_s: float = 5.0
    drain_timeout_s: float = 30.0
    is_gateway: bool = False
    version: str = ""
    terms: PeerTerms = field(default_factory=PeerTerms)


class Member:
    """Serves spans of one model on a node; enter it to begin, `leave` and `wait_left` to end well.

    Leaving the context without `leave` is abrupt: sessions are lost here and recovered elsewhere. `run_blocking` runs
    what would hold up the event loop.
    """

    def __init__(
        self,
        node: SwarmNode,
        supply: SpanSupply,
        options: MemberOptions,
        *,
        run_blocking: RunBlocking = asyncio.to_thread,
    ) -> None:
        self.node = node
        self.supply = supply
        self.options = options
        self.state: PeerState = "joining"
        self.blocks = range(0)
        """Served or claimed now; empty for none."""
        self.progress = LoadProgress("starting", 0, 0)
        self.failure: ServingError | None = None
        self.worker: SpanWorker | None = None
        self.moves_total = 0
        self._lookout = node.look(supply.model, supply.model_blocks)
        self._run_blocking = run_blocking
        self._rates = PeerRates()
        self._leaving = asyncio.Event()
        self._left = asyncio.Event()
        self._settled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._rates = self.supply.known_rates()
        self.node.network.route((LeaveAsk,), self._on_leave_ask)
        self.node.watch(self._lookout.changed)
        self._tasks = [
            self._start(work) for work in (self._serve(), self._announce_often(), self._ping_often())
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def leave(self) -> None:
        """Begin to leave: no new sessions, those that are here go elsewhere, then offline."""
        self._leaving.set()

    async def wait_settled(self) -> None:
        """Wait until it serves (or is known to serve nothing), has failed, or has left."""
        await self._settled.wait()

    async def wait_left(self) -> None:
        """Wait until it has left, or has failed (`failure`)."""
        await self._left.wait()

    def view(self) -> SwarmView:
        """The swarm of this model, as seen from here."""
        return self._lookout.view()

    @property
    def load(self) -> PeerLoad:
        """How busy its worker is, and what has passed over its links."""
        load, traffic = (
            self.worker.load() if self.worker is not None else PeerLoad(),
            self.node.network.total_traffic(),
        )
        return replace(load, sent_bytes=traffic.sent_bytes, received_bytes=traffic.received_bytes)

    # -- serving -----------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Serve one span after another until told to leave."""
        try:
            blocks = await self._first_blocks()
            while blocks is not None and not self._leaving.is_set():
                blocks = await self._serve_span(blocks)
            if blocks is None and not self._leaving.is_set():
                self._say("online", range(0))
                self._settled.set()
                await self._leaving.wait()
        except ServingError as error:
            self.failure = error
            log.info("this member leaves: %s", error.message)
        except Exception as error:
            self.failure = EngineFailure(f"this member broke: {type(error).__name__}: {error}")
            log.exception("this member broke")
        finally:
            self._say("offline", range(0))
            self._settled.set()
            self._left.set()

    async def _first_blocks(self) -> range | None:
        """The blocks to begin with; None for none."""
        match self.options.blocks:
            case "none":
                return None
            case "auto":
                length = self.supply.longest_span()
                others = [peer for peer in self.view().records if peer != self.node.peer]
                if others:
                    await self._sleep(float(self.node.rng.uniform(0, self.options.choose_wait_s)))
                return choose_span(self.view(), length, peer=self.node.peer)
            case range() as blocks:
                return blocks

    async def _serve_span(self, blocks: range) -> range | None:
        """Load and serve a span until there is reason to stop; the blocks to serve next."""
        self._say("joining", blocks)
        loaded = await self._unless_leaving(self.supply.load(blocks, self._weight_holders, self._on_progress))
        if loaded is None:
            return blocks
        self._rates = loaded.rates
        try:
            worker = SpanWorker(
                self.node.network,
                loaded.engine,
                model=self.supply.model,
                run_step=loaded.run_step,
                options=SpanWorkerOptions(lending=loaded.lending),
                first_number=int(self.node.unix_now() * 1e6),
            )
            if worker.lending is not None:
                worker.lending.group = lambda: self._lends_the_same(worker)
            async with worker:
                self.worker = worker
                self.node.add_hearer(worker)
                try:
                    self._say("online", blocks)
                    self._settled.set()
                    log.info("serving blocks %s", format_blocks(blocks))
                    following = await self._until_reason_to_stop(blocks, worker)
                    await self._drain(blocks, worker)
                finally:
                    self.node.remove_hearer(worker)
                    self.worker = None
        finally:
            await loaded.close()
        if worker.failure is not None:
            raise worker.failure
        return following

    async def _until_reason_to_stop(self, blocks: range, worker: SpanWorker) -> range:
        """Wait for the order to leave, a broken engine, or better blocks; the blocks to serve then."""
        options, loop, rng = self.options, asyncio.get_running_loop(), self.node.rng
        moves = options.blocks == "auto" and options.rebalances

        def next_look_s() -> float:
            return loop.time() + float(rng.uniform(0, 2 * options.rebalance_s))

        look_s = next_look_s()
        reasons = [asyncio.ensure_future(event.wait()) for event in (self._leaving, worker.broken)]
        try:
            while True:
                wait_s = max(0.0, look_s - loop.time()) if moves else None
                done, _ = await asyncio.wait(reasons, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return blocks
                look_s = next_look_s()
                better = await self._better_blocks()
                if better is not None and better != blocks:
                    log.info("moving from blocks %s to %s", format_blocks(blocks), format_blocks(better))
                    self.moves_total += 1
                    return better
        finally:
            for reason in reasons:
                reason.cancel()

    async def _better_blocks(self) -> range | None:
        """Where this machine should move to; seconds of work in a swarm of a thousand, so not for the event loop."""
        view, peer, length = self.view(), self.node.peer, self.supply.longest_span()
        rng = np.random.default_rng(int(self.node.rng.integers(2**63)))
        quality = self.options.balance_quality
        return await self._run_blocking(
            lambda: better_span(view, peer, length, rng=rng, balance_quality=quality)
        )

    async def _drain(self, blocks: range, worker: SpanWorker) -> None:
        """Serve what is here until it has gone elsewhere or ended."""
        self._say("draining", blocks)
        worker.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.options.drain_timeout_s):
                while (worker.sessions or worker.lent_blocks) and worker.failure is None:
                    await asyncio.sleep(LOOK_S)
        if worker.sessions:
            log.warning(
                "%d sessions had not gone elsewhere after %g s", worker.sessions, self.options.drain_timeout_s
            )

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the order to leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._leaving.wait()

    async def _unless_leaving(self, work: Coroutine[None, None, LoadedSpan]) -> LoadedSpan | None:
        """What comes of a long work, or None if the order to leave came before."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            leaving.cancel()
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    def _weight_holders(self) -> list[PeerId]:
        """Members that may have weights, those that serve the model's blocks first, drawn anew each time."""
        records = [record for record in self.view().records.values() if record.peer != self.node.peer]
        order = self.node.rng.permutation(len(records))
        drawn = [records[int(index)] for index in order if records[int(index)].state != "offline"]
        return [record.peer for record in sorted(drawn, key=lambda record: not record.span)]

    def _lends_the_same(self, worker: SpanWorker) -> Mapping[PeerId, float | None]:
        """Who lends KV blocks like this machine's, and how far they are in seconds, as far as that is known."""
        assert worker.lending is not None
        view, layout = self.view(), worker.lending.told().layout
        return {
            record.peer: view.rtts_s[record.peer] / 2 if record.peer in view.rtts_s else None
            for record in view.records.values()
            if record.state == "online" and record.span == worker.blocks and record.lending.layout == layout
        }

    # -- what others are told ----------------------------------------------------------------------------

    def _say(self, state: PeerState, blocks: range) -> None:
        self.state, self.blocks = state, blocks
        supply = self.supply
        self.node.membership.announce(
            PeerRecord(
                peer=self.node.peer,
                name=self.options.name,
                model=supply.model,
                first_block=blocks.start,
                end_block=blocks.stop,
                state=state,
                addresses=self.node.addresses,
                rates=replace(self._rates, network_tokens_per_s=self._network_tokens_per_s()),
                load=self.load,
                progress=self._told_progress(state),
                terms=self.options.terms,
                lending=self._told_lending(),
                weight_format=supply.weight_format,
                kv_format=supply.kv_format,
                memory_bytes=supply.memory_bytes,
                version=self.options.version,
            )
        )

    def _network_tokens_per_s(self) -> float:
        """Hidden states that the best link of this machine carries; 0 while none has been measured."""
        network = self.node.network
        estimates = [network.estimate(peer) for peer in network.connected()]
        best = max((each.bandwidth_bytes_per_s for each in estimates if each is not None), default=0.0)
        return best / self.supply.hidden_bytes

    def _told_lending(self) -> PeerLending:
        worker = self.worker
        return PeerLending() if worker is None or worker.lending is None else worker.lending.told()

    def _told_progress(self, state: PeerState) -> PeerProgress:
        if state != "joining":
            return PeerProgress()
        now = self.progress
        return PeerProgress(stage=now.stage, done_bytes=now.done_bytes, total_bytes=now.total_bytes)

    async def _announce_often(self) -> None:
        while not self._left.is_set():
            joining, announce_s = self.state == "joining", self.options.announce_s
            await asyncio.sleep(min(announce_s, PROGRESS_S) if joining else announce_s)
            if self.state in ("online", "draining") or (self.blocks and self.state == "joining"):
                self._say(self.state, self.blocks)

    async def _ping_often(self) -> None:
        """Keep links to the peers that matter, which measures them: holders of the next block and of the own ones, and
        for a gateway those of the first and the last one."""
        probed: set[PeerId] = set()
        while not self._left.is_set():
            await asyncio.sleep(self.options.ping_s)
            view = self.view()
            outer = {0, view.model_blocks - 1} if self.options.is_gateway else set[int]()
            own = {self.blocks.start, self.blocks.stop % view.model_blocks} if self.blocks else set[int]()
            for block in sorted(outer | own):
                holders = [record.peer for record in view.holders(block) if record.peer != self.node.peer]
                order = self.node.rng.permutation(len(holders))[:PINGED_HOLDERS]
                for peer in (holders[int(index)] for index in order):
                    with suppress(PeerLost):
                        await self.node.network.connect(peer)
                        if not probed:  # one link says how fast this machine's are
                            probed.add(peer)
                            await self.node.network.probe(peer)

    # -- small things ------------------------------------------------------------------------------------

    def _on_progress(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        self.progress = LoadProgress(stage, done_bytes, total_bytes)

    def _on_leave_ask(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        log.info("peer=%s tells this member to leave", peer[:8])
        self.leave()

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)
