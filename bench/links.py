"""What a message costs between two machines: round trip, throughput and CPU, over each carrier, on loopback.

Two processes on uvloop, the loop of `plait serve`: one asks, the other sends everything back. A message is a `Step` of
a session with one tensor: 8 KiB is the hidden state of one token of a 4096-wide model in bfloat16, 4 MiB a prompt's
chunk of 512. Three layers are measured:

    stream    the event loop's own TCP and TLS, 8 KiB there and back: what any program on this loop pays
    link      frames over a carrier (transport/link.py)
    network   the whole layer that workers use (transport/network.py): messages, credits, heartbeats; "splice" is a link
              that a third process carries

CPU per echo is that of the asking and the answering process together, each by its own clock, so that it holds on a busy
machine, where the times do not.

iroh is an extra, and is measured where it is installed.

    python bench/links.py [--seconds 1] [--repeats 5]         about 3 minutes on two cores
"""

import argparse
import asyncio
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import uvloop
from results import Figure, write_result

from plait.errors import PeerLost
from plait.ids import PeerId, SessionId
from plait.transport import (
    Carrier,
    Identity,
    IrohCarrier,
    Link,
    Network,
    NetworkLimits,
    SwarmSecret,
    TcpCarrier,
    TlsCarrier,
    UnixCarrier,
)
from plait.transport.tls import TlsContexts
from plait.wire import Message, Step, encode_message

SECRET = SwarmSecret(bytes(range(32)))
NEAR, FAR, MIDDLE = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2, 3))
LIMITS = NetworkLimits()
STEP = Step(SessionId("ab" * 16), 1, 1, 100, (1234,), 1, 0)
SMALL_BYTES, LARGE_BYTES = 8 << 10, 4 << 20
IN_FLIGHT = 4
"""Large messages on their way at a time when throughput is measured."""
LAYERS = ("stream", "link", "network")
IROH = () if find_spec("iroh") is None else ("iroh",)
KINDS = {
    "stream": ("tcp", "tls"),
    "link": ("unix", "tcp", "tls", *IROH),
    "network": ("unix", "tcp", "tls", "splice", *IROH),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measurement: echoes of one size over one way, one after the other or several in flight."""

    layer: str
    kind: str
    payload_bytes: int
    in_flight: int
    repeat: int
    echoes: int
    seconds: float
    near_cpu_s: float
    far_cpu_s: float
    round_trips_us: tuple[float, ...]
    """Median, 99th percentile, of those one after the other."""

    @property
    def cpu_us_per_echo(self) -> float:
        return (self.near_cpu_s + self.far_cpu_s) / self.echoes * 1e6

    @property
    def gib_per_s(self) -> float:
        """In one direction; the same comes back."""
        return self.payload_bytes * self.echoes / self.seconds / 2**30


# -- the answering side, a process of its own -----------------------------------------------------------------


class StreamEcho(asyncio.BufferedProtocol):
    """Sends back whatever comes, with no frames at all."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(1 << 18))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._transport.write(bytes(self._buffer[:nbytes]))


def carrier(kind: str, owner: Identity) -> Carrier:
    match kind:
        case "unix":
            return UnixCarrier()
        case "tcp":
            return TcpCarrier()
        case "iroh":
            return IrohCarrier(owner, SECRET)
        case _:
            return TlsCarrier(owner, SECRET)


def address_of(kind: str, folder: str, owner: str) -> str:
    return f"unix://{folder}/{owner}" if kind == "unix" else f"{kind}://127.0.0.1:0"


async def answer(layer: str, kind: str, folder: str, middle: str) -> None:
    """Serve echoes until standard input ends; prints the address, then the CPU time so far for every line."""
    async with AsyncExitStack() as stack:
        match layer:
            case "stream":
                context = own_tls_context(FAR, server=True) if kind == "tls" else None
                loop = asyncio.get_running_loop()
                server = await loop.create_server(StreamEcho, "127.0.0.1", 0, ssl=context)
                address = f"{kind}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            case "link":
                tasks: set[asyncio.Task[None]] = set()

                def accept(link: Link) -> None:
                    link.limits = LIMITS.frames  # at once: the asker does not wait to be let in
                    tasks.add(asyncio.ensure_future(echo_link(link)))

                listener = await carrier(kind, FAR).listen(address_of(kind, folder, "far"), accept)
                address = listener.address
            case _:
                owner = MIDDLE if kind == "middle" else FAR
                address = await stack.enter_async_context(EchoNetwork(owner, kind, folder, middle))
        print(address, flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while await reader.readline():
            print(time.process_time(), flush=True)


async def echo_link(link: Link) -> None:
    with suppress(PeerLost):  # the asker closes it
        await link.opened()
        while True:
            frame = await link.recv()
            await link.send(frame.header, frame.buffers)


class EchoNetwork:
    """A member that sends every message back; entering it gives the address to dial, if it can be dialled."""

    def __init__(self, owner: Identity, kind: str, folder: str, middle: str) -> None:
        self._middle = middle
        self._kind = "tcp" if kind in {"splice", "middle"} else kind
        self._listens = not middle
        self._name = "middle" if owner is MIDDLE else "far"
        self._folder = folder
        self.network = Network(
            owner, secret=SECRET, carriers={self._kind: carrier(self._kind, owner)}, limits=LIMITS
        )
        self.network.on_message = self._on_message
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        await self.network.__aenter__()
        if self._listens:
            return await self.network.listen(address_of(self._kind, self._folder, self._name))
        self.network.learn(MIDDLE.peer, [self._middle])
        await self.network.connect(MIDDLE.peer)
        return "splice"

    async def __aexit__(self, *raised: object) -> None:
        await self.network.__aexit__(None, None, None)

    def _on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        task = asyncio.ensure_future(self.network.send(peer, message, tensors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Answerer:
    """The other process."""

    def __init__(self, layer: str, kind: str, folder: str, *, middle: str = "") -> None:
        self._command = [sys.executable, __file__, "--answer", layer, kind, folder, middle]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.address = self._read()
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.communicate(timeout=30)

    def cpu_s(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the answering process has ended")
        return line


# -- the asking side ------------------------------------------------------------------------------------------

Echo = Callable[[bytes], Awaitable[None]]
"""Sends a tensor and waits until it is back; several may run at a time."""


class StreamAsker(asyncio.BufferedProtocol):
    """Counts bytes: an echo is back when as many have come."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(1 << 18))
        self._missing = 0
        self._back: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._missing -= nbytes
        if self._missing == 0 and self._back is not None:
            self._back.set_result(None)

    async def echo(self, tensor: bytes) -> None:
        self._missing += len(tensor)
        self._back = asyncio.get_running_loop().create_future()
        self._transport.write(tensor)
        await self._back


async def asker(layer: str, kind: str, address: str, middle: str, stack: AsyncExitStack) -> Echo:
    loop = asyncio.get_running_loop()
    match layer:
        case "stream":
            port = int(address.rpartition(":")[2])
            context = own_tls_context(NEAR, server=False) if kind == "tls" else None
            _, stream = await loop.create_connection(StreamAsker, "127.0.0.1", port, ssl=context)
            return stream.echo
        case "link":
            link = await carrier(kind, NEAR).dial(address, peer=FAR.peer, timeout_s=10)
            link.limits = LIMITS.frames
            stack.push_async_callback(link.close)
            header = encode_message(STEP)

            async def over_link(tensor: bytes) -> None:
                await link.send(header, [tensor])
                await link.recv()

            return over_link
        case _:
            scheme = "tcp" if kind == "splice" else kind
            network = Network(NEAR, secret=SECRET, carriers={scheme: carrier(scheme, NEAR)}, limits=LIMITS)
            waiting: list[asyncio.Future[None]] = []
            network.on_message = lambda peer, message, tensors: waiting.pop(0).set_result(None)
            await stack.enter_async_context(network)
            if kind == "splice":
                network.learn(MIDDLE.peer, [middle])
                network.learn(FAR.peer, [], through=[MIDDLE.peer])
            else:
                network.learn(FAR.peer, [address])
            await network.connect(FAR.peer)

            async def over_network(tensor: bytes) -> None:
                back = loop.create_future()
                waiting.append(back)
                await network.send(FAR.peer, STEP, [tensor])
                await back

            return over_network


def own_tls_context(owner: Identity, *, server: bool) -> ssl.SSLContext:
    contexts = TlsContexts(owner, SECRET.door)
    return contexts._accepting if server else contexts._dialling


async def measure(
    echo: Echo, far: Answerer, payload_bytes: int, in_flight: int, seconds: float
) -> dict[str, Any]:
    tensor = os.urandom(payload_bytes)
    for _ in range(3):
        await echo(tensor)
    round_trips_s: list[float] = []
    end_s = 0.0

    async def ask() -> None:
        while (start_s := time.perf_counter()) < end_s:
            await echo(tensor)
            round_trips_s.append(time.perf_counter() - start_s)

    far_before_s, near_before_s, start_s = far.cpu_s(), time.process_time(), time.perf_counter()
    end_s = start_s + seconds
    await asyncio.gather(*(ask() for _ in range(in_flight)))
    taken_s = time.perf_counter() - start_s
    near_cpu_s = time.process_time() - near_before_s
    quantiles = np.quantile(round_trips_s, (0.5, 0.99)) * 1e6
    return {
        "echoes": len(round_trips_s),
        "seconds": taken_s,
        "near_cpu_s": near_cpu_s,
        "far_cpu_s": far.cpu_s() - far_before_s,
        "round_trips_us": tuple(float(value) for value in quantiles),
    }


async def run_way(layer: str, kind: str, repeat: int, seconds: float) -> list[Run]:
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            middle = ""
            if kind == "splice":
                middle = stack.enter_context(Answerer("network", "middle", folder)).address
            far = stack.enter_context(Answerer(layer, kind, folder, middle=middle))
            async with AsyncExitStack() as asking:
                echo = await asker(layer, kind, far.address, middle, asking)
                cases = [(SMALL_BYTES, 1)]
                if layer != "stream":
                    cases += [(LARGE_BYTES, 1)]
                if layer == "network":
                    cases += [(LARGE_BYTES, IN_FLIGHT)]
                for payload_bytes, in_flight in cases:
                    measured = await measure(echo, far, payload_bytes, in_flight, seconds)
                    runs.append(
                        Run(
                            layer=layer,
                            kind=kind,
                            payload_bytes=payload_bytes,
                            in_flight=in_flight,
                            repeat=repeat,
                            **measured,
                        )
                    )
    return runs


def summary_of(runs: list[Run]) -> dict[str, Any]:
    ways: dict[str, list[Run]] = {}
    for run in runs:
        flight = f", {run.in_flight} in flight" if run.in_flight > 1 else ""
        name = f"{run.layer} {run.kind}, {run.payload_bytes >> 10} KiB{flight}"
        ways.setdefault(name, []).append(run)
    summary: dict[str, Any] = {}
    for name, of_way in ways.items():
        cpu_us = [run.cpu_us_per_echo for run in of_way]
        summary[name] = {
            "round trip us: median, 99 %": [
                round(statistics.median(run.round_trips_us[index] for run in of_way), 1) for index in (0, 1)
            ],
            "CPU us per echo, both ends: median, least, most": [
                round(value, 1) for value in (statistics.median(cpu_us), min(cpu_us), max(cpu_us))
            ],
            "GiB/s each way": round(statistics.median(run.gib_per_s for run in of_way), 3),
        }
    return summary


def figures_of(runs: list[Run]) -> list[Figure]:
    figures: list[Figure] = []
    for payload_bytes in (SMALL_BYTES, LARGE_BYTES):
        figure = Figure(
            f"{payload_bytes >> 10} KiB there and back", "repeat", "CPU us, both ends", log_y=True
        )
        chosen = [run for run in runs if (run.payload_bytes, run.in_flight) == (payload_bytes, 1)]
        for layer, kind in dict.fromkeys((run.layer, run.kind) for run in chosen):
            of_way = [run for run in chosen if (run.layer, run.kind) == (layer, kind)]
            figure.add_line(
                f"{layer} {kind}", [run.repeat for run in of_way], [run.cpu_us_per_echo for run in of_way]
            )
        figures.append(figure)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size, way and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="links", help="of the result; links_iroh where iroh is installed")
    parser.add_argument("--dry", action="store_true", help="print the summary, write nothing")
    parser.add_argument("--answer", nargs=4, metavar=("LAYER", "KIND", "FOLDER", "MIDDLE"))
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.answer:
            layer, kind, folder, middle = arguments.answer
            runner.run(answer(layer, kind, folder, middle))
            return
        runs = [
            run
            for repeat in range(arguments.repeats)
            for layer in LAYERS
            for kind in KINDS[layer]
            for run in runner.run(run_way(layer, kind, repeat, arguments.seconds))
        ]
    summary = summary_of(runs)
    if arguments.dry:
        for name, figures in summary.items():
            print(name, figures)
        return
    write_result(
        arguments.name,
        settings={"seconds": arguments.seconds, "repeats": arguments.repeats, "in_flight": IN_FLIGHT},
        samples=[asdict(run) for run in runs],
        summary=summary,
        figures=figures_of(runs),
    )


if __name__ == "__main__":
    main()
