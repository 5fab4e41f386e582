"""The gateway of a swarm: answers requests from the swarm's machines, may be one of them itself, and says how it is."""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from plait.cluster import PeerProgress, PeerRecord, SwarmView, format_blocks
from plait.errors import ServingError
from plait.ids import PeerId
from plait.metrics import MachineFacts, SwarmFacts
from plait.placement import advise, explain_span
from plait.routing import choose_chain, routed_fields, standing_of, wish_of_fields
from plait.session import RouteAsk
from plait.transport import LinkTraffic, SwarmSecret, Ticket, TicketPeer
from plait.wire import ChainHop, LeaveAsk
from plait.worker.async_engine import LoadProgress
from plait.worker.member import Member, MemberOptions
from plait.worker.span_source import SpanSource
from plait.worker.swarm_engine import SwarmEngine, SwarmOptions
from plait.worker.swarm_model import SwarmModel, read_swarm_model
from plait.worker.swarm_node import SwarmNode

log = logging.getLogger(__name__)

LOOK_S = 0.1
# Chains of running sessions that `status` shows, the most used first.
SHOWN_CHAINS = 16
SHOWN_SETS = 16


class SwarmGateway:
    """`engine` for the HTTP gateway, and the desk where it asks about the swarm; enter it to start both.

    `open_source` finds (and may download) the model in a thread, and is told where to report progress.
    """

    def __init__(
        self,
        node: SwarmNode,
        *,
        names: tuple[str, ...],
        open_source: Callable[[Callable[[LoadProgress], None]], SpanSource],
        member_options: MemberOptions,
        swarm_options: SwarmOptions,
        ticket_s: float,
    ) -> None:
        self.node = node
        self.member: Member | None = None
        self.engine = SwarmEngine(
            node.network,
            names=names,
            load=self._load,
            look=lambda model: node.look(model.fingerprint, model.blocks),
            rng=node.rng,
            options=swarm_options,
            unix_now=node.unix_now,
        )
        self._open_source = open_source
        self._member_options = member_options
        self._ticket_s = ticket_s
        self._source: SpanSource | None = None
        self._stack = AsyncExitStack()
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.node)
            self.node.add_hearer(self.engine)
            self.node.watch(self.engine.view_changed)
            await stack.enter_async_context(self.engine)
            self._stack = stack.pop_all()
        self._serving = asyncio.get_running_loop().create_task(self._serve())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        await self._stack.aclose()

    async def leave(self) -> None:
        """Hand over what other gateways have running on this machine; it then serves no blocks."""
        if self.member is not None:
            self.member.leave()
            await self.member.wait_left()

    async def wait_covered(self) -> None:
        """Wait until every block of the loaded model has a machine that serves it."""
        while self.missing_blocks():
            await asyncio.sleep(LOOK_S)

    # -- the desk ----------------------------------------------------------------------------------------

    def missing_blocks(self) -> tuple[int, ...]:
        """Blocks that no machine serves now.

        Raises:
            NotReady: the model is not known yet.
        """
        lookout = self.engine.lookout
        return lookout.view().missing_blocks(range(lookout.model_blocks))

    def facts(self) -> SwarmFacts | None:
        """What Prometheus is told; None while the model is not known yet."""
        if self.engine.state == "loading" or self.engine.failure is not None:
            return None
        lookout, counts, network = self.engine.lookout, self.engine.counts(), self.node.network
        view, linked = lookout.view(), network.connected()
        return SwarmFacts(
            machines=tuple(
                _facts(
                    record,
                    network.traffic(record.peer),
                    linked=record.peer in linked,
                    rtt_s=_finite(view.rtts_s.get(record.peer)),
                    generated_tokens=counts.tokens_by_peer.get(record.peer, 0),
                )
                for record in view.records.values()
                if record.state != "offline"
            ),
            missing_blocks=len(view.missing_blocks(range(lookout.model_blocks))),
            sessions_by_state={str(state): count for state, count in counts.sessions_by_state.items()},
            sessions_total=counts.sessions_total,
            failovers_total=counts.recoveries_total,
            replayed_tokens_total=counts.replayed_tokens_total,
            hop_failures_total=counts.banned_total,
        )

    def ticket(self) -> str:
        """A ticket that lets machines join from now on until it expires."""
        secret = self.node.network.secret
        assert isinstance(secret, SwarmSecret), "a gateway has its swarm's secret"
        own = TicketPeer(self.node.peer, self.node.addresses)
        return Ticket.issue(secret, [own], expires_unix_s=self.node.unix_now() + self._ticket_s).text

    def status(self, *, max_links: int | None = None) -> Mapping[str, Any]:
        """Machines, spans, links and sessions, ready for JSON; of each machine at most `max_links`, the shortest."""
        lookout = self.engine.lookout
        view, counts, now_s = lookout.view(), self.engine.counts(), self.node.unix_now()
        return {
            "swarm": self.node.network.secret.swarm,
            "model": self.engine.names[0],
            "fingerprint": lookout.model,
            "blocks": lookout.model_blocks,
            "missing_blocks": format_blocks(view.missing_blocks(range(lookout.model_blocks))),
            "gateway": self.node.peer,
            "route_mode": self.engine.options.route.mode,
            "wire_format": self.engine.options.wire_format,
            "sessions": counts.sessions,
            "sessions_by_state": counts.sessions_by_state,
            "sessions_total": counts.sessions_total,
            "recoveries_total": counts.recoveries_total,
            "replayed_tokens_total": counts.replayed_tokens_total,
            "failures_total": counts.banned_total,
            "generated_tokens_total": counts.generated_tokens_total,
            "chains": [
                {"sessions": sessions, "chain": _chain_of(hops, view)}
                for hops, sessions in Counter(self.engine.chains().values()).most_common(SHOWN_CHAINS)
                if hops
            ],
            "machines": [
                {
                    **_machine(record, now_s),
                    "is_gateway": record.peer == self.node.peer,
                    "banned": record.peer in view.banned,
                    "linked": record.peer in self.node.network.connected(),
                    "rtt_s": _finite(view.rtts_s.get(record.peer)),
                    "gateway_sessions": counts.sessions_by_peer.get(record.peer, 0),
                    "gateway_tokens_total": counts.tokens_by_peer.get(record.peer, 0),
                }
                for record in view.records.values()
                if record.state != "offline"
            ],
            "links": [
                {"from": record.peer, "to": peer, "rtt_s": _finite(rtt_s)}
                for record in view.records.values()
                for peer, rtt_s in _shortest(record, view, max_links)
            ],
        }

    async def advice(self) -> Mapping[str, Any]:
        """Which machines to use, when fewer are faster, and why each serves what it serves, ready for JSON.

        `sets`: what the quickest sets of machines would do, whatever they serve now.

        Raises:
            NotReady: the model is not known yet.
        """
        view, source = self.engine.lookout.view(), self._source
        assert source is not None, "a model that is known was read from its source"
        cost, context_tokens = source.block_cost(), source.context_tokens
        advice = await asyncio.to_thread(lambda: advise(view, cost, context_tokens=context_tokens))
        return {
            "context_tokens": context_tokens,
            "block_bytes": cost.block_bytes(context_tokens),
            "sentences": advice.sentences,
            "machines": [
                {
                    "peer": record.peer,
                    "name": record.name,
                    "why": explain_span(view, record.peer, cost, context_tokens=context_tokens),
                }
                for record in view.records.values()
                if record.state != "offline" and len(record.span)
            ],
            "sets": [
                {
                    "blocks": dict(one.blocks),
                    "step_s": one.step_s,
                    "compute_s": one.compute_s,
                    "tokens_per_s": one.tokens_per_s,
                }
                for one in advice.sets[:SHOWN_SETS]
            ],
        }

    async def route(
        self, ask: RouteAsk, need_tokens: int, *, beside_front: bool = False
    ) -> Mapping[str, Any]:
        """The chain that such a wish would get now, and the front it is chosen from.

        With `beside_front`, the front is that of the wish's objectives whatever the mode, and `values` are the
        chain's in them.

        Raises:
            BadRequest: the wish makes no sense.
            NoRoute: nobody serves some blocks.
            NotReady: the model is not known yet.
        """
        lookout = self.engine.lookout
        view, blocks = lookout.view(), range(lookout.model_blocks)
        wish = wish_of_fields(ask.fields, self.engine.options.route, view)
        wish = replace(wish, need_tokens=need_tokens)
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        def late() -> bool:
            return loop.time() > began_s + self.engine.options.route_s

        routed = await asyncio.to_thread(
            lambda: choose_chain(view, blocks, wish, rng=np.random.default_rng(), deadline=late)
        )
        route_s = loop.time() - began_s
        if not beside_front:
            return {**routed_fields(routed, view), "route_s": route_s}
        standing = await asyncio.to_thread(
            lambda: standing_of(view, blocks, routed.chain, wish, deadline=late)
        )
        return {
            **routed_fields(replace(routed, front=standing.front), view),
            "values": [_finite(value) for value in standing.values],
            "route_s": route_s,
        }

    async def ask_to_leave(self, peer: str) -> str:
        """Tell a machine, by name or id, to leave; returns its id.

        Raises:
            BadRequest: there is no such machine.
            PeerLost: it cannot be told.
        """
        found = self.engine.lookout.view().find(peer)
        await self.node.network.send(found, LeaveAsk())
        return found

    # -- what it does ------------------------------------------------------------------------------------

    def _load(self, on_progress: Callable[[LoadProgress], None]) -> SwarmModel:
        """In a thread: what the gateway itself needs of the model, and what its member will."""
        self._source = source = self._open_source(on_progress)
        options = source.options
        return read_swarm_model(
            options.folder, max_model_tokens=options.max_model_tokens, chat_template=options.chat_template
        )

    async def _serve(self) -> None:
        """Offer the model to those who join, and be a member."""
        if await self.engine.wait_settled() != "ready":
            return
        assert self._source is not None
        try:
            self.node.exchange.offer = await asyncio.to_thread(lambda: self._source and self._source.offer)
            self.member = Member(self.node, self._source, replace(self._member_options, is_gateway=True))
            async with self.member:
                await self.member.wait_left()
                if self.member.failure is not None:
                    log.error("this machine serves no blocks: %s", self.member.failure.message)
                await asyncio.Event().wait()
        except ServingError as error:
            log.error("this machine serves no blocks: %s", error.message)


def _machine(record: PeerRecord, now_s: float) -> dict[str, Any]:
    return {
        "peer": record.peer,
        "name": record.name,
        "state": record.state,
        "first_block": record.first_block,
        "end_block": record.end_block,
        "addresses": list(record.addresses),
        "through": list(record.through),
        "weight_format": record.weight_format,
        "kv_format": record.kv_format,
        "memory_bytes": record.memory_bytes,
        "version": record.version,
        "age_s": max(0.0, now_s - record.issued_unix_s),
        "sessions": record.load.sessions,
        "queued_tokens": record.load.queued_tokens,
        "step_s": record.load.step_s,
        "kv_free_tokens": record.load.kv_free_tokens,
        "kv_total_tokens": record.load.kv_total_tokens,
        "sent_bytes": record.load.sent_bytes,
        "received_bytes": record.load.received_bytes,
        "decode_tokens_per_s": record.rates.decode_tokens_per_s,
        "saturated_decode_tokens_per_s": record.rates.saturated_decode_tokens_per_s,
        "prefill_tokens_per_s": record.rates.prefill_tokens_per_s,
        "network_tokens_per_s": record.rates.network_tokens_per_s,
        "loading": _loading(record.progress) if record.state == "joining" else None,
        "lending": asdict(record.lending) if record.lending.layout else None,
        "price_per_hour": record.terms.price_per_hour,
        "busy_watts": record.terms.busy_watts,
    }


def _chain_of(hops: Iterable[ChainHop], view: SwarmView) -> list[dict[str, Any]]:
    return [
        {
            "peer": hop.peer,
            "name": view.records[hop.peer].name if hop.peer in view.records else "",
            "first_block": hop.first_block,
            "end_block": hop.end_block,
        }
        for hop in hops
    ]


def _shortest(record: PeerRecord, view: SwarmView, most: int | None) -> list[tuple[PeerId, float]]:
    known = [(peer, rtt_s) for peer, rtt_s in sorted(record.rtts_s.items()) if peer in view.records]
    return known if most is None else sorted(known, key=lambda link: link[1])[:most]


def _loading(progress: PeerProgress) -> dict[str, Any]:
    """As `/status` says it of a server."""
    return {
        "stage": progress.stage,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes or None,
    }


def _facts(
    record: PeerRecord, traffic: LinkTraffic, *, linked: bool, rtt_s: float | None, generated_tokens: int
) -> MachineFacts:
    load = record.load
    return MachineFacts(
        peer=record.peer,
        name=record.name,
        state=record.state,
        linked=linked,
        rtt_s=rtt_s,
        step_s=load.step_s or None,
        sessions=load.sessions,
        queued_tokens=load.queued_tokens,
        kv_used_tokens=load.kv_total_tokens - load.kv_free_tokens,
        kv_total_tokens=load.kv_total_tokens,
        generated_tokens_total=generated_tokens,
        all_sent_bytes_total=load.sent_bytes,
        all_received_bytes_total=load.received_bytes,
        sent_bytes_total=traffic.sent_bytes,
        received_bytes_total=traffic.received_bytes,
        heartbeats_missed_total=traffic.missed_heartbeats,
        links_lost_total=traffic.losses,
        kv_lent_blocks=record.lending.lent_blocks,
        kv_borrowed_blocks=record.lending.borrowed_blocks,
        kv_moved_out_total=record.lending.moved_out_total,
        kv_moved_home_total=record.lending.moved_home_total,
        kv_recalled_total=record.lending.recalled_total,
        kv_lost_total=record.lending.lost_total,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
