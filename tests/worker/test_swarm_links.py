"""A swarm over real sockets in real time, each engine in a thread of its own; and the HTTP gateway in front of it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from swarm_rig import (
    SECRET,
    Answer,
    MemoryNet,
    SwarmRig,
    cut_at,
    on_one_machine,
    some_prompt,
    swarm,
    tiny_request,
)

from plait.gateway import create_app
from plait.kernels import native_available
from plait.session import SessionTimes
from plait.transport import Carrier, Identity, TcpCarrier, TlsCarrier, UnixCarrier
from plait.worker.engine_thread import EngineThread
from plait.worker.swarm_engine import SwarmOptions

DTYPE = "bfloat16" if native_available else "float64"  # a replay must give the same bits


class SocketRig(SwarmRig):
    """Workers on loopback; each has an engine thread."""

    def __init__(self, kind: str, folder: Path, threads: AsyncExitStack) -> None:
        super().__init__(MemoryNet(), dtype=DTYPE)
        self.kind, self.folder, self.threads = kind, folder, threads

    def carriers(self, name: str, identity: Identity) -> dict[str, Carrier]:
        match self.kind:
            case "unix":
                return {"unix": UnixCarrier()}
            case "tcp":
                return {"tcp": TcpCarrier()}
            case _:
                return {"tls": TlsCarrier(identity, SECRET)}

    def address(self, name: str) -> str:
        return f"unix://{self.folder}/{name}" if self.kind == "unix" else f"{self.kind}://127.0.0.1:0"

    async def add(self, name: str, blocks: range, **options: object):  # type: ignore[no-untyped-def]
        thread = await self.threads.enter_async_context(EngineThread())
        self.run_step = thread.run
        return await super().add(name, blocks, **options)

    async def kill(self, name: str) -> None:
        """As a process dies: its sockets are closed and nothing is said."""
        host = self.hosts[name]
        for peer in host.network._peers.values():
            if peer.connection is not None:
                peer.connection.link.abort()
        await host.stack.aclose()


def run(
    kind: str,
    folder: Path,
    test: Callable[[SwarmRig], Awaitable[None]],
    spans: dict[str, range],
    options: SwarmOptions | None = None,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(120), AsyncExitStack() as threads:
            rig = SocketRig(kind, folder, threads)
            async with swarm(spans, rig=rig, options=options) as rig:
                await test(rig)
                await rig.settle()
                rig.check_all_free()

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["tls", "tcp", "unix"])
def test_a_chain_over_sockets_answers_as_one_engine(kind: str, tmp_path: Path) -> None:
    requests = [
        tiny_request("greedy", some_prompt(700, 2), 12, temperature=0.0),
        *(tiny_request(f"{seed}", some_prompt(12, seed), 24, seed=seed) for seed in range(4)),
    ]
    expected = on_one_machine(requests, DTYPE)

    async def test(rig: SwarmRig) -> None:
        answers = await asyncio.gather(*(rig.ask(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            assert answer.token_ids == expected[str(request.id)].token_ids

    run(kind, tmp_path, test, cut_at(2, 4), SwarmOptions(draft_tokens=3))


@pytest.mark.parametrize("kind", ["tls", "unix"])
def test_a_worker_lost_over_sockets(kind: str, tmp_path: Path) -> None:
    request = tiny_request("x", some_prompt(40, 1), 64, seed=4)
    expected = on_one_machine([request], DTYPE)["x"]

    async def test(rig: SwarmRig) -> None:
        for place in range(3):
            answer = Answer()
            asking = asyncio.create_task(rig.ask(request, answer))
            while answer.deltas < 20:
                await asyncio.sleep(0.001)
            lost = rig.chain()[place]
            await rig.kill(lost)
            await asking
            assert answer.token_ids == expected.token_ids
            await rig.add(lost, rig.hosts[lost].engine.blocks)

    spans = {**cut_at(2, 4), "A": range(2), "B": range(2, 4), "C": range(4, 6)}
    run(kind, tmp_path, test, spans)


def test_the_gateway_serves_a_swarm_unchanged(tmp_path: Path) -> None:
    async def test(rig: SwarmRig) -> None:
        app = create_app(rig.gateway)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://swarm") as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            body = {
                "model": "tiny",
                "prompt": "Once upon a time",
                "max_tokens": 12,
                "temperature": 0,
                "n": 2,
                "logprobs": 2,
            }
            answer = (await client.post("/v1/completions", json=body)).json()
            assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
            assert answer["choices"][0]["text"] == answer["choices"][1]["text"] != ""
            assert len(answer["choices"][0]["logprobs"]["tokens"]) == 12
            assert answer["usage"]["completion_tokens"] == 24
            streamed = ""
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}
            async with client.stream("POST", "/v1/chat/completions", json={**chat, "max_tokens": 5}) as lines:
                assert lines.status_code == 200
                async for line in lines.aiter_lines():
                    streamed += line
            assert streamed.endswith("[DONE]")
            refused = await client.post("/v1/completions", json={**body, "best_of": 4})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == "best_of"
            assert (await client.get("/status")).json()["generated_tokens_total"] == 29
            for name in ("b", "c"):
                await rig.kill(name)
            gone = await client.post("/v1/completions", json=body)
            assert gone.status_code in (429, 503)
            assert "2:6" in gone.json()["error"]["message"]
            assert gone.headers["retry-after"]

    run("tcp", tmp_path, test, cut_at(2, 4), SwarmOptions(times=SessionTimes(opening_s=2)))
