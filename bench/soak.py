"""A server at twice what it can serve, with clients that cancel, vanish, read slowly and talk nonsense.

For ten minutes an open loop of clients asks `plait serve tiny` for twice the tokens it was measured to give, with
little KV memory, so that it queues, preempts and refuses. Passes if every request was answered or refused by name,
memory is flat over the second half, and afterwards nothing runs and no KV block is held.

    python bench/soak.py [--minutes 10]
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from results import Figure, write_result

KINDS = {"stream": 40, "plain": 25, "cancel": 15, "vanish": 8, "slow reader": 4, "malformed": 8}
MALFORMED: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b"null",
    b'{"model": "tiny"}',
    b'{"model": "tiny", "messages": "hello"}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e9}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": -5}',
    b'{"model": "nonesuch", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}',
    b'{"model": "tiny", "messages": ' + b"[" * 5000,
    b"\xff\xfe\x00garbage",
)
REFUSALS = {429, 503}


class Soak:
    """One run: what happened to each request, and the server's memory over time."""

    def __init__(self, origin: str, pid: int, seed: int) -> None:
        self.origin, self.pid, self.rng = origin, pid, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.client = httpx.AsyncClient(
            base_url=origin,
            timeout=300,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    def body(self, *, stream: bool) -> dict[str, Any]:
        rng = self.rng
        body: dict[str, Any] = {
            "model": "tiny",
            "stream": stream,
            "max_tokens": rng.choice((8, 32, 64, 200)),
            "temperature": rng.choice((0.0, 0.8, 1.2)),
            "ignore_eos": True,
            "n": rng.choice((1, 1, 1, 1, 3)),
            "messages": [
                {"role": "system", "content": "You are a helpful assistant. " * rng.choice((1, 8))},
                {"role": "user", "content": "Explain this: " + "os.path.join " * rng.randrange(1, 60)},
            ],
        }
        if rng.random() < 0.1:
            body["response_format"] = {"type": "json_object"}
            body["ignore_eos"] = False
        return body

    async def one(self, kind: str) -> None:
        try:
            outcome = await getattr(self, "_" + kind.replace(" ", "_"))()
        except (httpx.HTTPError, OSError) as error:
            outcome = f"lost: {type(error).__name__}"
            self.wrong.append(f"{kind}: {error!r}")
        self.outcomes[f"{kind}: {outcome}"] += 1

    def _refused(self, status: int, text: str, wanted: set[int]) -> str:
        try:
            error = json.loads(text)["error"]
            named = bool(error["message"]) and bool(error["type"])
        except (ValueError, KeyError, TypeError):
            named = False
        if status not in wanted or not named:
            self.wrong.append(f"HTTP {status}: {text[:200]}")
            return "WRONG"
        return f"refused {status}"

    async def _plain(self) -> str:
        answer = await self.client.post("/v1/chat/completions", json=self.body(stream=False))
        if answer.status_code != 200:
            return self._refused(answer.status_code, answer.text, REFUSALS)
        reasons = {choice["finish_reason"] for choice in answer.json()["choices"]}
        return "answered" if reasons <= {"length", "stop"} else self._note(f"finish reasons {reasons}")

    def _note(self, what: str) -> str:
        self.wrong.append(what)
        return "WRONG"

    async def _stream(self, pause_s: float = 0.0) -> str:
        request = self.client.stream("POST", "/v1/chat/completions", json=self.body(stream=True))
        async with request as answer:
            if answer.status_code != 200:
                return self._refused(answer.status_code, (await answer.aread()).decode(), REFUSALS)
            last = ""
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    last = line
                    await asyncio.sleep(pause_s)
            return "answered" if last == "data: [DONE]" else self._note(f"a stream ended with {last!r}")

    async def _slow_reader(self) -> str:
        return await self._stream(pause_s=0.05)

    async def _cancel(self) -> str:
        request = self.client.stream("POST", "/v1/chat/completions", json=self.body(stream=True))
        async with request as answer:
            if answer.status_code != 200:
                return self._refused(answer.status_code, (await answer.aread()).decode(), REFUSALS)
            left = self.rng.randrange(1, 12)
            async for line in answer.aiter_lines():
                left -= line.startswith("data: ")
                if left <= 0:
                    break
        return "cancelled"

    async def _vanish(self) -> str:
        """Send a request (sometimes only half of it) and close the connection without reading."""
        host, port = self.origin.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        content = json.dumps(self.body(stream=self.rng.random() < 0.5)).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        ).encode()
        writer.write(
            (head + content)[: self.rng.choice((len(head) // 2, len(head) + 10, len(head) + len(content)))]
        )
        await writer.drain()
        await asyncio.sleep(self.rng.random() * 0.3)
        writer.close()
        return "gone"

    async def _malformed(self) -> str:
        answer = await self.client.post(
            "/v1/chat/completions",
            content=self.rng.choice(MALFORMED),
            headers={"content-type": "application/json"},
        )
        return self._refused(answer.status_code, answer.text, {400, 404, 413, 422, *REFUSALS})

    def memory_mib(self) -> float:
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return sum(int(kib) for kib in re.findall(r"^(?:Private_\w+): +(\d+) kB", text, re.M)) / 1024

    async def watch(self, start_s: float) -> None:
        while True:
            self.memory.append((time.monotonic() - start_s, self.memory_mib()))
            await asyncio.sleep(2)

    async def capacity_per_s(self) -> float:
        """Requests per second in closed loop, after a warm-up."""
        for seconds in (5, 15):
            done, end_s = 0, time.monotonic() + seconds

            async def keep_asking(until_s: float = end_s) -> int:
                count = 0
                while time.monotonic() < until_s:
                    await self._plain()
                    count += 1
                return count

            start_s = time.monotonic()
            done = sum(await asyncio.gather(*(keep_asking() for _ in range(16))))
            rate = done / (time.monotonic() - start_s)
        return rate

    async def run(self, seconds: float, rate_per_s: float) -> None:
        start_s = time.monotonic()
        watching = asyncio.create_task(self.watch(start_s))
        async with asyncio.TaskGroup() as group:
            while time.monotonic() - start_s < seconds:
                kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
                group.create_task(self.one(kind))
                await asyncio.sleep(self.rng.expovariate(rate_per_s))
        watching.cancel()

    async def idle_status(self) -> dict[str, Any]:
        for _ in range(100):
            status = (await self.client.get("/status")).json()
            if not (status["running"] or status["waiting"] or status["kv_blocks_used"]):
                break
            await asyncio.sleep(0.1)
        return status


async def soak(minutes: float, seed: int) -> int:
    arguments = ["serve", "tiny", "--port", "0", "--kv-cache-memory", "24MiB", "--swap-space", "12MiB"]
    arguments += ["--max-num-seqs", "32", "--set", "scheduling.max_waiting=64", "--log-level", "warning"]
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "plait",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert server.stdout is not None
    lines: list[str] = []
    try:
        origin = ""
        while not origin:
            line = (await asyncio.wait_for(server.stdout.readline(), 60)).decode()
            lines.append(line)
            assert line, "the server ended: " + "".join(lines)
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            origin = found[0] if found else ""

        async def read_log() -> None:
            assert server.stdout is not None
            async for line in server.stdout:
                lines.append(line.decode(errors="replace"))

        reading = asyncio.create_task(read_log())
        run = Soak(origin, server.pid, seed)
        for _ in range(300):
            if (await run.client.get("/health")).status_code == 200:
                break
            await asyncio.sleep(0.1)
        capacity = await run.capacity_per_s()
        run.wrong.clear()
        await run.run(minutes * 60, 2 * capacity)
        status = await run.idle_status()
        half = [mib for at_s, mib in run.memory if at_s > minutes * 30]
        quarter = max(1, len(half) // 4)
        growth_mib = statistics.median(half[-quarter:]) - statistics.median(half[:quarter])
        server.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(server.wait(), 60)
        await reading
        tracebacks = sum("Traceback" in line for line in lines)
        good = (
            not run.wrong
            and not (status["running"] or status["waiting"] or status["kv_blocks_used"])
            and growth_mib < 16
            and code == 0
            and not tracebacks
        )
        summary = {
            "passed": good,
            "minutes": minutes,
            "capacity_requests_per_s": capacity,
            "offered_requests_per_s": 2 * capacity,
            "requests": sum(run.outcomes.values()),
            "outcomes": dict(sorted(run.outcomes.items())),
            "wrong": run.wrong[:20],
            "tracebacks_in_the_log": tracebacks,
            "exit_code": code,
            "kv_blocks_held_afterwards": status["kv_blocks_used"],
            "preemptions": status["preemptions_total"],
            "memory_mib_median_first_quarter_of_second_half": statistics.median(half[:quarter]),
            "memory_growth_mib_over_second_half": growth_mib,
        }
        figure = Figure(title="private memory of the server", x_label="s", y_label="MiB")
        figure.add_line("MiB", [at for at, _ in run.memory], [mib for _, mib in run.memory])
        write_result(
            "soak",
            settings={"seed": seed, "arguments": arguments, "kinds": KINDS, "cores": os.cpu_count()},
            samples=run.memory,
            summary=summary,
            figures=[figure],
        )
        return 0 if good else 1
    finally:
        if server.returncode is None:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(soak(arguments.minutes, arguments.seed)))


if __name__ == "__main__":
    main()
