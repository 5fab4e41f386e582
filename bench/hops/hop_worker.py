"""One machine of the measured swarm, in a process of its own: what `plait join` runs, and clocks to read.

Every line on standard input is answered with the clocks as they stand; its end is the end of the process.
"""

import asyncio
import hashlib
import json
import resource
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

import plait.transport.connection
import plait.transport.network
import plait.worker.span_worker
from hops.part_clock import PartClock
from plait.cluster import PeerRates
from plait.engine import EngineOptions, SpanInputs, Wishes
from plait.engine.native import NativeDecoder
from plait.engine.span_engine import SpanEngine
from plait.scheduling import Scheduler
from plait.session import HopSession
from plait.transport import Identity, SwarmSecret, TicketPeer, TlsCarrier
from plait.transport.connection import Connection
from plait.transport.link import Link
from plait.transport.network import Network
from plait.transport.tls import TlsTransport
from plait.worker import Member, MemberOptions, SpanLimits, SpanSource, SwarmNode, source_of_folder
from plait.worker.measure import KeptRates

SECRET = SwarmSecret(bytes(range(32)))
ARITHMETIC = "arithmetic"
MEMORY_BYTES = 1 << 30
CONTEXT_TOKENS = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a worker is told: where its model is, what to serve, whom to ask, and whether to time the parts."""

    name: str
    folder: str
    first_block: int
    end_block: int
    introducer: str
    address: str
    parts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """Seconds of CPU of the whole process and of the model's arithmetic in it; the latter's wall time too."""

    process_s: float
    arithmetic_s: float
    arithmetic_wall_s: float
    clock_s: float
    switches: int
    parts_s: dict[str, float]

    def since(self, before: "Clocks") -> "Clocks":
        return Clocks(
            process_s=self.process_s - before.process_s,
            arithmetic_s=self.arithmetic_s - before.arithmetic_s,
            arithmetic_wall_s=self.arithmetic_wall_s - before.arithmetic_wall_s,
            clock_s=self.clock_s - before.clock_s,
            switches=self.switches - before.switches,
            parts_s={part: s - before.parts_s.get(part, 0.0) for part, s in self.parts_s.items()},
        )


class TimedKernels:
    """The native decoder behind a clock: what is subtracted is the time inside the native call and nothing else."""

    def __init__(self, inner: Any, clock: PartClock | None) -> None:
        self._inner = inner
        self._run = inner.forward if clock is None else clock.timed(ARITHMETIC, inner.forward)
        self.cpu_s = self.wall_s = 0.0

    def forward(self, **arguments: Any) -> None:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        self._run(**arguments)
        self.cpu_s += time.thread_time() - cpu_s
        self.wall_s += time.perf_counter() - wall_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def identity_of(name: str) -> Identity:
    return Identity.from_seed(hashlib.sha256(name.encode()).digest())


def make_node(name: str, introducers: tuple[TicketPeer, ...] = ()) -> SwarmNode:
    identity = identity_of(name)
    return SwarmNode(
        identity,
        secret=SECRET,
        carriers={"tls": TlsCarrier(identity, SECRET)},
        listen=["tls://127.0.0.1:0"],
        introducers=introducers,
        rng=np.random.default_rng(),
    )


def make_source(folder: str) -> SpanSource:
    """One thread computes: then the thread's clock is that of the arithmetic."""
    kept = KeptRates(Path(folder))
    source = source_of_folder(
        folder,
        EngineOptions(folder=Path(folder), threads=1, packed_cache=False),
        Wishes(dtype="bfloat16"),
        SpanLimits(memory_bytes=MEMORY_BYTES, context_tokens=CONTEXT_TOKENS),
        kept_rates=kept,
    )
    if kept.find(source.measured_on) is None:  # which chain is taken does not matter here: there is only one
        kept.keep(source.measured_on, PeerRates(decode_tokens_per_s=1000, prefill_tokens_per_s=1000))
    return source


def watch_parts(clock: PartClock) -> None:
    """Which functions make up which part."""
    connection, network = plait.transport.connection, plait.transport.network
    worker = plait.worker.span_worker
    for part, owner, name in (
        ("receive: TLS, frames", TlsTransport, "buffer_updated"),
        ("receive: messages", connection, "decode_message"),
        ("receive: hidden states", worker, "decode_hidden"),
        ("session's state", HopSession, "on_step"),
        ("session's state", HopSession, "on_tokens"),
        ("session's state", HopSession, "on_output"),
        ("acknowledgements", HopSession, "on_taken"),
        ("acknowledgements", Connection, "_credited"),
        ("build inputs", SpanEngine, "feed"),
        ("build inputs", SpanEngine, "_prepare"),
        ("build inputs", SpanInputs, "read"),
        ("build inputs", NativeDecoder, "_forward"),
        ("plan", Scheduler, "schedule"),
        ("plan", Scheduler, "complete"),
        ("take outputs", SpanEngine, "_take"),
        ("send: hidden states", worker, "encode_hidden"),
        ("send: messages, frames", Network, "try_send"),
        ("send: messages, frames", network, "encode_message"),
        ("send: messages, frames", Link, "write"),
        ("send: TLS", TlsTransport, "write"),
    ):
        clock.watch(part, owner, name)


async def serve(place: Place) -> None:
    clock = PartClock() if place.parts else None
    if clock is not None:
        watch_parts(clock)
    async with AsyncExitStack() as stack:
        node = make_node(place.name, (TicketPeer(identity_of(place.introducer).peer, (place.address,)),))
        await stack.enter_async_context(node)
        blocks = range(place.first_block, place.end_block)
        member = Member(
            node,
            make_source(place.folder),
            MemberOptions(name=place.name, blocks=blocks, rebalances=False),
        )
        await stack.enter_async_context(member)
        await member.wait_settled()
        assert member.worker is not None, member.failure
        decoder: Any = member.worker.engine.decoder
        kernels = decoder._decoder = TimedKernels(decoder._decoder, clock)
        print(json.dumps({"peer": node.peer}), flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while await reader.readline():
            used = resource.getrusage(resource.RUSAGE_SELF)
            clocks = Clocks(
                process_s=time.process_time(),
                arithmetic_s=kernels.cpu_s,
                arithmetic_wall_s=kernels.wall_s,
                clock_s=0.0 if clock is None else clock.own_s,
                switches=used.ru_nvcsw,
                parts_s={} if clock is None else clock.read(),
            )
            print(json.dumps(asdict(clocks)), flush=True)


def main() -> None:
    place = Place(**json.loads(sys.argv[1]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop of `plait join`
        runner.run(serve(place))


if __name__ == "__main__":
    main()
