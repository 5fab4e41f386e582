"""Two machines and a way between them, for each kind of carrier and event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import uvloop

from plait.ids import PeerId, SessionId
from plait.simulator import run_virtual
from plait.transport import (
    Carrier,
    Identity,
    IrohCarrier,
    Link,
    MemoryNet,
    Network,
    NetworkLimits,
    SwarmSecret,
    TcpCarrier,
    TicketSecret,
    TlsCarrier,
    UnixCarrier,
)
from plait.transport.connection import Connection
from plait.wire import CloseSession, FrameLimits, Message

_NO_IROH = pytest.mark.skipif(
    find_spec("iroh") is None, reason="iroh is not installed: pip install 'plait[iroh]'"
)
KINDS = (
    *("memory", "unix", "tcp", "tls", "uvloop unix", "uvloop tcp", "uvloop tls"),
    *(pytest.param(kind, marks=_NO_IROH) for kind in ("iroh", "uvloop iroh")),
)
WAIT_S = 60.0
UNIX_NOW_S = 1_800_000_000.0
QUICK = NetworkLimits(
    heartbeat_s=0.2, dead_after_s=0.6, backoff_s=0.02, longest_backoff_s=0.2, stagger_s=0.05
)
MESSAGE = CloseSession(SessionId("ab" * 16), 1)
LIMITS = FrameLimits(max_header_bytes=1 << 16, max_buffers=8, max_bytes=16 << 20)
SECRET = SwarmSecret(bytes(range(32)))


def identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


class Rig:
    """`near` dials `far`; each has an identity, and a carrier for the address at which `far` listens."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.loop, _, self.kind = kind.rpartition(" ")
        self.near, self.far = identity(1), identity(2)
        self.net = MemoryNet()
        match self.kind:
            case "memory":
                self.address = "mem://far"
            case "unix":
                self.address = f"unix://{folder}/far"
            case _:
                self.address = f"{self.kind}://127.0.0.1:0"

    def run(self, work: Coroutine[Any, Any, object]) -> None:
        """Over memory in virtual time, otherwise in real time."""
        if self.kind == "memory":
            run_virtual(work)
        elif self.loop == "uvloop":
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(work)
        else:
            asyncio.run(work)

    def carrier(self, owner: Identity) -> Carrier:
        match self.kind:
            case "memory":
                return self.net.carrier("near" if owner is self.near else "far")
            case "unix":
                return UnixCarrier()
            case "tcp":
                return TcpCarrier()
            case "iroh":
                return IrohCarrier(owner, SECRET)
            case _:
                return TlsCarrier(owner, SECRET)

    @asynccontextmanager
    async def links(self, *, limits: FrameLimits = LIMITS) -> AsyncIterator[tuple[Link, Link]]:
        """An open link: the end that dialled, the end that accepted."""
        accepted: asyncio.Queue[Link] = asyncio.Queue()
        listener = await self.carrier(self.far).listen(self.address, accepted.put_nowait)
        try:
            dialled = await self.carrier(self.near).dial(listener.address, peer=self.far.peer, timeout_s=10)
            taken = await accepted.get()
            await taken.opened()
            dialled.limits = taken.limits = limits
            yield dialled, taken
            await dialled.close()
            await taken.close()
        finally:
            await listener.close()

    @asynccontextmanager
    async def members(self, limits: NetworkLimits = QUICK) -> AsyncIterator[tuple["Member", "Member"]]:
        """Two networks; the near one knows where the far one listens."""
        scheme = self.address.partition("://")[0]
        near = Member(self.near, {scheme: self.carrier(self.near)}, limits=limits)
        far = Member(self.far, {scheme: self.carrier(self.far)}, limits=limits)
        async with near.network, far.network:
            near.network.learn(far.peer, [await far.network.listen(self.address)])
            yield near, far


class Member:
    """A network that writes down what it hears."""

    def __init__(
        self,
        owner: Identity,
        carriers: Mapping[str, Carrier],
        *,
        secret: SwarmSecret | TicketSecret = SECRET,
        limits: NetworkLimits = QUICK,
        unix_now: Callable[[], float] = lambda: UNIX_NOW_S,
    ) -> None:
        self.identity = owner
        self.network = Network(owner, secret=secret, carriers=carriers, limits=limits, unix_now=unix_now)
        self.network.on_message = self._on_message
        self.network.on_lost = lambda peer, reason: self.lost.append((peer, reason))
        self.network.on_linked = lambda peer: self.linked.append(peer)
        self.heard: list[tuple[PeerId, Message, tuple[bytes, ...]]] = []
        self.lost: list[tuple[PeerId, str]] = []
        self.linked: list[PeerId] = []
        self._news = asyncio.Event()

    @property
    def peer(self) -> PeerId:
        return self.network.peer

    @property
    def numbers(self) -> list[int]:
        """The numbers of the messages that `tell` sent here."""
        return [int(tensors[0]) for _, _, tensors in self.heard]

    async def tell(self, other: "Member", number: int, *, padding_bytes: int = 0) -> None:
        await self.network.send(other.peer, MESSAGE, [str(number).encode(), bytes(padding_bytes)])

    async def hears(self, count: int) -> None:
        """Wait until so many messages have come in all."""
        async with asyncio.timeout(WAIT_S):
            while len(self.heard) < count:
                self._news.clear()
                await self._news.wait()

    def connection(self, other: "Member") -> Connection:
        known = self.network._peers[other.peer]
        assert known.connection is not None
        return known.connection

    def _on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        self.heard.append((peer, message, tuple(map(bytes, tensors))))
        self._news.set()


async def until(true: Callable[[], object]) -> None:
    """Wait for something that happens by itself."""
    async with asyncio.timeout(WAIT_S):
        while not true():
            await asyncio.sleep(0.01)


class SplicedRig:
    """`near` reaches `far` only through `middle`, which `far` keeps a link to; over memory, in virtual time."""

    kind = "splice"

    def __init__(self) -> None:
        self.net = MemoryNet()

    def run(self, work: Coroutine[Any, Any, object]) -> None:
        run_virtual(work)

    @asynccontextmanager
    async def members(self, limits: NetworkLimits = QUICK) -> AsyncIterator[tuple[Member, Member]]:
        async with self.three(limits) as (near, far, _):
            yield near, far

    @asynccontextmanager
    async def three(self, limits: NetworkLimits = QUICK) -> AsyncIterator[tuple[Member, Member, Member]]:
        near, far, middle = (
            Member(identity(number), {"mem": self.net.carrier(name)}, limits=limits)
            for number, name in ((1, "near"), (2, "far"), (3, "middle"))
        )
        async with middle.network, near.network, far.network:
            await middle.network.listen("mem://middle")
            far.network.learn(middle.peer, ["mem://middle"])
            far.network.keep(middle.peer)
            await far.network.connect(middle.peer)
            near.network.learn(middle.peer, ["mem://middle"])
            near.network.learn(far.peer, [], through=[middle.peer])
            yield near, far, middle


def make_rig(kind: str, folder: Path) -> "Rig | SplicedRig":
    return SplicedRig() if kind == "splice" else Rig(kind, folder)
