"""Links inside one process, with the delays and faults of real ones: for tests and simulations.

A `MemoryNet` holds named nodes. Bytes between two of them take the time that a `Wire` says, on the clock of the running
event loop, so that the same program runs in real and in virtual time. What happens to a wire is what happens to a TCP
connection: order is kept, nothing is lost from a stream; a partition holds bytes back until it heals, and only who
waits too long gives up; a cut resets the connections; a node that is killed resets all of its own and refuses new ones;
a frozen one (SIGSTOP, a machine that sleeps) keeps its connections and neither hears nor says anything.

Faults are called by name, or drawn beforehand from a seed (`draw_faults`) and played.
"""

import asyncio
import contextvars
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np

from plait.errors import BadSetup, PeerLost
from plait.ids import PeerId
from plait.transport.link import Link

_HIGH_BYTES = 1 << 16  # asyncio's marks for back-pressure
_LOW_BYTES = 1 << 14
_WINDOW_BYTES = 4 << 20  # the most that a kernel takes off a sender's hands, beyond what fills the wire
_RESET = ConnectionResetError("connection reset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One direction between two nodes; each write is late by up to `jitter_s` more, drawn from the net's seed."""

    delay_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    jitter_s: float = 0.0


FaultKind = Literal["cut", "partition", "freeze", "kill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """From `start_s` (of the clock of `MemoryNet.play`) for `duration_s`, which is nothing for a cut or a kill.

    `nodes`: the two ends of a cut; the nodes that a partition separates from all others; who is frozen or killed.
    """

    kind: FaultKind
    nodes: tuple[str, ...]
    start_s: float
    duration_s: float = 0.0


def draw_faults(
    rng: np.random.Generator,
    nodes: Sequence[str],
    *,
    until_s: float,
    mean_gap_s: float,
    mean_duration_s: float,
    kinds: Sequence[FaultKind] = ("cut", "partition", "freeze"),
) -> tuple[Fault, ...]:
    """Faults at the times of a Poisson process, each of a kind, nodes and an exponential duration drawn alike."""
    faults: list[Fault] = []
    start_s = float(rng.exponential(mean_gap_s))
    while start_s < until_s:
        kind = kinds[int(rng.integers(len(kinds)))]
        order = [nodes[int(index)] for index in rng.permutation(len(nodes))]
        match kind:
            case "cut":
                chosen = order[:2]
            case "partition":
                chosen = order[: 1 + int(rng.integers(max(1, len(nodes) // 2)))]
            case "freeze" | "kill":
                chosen = order[:1]
        lasting = kind in {"partition", "freeze"}
        duration_s = float(rng.exponential(mean_duration_s)) if lasting else 0.0
        faults.append(Fault(kind=kind, nodes=tuple(chosen), start_s=start_s, duration_s=duration_s))
        start_s += float(rng.exponential(mean_gap_s))
    return tuple(faults)


class MemoryNet:
    """Nodes and the wires between them; wires are set for ordered pairs, all others are `default`."""

    def __init__(self, default: Wire = Wire(), *, seed: int = 0) -> None:
        self._default = default
        self._wires: dict[tuple[str, str], Wire] = {}
        self._rng = np.random.default_rng(seed)
        self._listening: dict[str, tuple[str, Callable[[Link], None]]] = {}
        self._transports: list[MemoryTransport] = []
        self._frozen: dict[str, int] = {}
        self._partitions: list[frozenset[str]] = []
        self._muted: list[str] = []
        self._killed: set[str] = set()
        self._changed = asyncio.Event()
        self.context = contextvars.copy_context()
        """Of what happens on the wires: it is nobody's doing, and goes on if who wrote the bytes is gone."""

    def carrier(self, node: str) -> "MemoryCarrier":
        """What one node dials and listens with."""
        return MemoryCarrier(self, node)

    def set_wire(self, near: str, far: str, wire: Wire) -> None:
        """Both directions between two nodes."""
        self._wires[near, far] = self._wires[far, near] = wire

    def cut(self, near: str, far: str) -> None:
        """Reset all connections between two nodes; new ones can be made."""
        for transport in list(self._transports):
            if (transport.near, transport.far) == (near, far):
                transport.reset()

    def partition(self, nodes: Iterable[str]) -> None:
        """Hold back everything between these nodes and all others, until `heal`."""
        self._partitions.append(frozenset(nodes))

    def heal(self, nodes: Iterable[str]) -> None:
        """End a partition of these nodes."""
        self._partitions.remove(frozenset(nodes))
        self._release()

    def mute(self, node: str) -> None:
        """Hold back everything that a node sends, until `unmute`; what others send to it arrives."""
        self._muted.append(node)

    def unmute(self, node: str) -> None:
        self._muted.remove(node)
        self._release()

    def freeze(self, node: str) -> None:
        """Hold back everything to and from a node, until `thaw`. (Its own timers go on, which a real one's do not.)"""
        self._frozen[node] = self._frozen.get(node, 0) + 1

    def thaw(self, node: str) -> None:
        self._frozen[node] -= 1
        self._release()

    def kill(self, node: str) -> None:
        """Reset all connections of a node, and let it neither dial nor listen until `revive`."""
        self._killed.add(node)
        for address in [address for address, (owner, _) in self._listening.items() if owner == node]:
            del self._listening[address]
        for transport in list(self._transports):
            if transport.near == node:
                transport.reset()
        self._release()

    def revive(self, node: str) -> None:
        self._killed.discard(node)

    def play(self, faults: Sequence[Fault]) -> None:
        """Let these faults happen, from now on."""
        loop = asyncio.get_running_loop()
        for fault in faults:
            loop.call_later(fault.start_s, self._begin, fault, context=self.context)

    def blocked(self, near: str, far: str) -> bool:
        return (
            near in self._muted
            or bool(self._frozen.get(near) or self._frozen.get(far))
            or any((near in side) != (far in side) for side in self._partitions)
        )  # fmt: skip

    def wire(self, near: str, far: str) -> Wire:
        return self._wires.get((near, far), self._default)

    def jitter_s(self, wire: Wire) -> float:
        return float(self._rng.uniform(0, wire.jitter_s)) if wire.jitter_s else 0.0

    def _begin(self, fault: Fault) -> None:
        loop = asyncio.get_running_loop()
        match fault.kind:
            case "cut":
                self.cut(*fault.nodes)
            case "kill":
                self.kill(*fault.nodes)
            case "partition":
                self.partition(fault.nodes)
                loop.call_later(fault.duration_s, self.heal, fault.nodes)
            case "freeze":
                self.freeze(*fault.nodes)
                loop.call_later(fault.duration_s, self.thaw, fault.nodes[0])
            case _:
                assert_never(fault.kind)

    def _release(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for transport in list(self._transports):
            transport.deliver()

    # -- for carriers and transports -------------------------------------------------------------------------

    def listen(self, node: str, address: str, accept: Callable[[Link], None]) -> None:
        if address in self._listening:
            raise BadSetup(f"cannot listen at {address}: it is taken")
        if node in self._killed:
            raise BadSetup(f"cannot listen at {address}: node {node!r} was killed")
        own = contextvars.copy_context()  # what comes of a link belongs to who listens, not to who dials
        self._listening[address] = (node, lambda link: own.copy().run(accept, link))

    def stop_listening(self, address: str) -> None:
        self._listening.pop(address, None)

    async def connect(self, node: str, address: str) -> Link:
        if node in self._killed:
            raise PeerLost(f"{address} cannot be reached: node {node!r} was killed")
        far = self._listening[address][0] if address in self._listening else ""
        while far and self.blocked(node, far):
            await self._changed.wait()
        await asyncio.sleep(self.wire(node, far).delay_s + self.wire(far, node).delay_s)
        if address not in self._listening or node in self._killed:
            raise PeerLost(f"{address} cannot be reached: connection refused")
        far, accept = self._listening[address]
        link, accepted = Link(address), Link(f"mem://{node}")
        near_end, far_end = MemoryTransport(self, node, far, link), MemoryTransport(self, far, node, accepted)
        near_end.other, far_end.other = far_end, near_end
        self._transports += [near_end, far_end]
        accept(accepted)
        accepted.connection_made(far_end)
        link.connection_made(near_end)
        return link

    def forget(self, transport: "MemoryTransport") -> None:
        if transport in self._transports:
            self._transports.remove(transport)


class MemoryCarrier:
    """`mem://name`."""

    def __init__(self, net: MemoryNet, node: str) -> None:
        self._net = net
        self._node = node

    async def listen(self, address: str, accept: Callable[[Link], None]) -> "MemoryListener":
        self._net.listen(self._node, address, accept)
        return MemoryListener(self._net, address)

    async def dial(self, address: str, *, peer: PeerId, timeout_s: float) -> Link:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._net.connect(self._node, address)
        except TimeoutError:
            raise PeerLost(f"{address} does not answer within {timeout_s:g} s") from None


class MemoryListener:
    def __init__(self, net: MemoryNet, address: str) -> None:
        self.address = address
        self._net = net

    async def close(self) -> None:
        self._net.stop_listening(self.address)


_END = b""  # in a queue of bytes: the sender has closed


class MemoryTransport(asyncio.Transport):
    """One end of a connection; it holds the bytes that are on their way to the other end."""

    other: "MemoryTransport"

    def __init__(self, net: MemoryNet, near: str, far: str, protocol: Link) -> None:
        super().__init__()
        self.near, self.far = near, far
        self._net = net
        self._protocol = protocol
        self._queue: deque[tuple[float, bytes]] = deque()  # when each arrives
        self._queued_bytes = 0
        self._free_s = 0.0  # when all of it will be on the wire
        self._last_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._writing_paused = self._reading_paused = False
        self._closing = False
        self._lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        self._put(bytes(data))
        if self.get_write_buffer_size() > _HIGH_BYTES and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        wire = self._net.wire(self.near, self.far)
        filling_bytes = wire.bandwidth_bytes_per_s * wire.delay_s if wire.delay_s else 0.0
        return max(0, self._queued_bytes - int(min(filling_bytes + _HIGH_BYTES, _WINDOW_BYTES)))

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        asyncio.get_running_loop().call_soon(self.other.deliver, context=self._net.context)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._put(_END)

    def abort(self) -> None:
        if not self._lost:
            self._closing = True
            self._put(_END)
            self._lose(None)

    def reset(self) -> None:
        """The connection breaks: both ends hear of it as soon as they can."""
        if not self._lost:
            self._closing = True
            self._queue.clear()
            self._put(_END)
            self._lose(_RESET)

    def deliver(self) -> None:
        """Hand over what has arrived, if the other end can take it; look again when the next bytes arrive."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        receiver = self.other
        while self._queue and not receiver._reading_paused and not self._net.blocked(self.near, self.far):
            arrival_s, data = self._queue[0]
            if arrival_s > loop.time():
                self._timer = loop.call_at(arrival_s, self.deliver, context=self._net.context)
                break
            self._queue.popleft()
            self._queued_bytes -= len(data)
            receiver._take(data)
            if data == _END and not self._lost:
                self._lose(None)
        if self._lost and not self._queue:
            self._net.forget(self)
        if self._writing_paused and not self._lost and self.get_write_buffer_size() <= _LOW_BYTES:
            self._writing_paused = False
            self._protocol.resume_writing()

    def _put(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        wire = self._net.wire(self.near, self.far)
        self._free_s = max(loop.time(), self._free_s) + len(data) / wire.bandwidth_bytes_per_s
        self._last_s = max(self._free_s + wire.delay_s + self._net.jitter_s(wire), self._last_s)
        self._queue.append((self._last_s, data))
        self._queued_bytes += len(data)
        if len(self._queue) == 1:
            self._timer = loop.call_at(self._last_s, self.deliver, context=self._net.context)

    def _take(self, data: bytes) -> None:
        if self._lost:
            return
        if data == _END:
            self._closing = True
            self._lose(None)
            return
        view = memoryview(data)
        while view and not self._lost:
            buffer = self._protocol.get_buffer(len(view))
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            view = view[count:]
            self._protocol.buffer_updated(count)

    def _lose(self, error: Exception | None) -> None:
        self._lost = True
        if not self._queue:
            self._net.forget(self)
        # What is on its way to the other end still arrives there; nothing arrives here any more.
        loop = asyncio.get_running_loop()
        loop.call_soon(self._protocol.connection_lost, error, context=self._net.context)
