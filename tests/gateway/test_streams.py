"""`EventStream` against clients that are silent, slow or gone, at the ASGI boundary."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from plait.errors import EngineFailure, NoCapacity
from plait.gateway.options import GatewayOptions
from plait.gateway.sse import PING, EventStream


class Connection:
    """A client's end: what was sent, whether it reads, whether it is still there."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.left = asyncio.Event()
        self.aborted = False
        self.news = asyncio.Event()
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "headers": [],
            "extensions": {"plait.connection": {"abort": self.abort}},
        }

    def abort(self) -> None:
        self.aborted = True

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)
        self.news.set()

    async def has_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self.news.clear()
            await self.news.wait()

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def run(self, stream: EventStream) -> None:
        await stream(self.scope, self.receive, self.send)


class Source:
    """A generator of events that waits when told to, and knows whether it was closed."""

    def __init__(self, *events: bytes | Exception, wait_before: int | None = None) -> None:
        self._events = events
        self._wait_before = wait_before
        self.go_on = asyncio.Event()
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for at, event in enumerate(self._events):
                if at == self._wait_before:
                    await self.go_on.wait()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


def run(test) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(bounded())


def test_events_pass_in_order_and_the_stream_ends():
    async def test() -> None:
        connection, source = Connection(), Source(b"data: 1\n\n", b"data: 2\n\n")
        await connection.run(EventStream(source.events(), GatewayOptions()))
        assert connection.status == 200
        headers = dict(connection.sent[0]["headers"])
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert b"content-length" not in headers
        assert connection.body == b"data: 1\n\ndata: 2\n\n"
        assert connection.sent[-1]["more_body"] is False
        assert source.closed

    run(test)


@pytest.mark.parametrize("silent_before", [0, 1])
def test_a_silent_stream_is_pinged_until_it_speaks(silent_before: int):
    async def test() -> None:
        connection, source = Connection(), Source(b"data: 1\n\n", b"data: 2\n\n", wait_before=silent_before)
        running = asyncio.create_task(
            connection.run(EventStream(source.events(), GatewayOptions(ping_s=0.01)))
        )
        await connection.has_sent(4)
        assert connection.body.endswith(PING * 2)
        source.go_on.set()
        await running
        assert connection.body.replace(PING, b"") == b"data: 1\n\ndata: 2\n\n"

    run(test)


def test_a_busy_stream_is_not_pinged():
    async def test() -> None:
        connection, source = Connection(), Source(*[b"data: 1\n\n"] * 100)
        await connection.run(EventStream(source.events(), GatewayOptions(ping_s=5)))
        assert PING not in connection.body

    run(test)


def test_an_error_before_the_first_event_has_its_own_status():
    async def test() -> None:
        connection, source = Connection(), Source(NoCapacity("full", retry_after_s=3))
        await connection.run(EventStream(source.events(), GatewayOptions()))
        assert connection.status == 429
        assert dict(connection.sent[0]["headers"])[b"retry-after"] == b"3"
        assert b'"full"' in connection.body

    run(test)


@pytest.mark.parametrize("error", [EngineFailure("it broke"), ZeroDivisionError("a secret of ours")])
def test_a_later_error_is_the_last_event(error: Exception):
    async def test() -> None:
        connection, source = Connection(), Source(b"data: 1\n\n", error)
        await connection.run(EventStream(source.events(), GatewayOptions()))
        assert connection.status == 200
        first, last = connection.body.split(b"\n\n", 1)
        assert first == b"data: 1"
        assert last.startswith(b'data: {"error": {"message": ')
        assert b"secret" not in last
        assert connection.sent[-1]["more_body"] is False

    run(test)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_client_that_leaves_closes_the_source_at_once(waiting: bool):
    async def test() -> None:
        connection = Connection()
        source = Source(b"data: 1\n\n", b"data: 2\n\n", wait_before=1)
        running = asyncio.create_task(connection.run(EventStream(source.events(), GatewayOptions())))
        await connection.has_sent(2)
        if not waiting:
            connection.reads.clear()
            source.go_on.set()
        connection.left.set()
        await running
        assert source.closed
        assert connection.scope["plait.outcome"] == "disconnected"
        assert len(connection.sent) == 2

    run(test)


def test_a_client_that_reads_nothing_is_cut_off():
    async def test() -> None:
        connection, source = Connection(), Source(*[b"data: 1\n\n"] * 10)
        connection.reads.clear()
        options = GatewayOptions(unread_s=0.03, ping_s=0.01)
        await connection.run(EventStream(source.events(), options))
        assert connection.aborted
        assert source.closed
        assert connection.scope["plait.outcome"] == "disconnected"

    run(test)


def test_a_slow_client_that_reads_in_time_is_kept():
    async def test() -> None:
        connection, source = Connection(), Source(b"data: 1\n\n", b"data: 2\n\n")
        connection.reads.clear()
        options = GatewayOptions(unread_s=5, ping_s=0.01)
        running = asyncio.create_task(connection.run(EventStream(source.events(), options)))
        asyncio.get_running_loop().call_later(0.05, connection.reads.set)
        await running
        assert not connection.aborted
        assert connection.body == b"data: 1\n\ndata: 2\n\n"

    run(test)


def test_cancelling_the_request_closes_the_source():
    async def test() -> None:
        connection, source = Connection(), Source(b"data: 1\n\n", b"data: 2\n\n", wait_before=1)
        running = asyncio.create_task(connection.run(EventStream(source.events(), GatewayOptions())))
        await connection.has_sent(2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert source.closed

    run(test)
