"""An HTTP server from socket to graceful end: what `serve`, `demo` and `chat` stand on.

The socket is taken before anything is loaded, so a busy port is known at once and clients that come early
get a 503 with progress. A stop drains: new requests are refused, running ones go on until the deadline,
then they end with an error that says so.
"""

import asyncio
import ipaddress
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from plait.cli.terminal import bytes_bar, note
from plait.errors import BadSetup, EngineFailure, ServingError
from plait.settings import Settings
from plait.units import format_s

if TYPE_CHECKING:
    from fastapi import FastAPI

    from plait.worker import AsyncEngine, SwarmEngine, SwarmGateway

# How often the progress of loading is looked at.
LOOK_S = 0.1
# Answers that have ended still have bytes to send.
LAST_BYTES_S = 2
# Programs that wrap others (timeout, package runners) pass on a Ctrl-C that the terminal has sent already.
SAME_SIGNAL_S = 0.3
# Connections the kernel holds for us while the event loop is busy.
BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket and the address that clients on this machine use for it."""

    socket: socket.socket
    origin: str

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"


def listen(host: str, port: int) -> Listener:
    """Take a port; 0 takes any free one.

    Raises:
        BadSetup: the address is not of this machine, or the port is taken or forbidden.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise BadSetup(f"--host {host!r} is not an address of this machine: {error.strerror}") from error
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise BadSetup(
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "stop what uses it, or choose another with --port (0 takes a free one)"
        ) from error
    listening.setblocking(False)
    bound_port: int = listening.getsockname()[1]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return Listener(listening, f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{bound_port}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


async def serve_until(
    stopped: asyncio.Event,
    settings: Settings,
    listener: Listener,
    *,
    api_key_hashes: tuple[str, ...] = (),
    on_swarm: "Callable[[SwarmGateway], None]" = lambda swarm: None,
    on_ready: Callable[[], Awaitable[None]],
) -> None:
    """Load the model and serve it until `stopped`; `on_ready` runs once it can serve.

    With `server.swarm` set, `on_swarm` is called as soon as machines can join. A stop while the model is loading ends
    the process: there is nothing to lose yet.

    Raises:
        BadSetup: the model cannot be loaded.
        EngineFailure: the engine broke for good.
    """
    from plait.cli.options import engine_options, gateway_options, served_names
    from plait.gateway import create_app
    from plait.worker import AsyncEngine, LoadProgress

    options = gateway_options(settings, api_key_hashes=api_key_hashes)
    if settings.server.swarm:
        from plait.cli.swarm_setup import be_introduced, make_gateway, take_seat

        with take_seat(settings) as seat:
            swarm = make_gateway(settings, seat)
            async with _http_server(create_app(swarm.engine, options, desk=swarm), listener), swarm:
                if swarm.node.introducers:
                    await be_introduced(settings, swarm.node)
                on_swarm(swarm)

                async def on_covered() -> None:
                    await swarm.wait_covered()
                    await on_ready()

                await _serve_engine(stopped, settings, swarm.engine, on_covered)
                await swarm.leave()
        return
    engine = AsyncEngine(
        lambda on_progress: engine_options(
            settings, on_download=lambda done, total: on_progress(LoadProgress("downloading", done, total))
        ),
        names=served_names(settings),
    )
    # Leaving the engine ends what still runs with an error that says so, which the server then sends.
    async with _http_server(create_app(engine, options), listener), engine:
        await _serve_engine(stopped, settings, engine, on_ready)


async def _serve_engine(
    stopped: asyncio.Event,
    settings: Settings,
    engine: "AsyncEngine | SwarmEngine",
    on_ready: Callable[[], Awaitable[None]],
) -> None:
    await _first_of(stopped.wait(), _show_loading(engine))
    if engine.state == "loading":
        _end_process(0)
    if engine.state == "ready":
        await _first_of(stopped.wait(), _failed(engine), _then_for_ever(on_ready()))
    if engine.state == "failed":
        raise engine.failure or EngineFailure("the engine stopped; start the server again")
    if not await engine.drain(settings.server.drain_timeout_s):
        note(f"requests still running after {format_s(settings.server.drain_timeout_s)} were ended")


async def run_server(
    settings: Settings,
    listener: Listener,
    *,
    api_key_hashes: tuple[str, ...] = (),
    on_swarm: "Callable[[SwarmGateway], None]" = lambda swarm: None,
    on_ready: Callable[[], Awaitable[None]],
) -> None:
    """`serve_until` SIGINT or SIGTERM; a second one ends the process at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    first_s = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal first_s
        if not stopped.is_set():
            first_s = loop.time()
            note("stopping: running requests may end, new ones are refused; once more stops at once")
            stopped.set()
        elif loop.time() - first_s > SAME_SIGNAL_S:
            _end_process(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    await serve_until(
        stopped, settings, listener, api_key_hashes=api_key_hashes, on_swarm=on_swarm, on_ready=on_ready
    )


@contextmanager
def background_server(settings: Settings) -> Generator[tuple[str, str]]:
    """A server on a free loopback port in its own thread, ready when entered; gives its base URL and key.

    Raises:
        BadSetup: the model cannot be loaded.
    """
    from plait.gateway import hash_api_key, new_api_key

    key = new_api_key()
    listener = listen("127.0.0.1", 0)
    outcome: queue.SimpleQueue[ServingError | None] = queue.SimpleQueue()
    started: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def serve() -> None:
        stopped = asyncio.Event()
        started.put((asyncio.get_running_loop(), stopped))

        async def on_ready() -> None:
            outcome.put(None)

        try:
            hashes = (hash_api_key(key),)
            await serve_until(stopped, settings, listener, api_key_hashes=hashes, on_ready=on_ready)
        except ServingError as error:
            outcome.put(error)

    thread = threading.Thread(target=lambda: run_async(serve()), name="plait-server", daemon=True)
    thread.start()
    loop, stopped = started.get()
    try:
        failure = outcome.get()
        if failure is not None:
            raise failure
        yield listener.base_url, key
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stopped.set)
        thread.join()


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


@asynccontextmanager
async def _http_server(app: "FastAPI", listener: Listener) -> AsyncGenerator[None]:
    import uvicorn

    from plait.gateway import HttpProtocol

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Generator[None]:
            # Signals drain first, and the exit code after them is ours to choose.
            yield

    server = Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=LAST_BYTES_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener.socket]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def _show_loading(engine: "AsyncEngine | SwarmEngine") -> None:
    with bytes_bar() as show:
        while engine.state == "loading":
            progress = engine.load_progress
            show(progress.stage, progress.done_bytes, progress.total_bytes)
            await asyncio.sleep(LOOK_S)


async def _failed(engine: "AsyncEngine | SwarmEngine") -> None:
    while engine.state != "failed":
        await asyncio.sleep(LOOK_S)


async def _then_for_ever(first: Awaitable[None]) -> None:
    await first
    await asyncio.Event().wait()


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of several has ended, cancel the others, and raise what it raised."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _end_process(code: int) -> NoReturn:
    """End at once: no thread is waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
