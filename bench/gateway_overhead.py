"""What the gateway costs for each streamed token: CPU of everything but the engine's thread.

A real server on a loopback port streams chat completions to clients in another process. The event loop's thread
(HTTP, JSON, server-sent events, taking deltas from the engine) is timed by its own CPU clock, so the engine, the
clients and whatever else the machine does are not in the figure. Target: under 100 us a token.

The floor beside it is what the same event loop pays for being woken by a thread and writing 200 bytes to a socket, with
no gateway at all: with one stream every token is a wake-up of its own, with many they share them.

    python bench/gateway_overhead.py            about 2 minutes on two cores
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from results import write_result

import plait.model
from plait.engine import EngineOptions
from plait.gateway import GatewayOptions, HttpProtocol, create_app
from plait.worker import AsyncEngine

TINY = Path(plait.model.__file__).parent / "tiny"
TOKENS = 400

CLIENT = """
import asyncio, httpx, json, sys
url, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
async def one(client, number):
    body = {"model": "tiny", "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.7,
            "seed": number, "messages": [{"role": "user", "content": f"Tell me about module number {number}."}],
            "stream_options": {"include_usage": True}}
    events = 0
    async with client.stream("POST", url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                events += 1
                last = line
    return events, json.loads(last[6:])["usage"]["completion_tokens"]
async def main():
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        print(json.dumps(await asyncio.gather(*(one(client, number) for number in range(streams)))))
asyncio.run(main())
"""


class Server:
    """A gateway in a thread of its own."""

    def __init__(self) -> None:
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1/chat/completions"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop of `plait serve`
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        options = EngineOptions(folder=TINY, kv_cache_bytes=2**28, threads=1)
        async with AsyncEngine(lambda _: options, names=("tiny",)) as engine:
            await engine.wait_settled()
            app = create_app(engine, GatewayOptions())
            config = uvicorn.Config(app, http=HttpProtocol, log_config=None, access_log=False, lifespan="off")
            self._server = uvicorn.Server(config)
            serving = asyncio.create_task(self._server.serve(sockets=[self._listening]))
            self._ready.set()
            await serving

    def cpu_s(self) -> float:
        """CPU time of the event loop's thread so far."""

        async def read() -> float:
            return time.thread_time()

        return asyncio.run_coroutine_threadsafe(read(), self._loop).result()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


def floor_us() -> float:
    """CPU of an event loop for one wake-up by a busy thread and one small write, in microseconds."""
    near, far = socket.socketpair()
    near.setblocking(False)

    def read() -> None:
        while far.recv(65536):
            pass

    async def run() -> float:
        loop = asyncio.get_running_loop()
        woken, stopped = asyncio.Event(), asyncio.Event()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)

        def work() -> None:
            for _ in range(500):
                end_s = time.perf_counter() + 0.002
                while time.perf_counter() < end_s:
                    pass
                loop.call_soon_threadsafe(woken.set)
            loop.call_soon_threadsafe(stopped.set)
            loop.call_soon_threadsafe(woken.set)

        events, before_s = 0, time.thread_time()
        threading.Thread(target=work).start()
        while not stopped.is_set():
            await woken.wait()
            woken.clear()
            transport.write(b"x" * 200)
            events += 1
        cost_us = (time.thread_time() - before_s) / events * 1e6
        transport.close()
        return cost_us

    threading.Thread(target=read, daemon=True).start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def measure(server: Server, streams: int) -> dict[str, Any]:
    before_s, start_s = server.cpu_s(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, server.url, str(streams), str(TOKENS)],
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(done.stdout)
    tokens = sum(count for _, count in answers)
    return {
        "streams": streams,
        "tokens": tokens,
        "events": sum(events for events, _ in answers),
        "seconds": time.perf_counter() - start_s,
        "gateway_cpu_us_per_token": (server.cpu_s() - before_s) / tokens * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    server = Server()
    measure(server, 1)
    samples = [
        {"repeat": repeat, **measure(server, streams)}
        for repeat in range(arguments.repeats)
        for streams in (1, 16, 64)
    ]
    server.stop()
    floors = [floor_us() for _ in range(arguments.repeats)]
    summary: dict[str, Any] = {
        "target_us_per_token": 100,
        "floor: median, least, most us per wake-up and write": [
            round(value, 1) for value in (statistics.median(floors), min(floors), max(floors))
        ],
    }
    for streams in (1, 16, 64):
        figures = [s["gateway_cpu_us_per_token"] for s in samples if s["streams"] == streams]
        summary[f"{streams} streams: median, least, most us per token"] = [
            round(value, 1) for value in (statistics.median(figures), min(figures), max(figures))
        ]
    write_result(
        "gateway_overhead",
        settings={"tokens": TOKENS, "repeats": arguments.repeats},
        samples={"streams": samples, "floor_us": floors},
        summary=summary,
    )


if __name__ == "__main__":
    main()
