"""A gateway and machines of a swarm that serves `tiny`, on one event loop, with links in memory."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

import plait.model
from plait.engine import EngineOptions, Wishes
from plait.transport import Identity, MemoryNet, SwarmSecret, TicketPeer
from plait.worker import (
    LoadProgress,
    Member,
    MemberOptions,
    SpanLimits,
    SpanSource,
    SwarmGateway,
    SwarmNode,
    SwarmOptions,
    source_of_folder,
)
from plait.worker.measure import KeptRates

TINY = Path(plait.model.__file__).parent / "tiny"
SECRET = SwarmSecret(bytes(range(32)))


class SmallSwarm:
    """`gateway` is what the HTTP side asks; machines come by `join` and go by `kill`. Enter it to start it."""

    def __init__(self, folder: Path, **swarm_options: Any) -> None:
        self.net = MemoryNet()
        self.members: dict[str, Member] = {}
        self._rates = KeptRates(folder)
        self._stack = AsyncExitStack()
        self._stacks: dict[str, AsyncExitStack] = {}
        self.gateway = SwarmGateway(
            self._node("gateway"),
            names=("tiny",),
            open_source=self._source,
            member_options=MemberOptions(name="gateway", blocks="none", announce_s=0.2),
            swarm_options=SwarmOptions(**swarm_options),
            ticket_s=3600,
        )

    async def __aenter__(self) -> "SmallSwarm":
        await self._stack.enter_async_context(self.gateway)
        assert await self.gateway.engine.wait_settled() == "ready"
        return self

    async def __aexit__(self, *error: object) -> None:
        for stack in self._stacks.values():
            await stack.aclose()
        await self._stack.aclose()

    async def join(self, name: str, blocks: range, *, load: Callable[[], None] | None = None) -> Member:
        """Start a machine; `load` is called in the middle of loading, off the event loop."""
        node = self._node(name, TicketPeer(self.gateway.node.peer, self.gateway.node.addresses))
        source: Any = self._source(lambda progress: None)
        if load is not None:
            source = SlowSource(source, load)
        stack = self._stacks[name] = AsyncExitStack()
        await stack.enter_async_context(node)
        options = MemberOptions(name=name, blocks=blocks, announce_s=0.2, ping_s=0.2)
        member = self.members[name] = Member(node, source, options)
        return await stack.enter_async_context(member)

    async def wait_serving(self, *names: str) -> None:
        """Wait until machines serve, and the gateway and the other machines know how far they are."""
        for name in names:
            await self.members[name].wait_settled()
        async with asyncio.timeout(60):
            while not self._all_known(set(names)):
                await asyncio.sleep(0.02)

    async def kill(self, name: str) -> None:
        """A machine is gone from one moment to the next."""
        self.net.kill(name)
        await self._stacks.pop(name).aclose()

    def _all_known(self, names: set[str]) -> bool:
        status = self.gateway.status()
        serving = {machine["peer"]: machine for machine in status["machines"] if machine["state"] == "online"}
        known = {machine["name"] for machine in serving.values() if machine["rtt_s"] is not None}
        linked = {link["from"] for link in status["links"]} & {link["to"] for link in status["links"]}
        return names <= known and serving.keys() <= linked

    def _node(self, name: str, *introducers: TicketPeer) -> SwarmNode:
        return SwarmNode(
            Identity.from_seed(name.encode().ljust(32, b".")[:32]),
            secret=SECRET,
            carriers={"mem": self.net.carrier(name)},
            listen=[f"mem://{name}"],
            introducers=introducers,
            rng=np.random.default_rng(len(self.members) if introducers else 99),
        )

    def _source(self, on_progress: Callable[[LoadProgress], None]) -> SpanSource:
        return source_of_folder(
            "tiny",
            EngineOptions(folder=TINY, threads=1, packed_cache=False),
            Wishes(),
            SpanLimits(memory_bytes=2**30, context_tokens=4096),
            kept_rates=self._rates,
        )


class SlowSource:
    """A source that says how far it is and then waits for somebody, before it loads."""

    def __init__(self, source: SpanSource, wait: Callable[[], None]) -> None:
        self._source = source
        self._wait = wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    async def load(self, blocks: range, holders: Any, on_progress: Any) -> Any:
        on_progress("fetching weights", 3 * 2**20, 12 * 2**20)
        await asyncio.to_thread(self._wait)
        return await self._source.load(blocks, holders, on_progress)
