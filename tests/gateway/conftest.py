"""One event loop in a thread, with real engines on the model `tiny` and real HTTP servers before them."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import uvicorn
from browsing import browser, open_page

import plait.model
from plait.engine import EngineOptions
from plait.gateway import GatewayOptions, HttpProtocol, SwarmDesk, create_app
from plait.scheduling import StepLimits
from plait.worker import AsyncEngine, LoadProgress, SwarmEngine

T = TypeVar("T")

__all__ = ["browser", "open_page"]

TINY = Path(plait.model.__file__).parent / "tiny"


class Site:
    """Engines and servers that live in one background event loop until the tests end."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = AsyncExitStack()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """Run a coroutine in the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def engine(
        self,
        options: Callable[[Callable[[LoadProgress], None]], EngineOptions] | EngineOptions,
        *,
        settled: bool = True,
    ) -> AsyncEngine:
        """Start an engine; `settled` waits until it has loaded or failed."""

        async def start() -> AsyncEngine:
            choose = (lambda _: options) if isinstance(options, EngineOptions) else options
            engine = AsyncEngine(choose, names=("tiny", "alias"))
            await self._stack.enter_async_context(engine)
            if settled:
                await engine.wait_settled()
            return engine

        return self.run(start())

    def serve(
        self,
        engine: AsyncEngine | SwarmEngine,
        options: GatewayOptions | None = None,
        protocol: type[HttpProtocol] = HttpProtocol,
        desk: SwarmDesk | None = None,
    ) -> str:
        """Serve an engine on a free port; returns the origin."""
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        app = create_app(engine, options, desk=desk)
        config = uvicorn.Config(app, http=protocol, log_config=None, access_log=False, lifespan="off")
        server = uvicorn.Server(config)

        async def start() -> None:
            serving = asyncio.create_task(server.serve(sockets=[listening]))

            async def stop() -> None:
                server.should_exit = server.force_exit = True
                await serving

            self._stack.push_async_callback(stop)
            while not server.started:
                await asyncio.sleep(0.001)

        self.run(start())
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter something in the loop, which is left when the tests end."""
        return self.run(self._stack.enter_async_context(context))

    def until(self, holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until something holds, in the loop."""

        async def wait() -> None:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    await asyncio.sleep(0.002)

        self.run(wait())

    def close(self) -> None:
        self.run(self._stack.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="session")
def tiny_options() -> EngineOptions:
    return EngineOptions(folder=TINY, kv_cache_bytes=2**26, threads=1)


@pytest.fixture(scope="session")
def engine(site: Site, tiny_options: EngineOptions) -> AsyncEngine:
    engine = site.engine(tiny_options)
    assert engine.state == "ready", engine.failure
    return engine


@pytest.fixture(scope="session")
def narrow_engine(site: Site) -> AsyncEngine:
    """Runs one request, lets one wait, refuses the third."""
    limits = StepLimits(max_running_sequences=1, max_waiting=1)
    engine = site.engine(EngineOptions(folder=TINY, kv_cache_bytes=2**26, threads=1, limits=limits))
    assert engine.state == "ready", engine.failure
    return engine


@pytest.fixture(scope="session")
def origin(site: Site, engine: AsyncEngine) -> str:
    """A server without keys."""
    return site.serve(engine)


@pytest.fixture
def client(origin: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(origin: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=origin, timeout=30.0) as http:
        yield http
