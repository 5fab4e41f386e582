"""Machines of a trial: the live coroutines in a process each, on a virtual clock, over wires in memory."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.cluster import PeerLoad, PeerRates, PeerRecord, PeerState
from plait.ids import PeerId, SessionId
from plait.session import HopSession
from plait.simulator.fault_schedule import MachinePlan
from plait.simulator.faulty_network import FaultyNetwork
from plait.simulator.hash_model import HashDecoder, hash_engine, hash_model
from plait.simulator.virtual_loop import VirtualLoop
from plait.simulator.watched_engine import WatchedSpanEngine
from plait.transport import Identity, MemoryNet, SwarmSecret, TicketPeer
from plait.wire import Fence, Message, OpenSession
from plait.worker import Lookout, Membership, SpanWorker, SpanWorkerOptions, SwarmEngine, SwarmOptions

UNIX_S = 1.8e9
"""The time of day when the virtual clock is at 0."""
ANNOUNCE_S = 5.0
DRAIN_S = 20.0
SECRET = SwarmSecret(bytes(range(32)))
LEASE_S = 90.0
GRACE_S = 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Who is told what happens; `violate` of what should never."""

    note: Callable[[str], None]
    violate: Callable[[str], None]
    on_send: Callable[["Machine", PeerId, Message], None]
    on_hear: Callable[["Machine", PeerId, Message], None]
    on_drop: Callable[["Machine", PeerId, str], None]


class Machine:
    """One process: a network, a membership, and what it does in the swarm (`WorkerMachine`, `GatewayMachine`)."""

    def __init__(
        self,
        name: str,
        net: MemoryNet,
        *,
        rng: np.random.Generator,
        introducers: tuple[TicketPeer, ...],
        observer: Observer,
        clock_ahead_s: float = 0.0,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.name = name
        self.loop = loop
        self.process = loop.process(name)
        self.up = asyncio.Event()
        self.observer = observer
        self.net = net
        self.rng = rng
        self._clock_ahead_s = clock_ahead_s
        identity = identity_of(name)
        self.peer = identity.peer
        self.network = FaultyNetwork(
            identity, secret=SECRET, carriers={"mem": net.carrier(name)}, unix_now=self.unix_now
        )
        self.network.attend(
            rng,
            lambda peer, message: observer.on_send(self, peer, message),
            lambda peer, reason: observer.on_drop(self, peer, reason),
        )
        self.network.on_message = self._on_message
        self.network.on_lost = self._on_lost
        self.membership = Membership(
            self.network, identity, rng=rng, introducers=introducers, unix_now=self.unix_now
        )
        self._leaving = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def dead(self) -> bool:
        return self.process.killed

    @property
    def address(self) -> str:
        return f"mem://{self.name}"

    def unix_now(self) -> float:
        return UNIX_S + self._clock_ahead_s + self.loop.time()

    def start(self) -> None:
        self._task = self.process.start(self._live())

    def leave(self) -> None:
        """Begin to leave in good order."""
        self._leaving.set()

    @property
    def leaving(self) -> bool:
        return self._leaving.is_set()

    async def left(self) -> None:
        """Wait until it has left; raises what it died of."""
        assert self._task is not None
        await self._task

    # -- what it does ------------------------------------------------------------------------------------

    async def enter(self, stack: AsyncExitStack) -> None:
        """Start what it does in the swarm."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Before it leaves."""

    def hear(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        """A message has come."""
        raise NotImplementedError

    def miss(self, peer: PeerId, reason: str) -> None:
        """A peer is gone."""
        raise NotImplementedError

    def say(self, state: PeerState) -> None:
        """Announce this machine."""
        self.membership.announce(
            PeerRecord(
                peer=self.peer,
                name=self.name,
                model=hash_model().fingerprint,
                first_block=self.blocks.start,
                end_block=self.blocks.stop,
                state=state,
                addresses=(self.address,),
                rates=PeerRates(
                    decode_tokens_per_s=1000, prefill_tokens_per_s=5000, network_tokens_per_s=1000
                ),
                load=self.load(),
            )
        )

    @property
    def blocks(self) -> range:
        return range(0)

    def load(self) -> PeerLoad:
        return PeerLoad()

    def check(self) -> None:
        """Assert what must hold of it between any two events."""
        raise NotImplementedError

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.network)
            await self.network.listen(self.address)
            await stack.enter_async_context(self.membership)
            await self.enter(stack)
            self.up.set()
            while not self._leaving.is_set():
                self.say("online")
                with suppress(TimeoutError):
                    async with asyncio.timeout(ANNOUNCE_S):
                        await self._leaving.wait()
            self.say("draining")
            await self.drain()

    def _on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        self.observer.on_hear(self, peer, message)
        self.hear(peer, message, tensors)

    def _on_lost(self, peer: PeerId, reason: str) -> None:
        self.observer.note(f"{self.name} lost {peer[:6]}: {reason}")
        self.miss(peer, reason)


class HopProgress:
    """What a worker's sessions have reached, to see that none goes back but by a fence or a wrong guess.

    `draft_tokens`: how many tokens are guessed at once.
    """

    def __init__(self, draft_tokens: int) -> None:
        self._draft_tokens = draft_tokens
        self._reached: dict[SessionId, tuple[HopSession, int, int, bool]] = {}

    def check(self, sessions: Iterable[HopSession]) -> None:
        """Assert that all of them are where they were, or further."""
        for now in sessions:
            computed = now.computed_tokens
            before, epoch, tokens, held = self._reached.get(now.id, (now, 0, 0, True))
            assert now.epoch > epoch or (now.epoch == epoch and now is before), (
                f"session {now.id[:6]} is in epoch {now.epoch} after epoch {epoch}"
            )
            assert now.epoch > epoch or held or computed >= tokens - self._draft_tokens, (
                f"session {now.id[:6]} went back from position {tokens} to {computed} in epoch {epoch}"
            )
            self._reached[now.id] = now, now.epoch, computed, now.held


class WorkerMachine(Machine):
    """Serves a span. Its steps take time after they were computed, as those of a thread do."""

    def __init__(
        self,
        plan: MachinePlan,
        net: MemoryNet,
        *,
        rng: np.random.Generator,
        introducers: tuple[TicketPeer, ...],
        draft_tokens: int,
        observer: Observer,
    ) -> None:
        super().__init__(
            plan.name,
            net,
            rng=rng,
            introducers=introducers,
            observer=observer,
            clock_ahead_s=plan.clock_ahead_s,
        )
        self.plan = plan
        self._progress = HopProgress(draft_tokens)
        self.slowness: list[float] = []
        """How many times as long its steps take, by each of its faults: the worst counts."""
        self.engine = hash_engine(
            plan.blocks,
            kv_blocks=plan.kv_blocks,
            swap_blocks=plan.swap_blocks,
            step_tokens=plan.step_tokens,
            engine_class=WatchedSpanEngine,
        )
        self.engine.violate = lambda text: observer.violate(f"{self.name}: {text}")
        self.worker = SpanWorker(
            self.network,
            self.engine,
            model=hash_model().fingerprint,
            run_step=self._run_step,
            options=SpanWorkerOptions(lease_s=LEASE_S, grace_s=GRACE_S, kept_bytes=plan.kept_bytes),
        )

    @property
    def blocks(self) -> range:
        return self.plan.blocks

    def load(self) -> PeerLoad:
        return self.worker.load()

    def check(self) -> None:
        self.worker.check()
        self._progress.check(self.worker.hop_sessions())

    def fail_next_step(self) -> None:
        decoder = self.engine.decoder
        assert isinstance(decoder, HashDecoder)
        decoder.fails = True

    async def enter(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.worker)

    async def drain(self) -> None:
        self.worker.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self.worker.sessions:
                    await asyncio.sleep(0.1)

    def hear(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        if isinstance(message, OpenSession | Fence):
            epochs = self.engine.epochs
            epochs[message.session] = max(epochs.get(message.session, 0), message.epoch)
        self.worker.on_message(peer, message, tensors)

    def miss(self, peer: PeerId, reason: str) -> None:
        self.worker.on_lost(peer, reason)

    async def _run_step(self, call: Callable[[], Any]) -> Any:
        before_tokens = self.engine.computed_tokens
        result = call()
        self.engine.computing = True
        tokens = self.engine.computed_tokens - before_tokens
        self.observer.note(f"{self.name} computes {tokens}")
        step_s = (self.plan.step_s + self.plan.token_s * tokens) * max(self.slowness, default=1.0)
        # Whoever waits for a step may give up; the step goes on, as it would in a thread.
        over = asyncio.Event()
        self.loop.call_later(step_s, self._step_over, over)
        await over.wait()
        return result

    def _step_over(self, over: asyncio.Event) -> None:
        self.engine.computing = False
        over.set()


class GatewayMachine(Machine):
    """Where the requests come to."""

    def __init__(
        self,
        name: str,
        net: MemoryNet,
        *,
        rng: np.random.Generator,
        options: SwarmOptions,
        observer: Observer,
    ) -> None:
        super().__init__(name, net, rng=rng, introducers=(), observer=observer)
        self.engine = SwarmEngine(
            self.network,
            names=("hashes",),
            load=lambda on_progress: hash_model(),
            look=lambda model: Lookout(
                self.network,
                self.membership.records,
                model=model.fingerprint,
                model_blocks=model.blocks,
                unix_now=self.unix_now,
            ),
            rng=rng,
            options=options,
            unix_now=self.unix_now,
            run_blocking=_run_now,
        )
        self.membership.on_change = lambda peer: self.engine.view_changed()

    def check(self) -> None:
        self.engine.check()

    async def enter(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.engine)
        await self.engine.wait_settled()

    def hear(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        self.engine.on_message(peer, message, tensors)

    def miss(self, peer: PeerId, reason: str) -> None:
        self.engine.on_lost(peer, reason)


def identity_of(name: str) -> Identity:
    """The same identity for the same name."""
    return Identity.from_seed(name.encode().ljust(32, b"."))


async def _run_now(call: Callable[[], Any]) -> Any:
    return call()
