"""Server-sent events to clients that may be slow, silent or gone.

One stream is one generator of ready-made bytes (each one or more whole events) and two tasks: the
request's own task pulls and sends; a side task, which sleeps nearly always, sends a comment when nothing
was sent for a while, notices that the client went away, and cuts it off when it reads nothing.

A slow reader holds up only its own stream: `send` waits while the connection's buffer is full (64 KiB),
nothing is pulled meanwhile, and what the engine produces in that time waits, merged, where it left it.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from plait.gateway.errors import OPENAI_ERRORS, ErrorDialect, error_response, reply_of
from plait.gateway.options import GatewayOptions

PING = b": ping\n\n"


class EventStream(Response):
    """A response of server-sent events.

    An error before anything was sent becomes an ordinary error response with its status; a later one becomes
    the dialect's error event, after which the stream closes. `ping` is the bytes of a keep-alive.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        options: GatewayOptions,
        *,
        errors: ErrorDialect = OPENAI_ERRORS,
        ping: bytes = PING,
    ) -> None:
        self.events = events
        self.options = options
        self.errors = errors
        self.ping = ping
        self.status_code = 200
        self.background = None
        # A proxy that buffers would hold back every event until the end.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transfer = _Transfer(self, send)
        try:
            async with asyncio.TaskGroup() as tasks:
                side = tasks.create_task(transfer.attend(receive, _abort_of(scope)))
                await transfer.send_all(scope, receive)
                side.cancel()
        except* ClientDisconnect:
            scope["plait.outcome"] = "disconnected"
        finally:
            await self.events.aclose()


class _Transfer:
    """One run of an `EventStream`."""

    def __init__(self, stream: EventStream, send: Send) -> None:
        self.stream = stream
        self.send = send
        self.clock = asyncio.get_running_loop().time
        self.lock = asyncio.Lock()
        self.started = False
        self.sending = False
        self.last_s = self.clock()
        """When the latest send began, or ended if none is under way."""

    async def send_all(self, scope: Scope, receive: Receive) -> None:
        try:
            async for event in self.stream.events:
                await self.write(event)
        except Exception as error:
            reply = reply_of(error)
            scope["plait.outcome"] = reply.kind
            if not self.started:
                await error_response(reply, self.stream.errors)(scope, receive, self.send)
                return
            await self.write(self.stream.errors.event(reply))
        await self.write(b"", more=False)

    async def write(self, body: bytes, *, more: bool = True) -> None:
        async with self.lock:
            self.sending = True
            self.last_s = self.clock()
            if not self.started:
                self.started = True
                headers = self.stream.raw_headers
                await self.send({"type": "http.response.start", "status": 200, "headers": headers})
            await self.send({"type": "http.response.body", "body": body, "more_body": more})
            self.sending = False
            self.last_s = self.clock()

    async def attend(self, receive: Receive, abort: Callable[[], None]) -> None:
        """Ping, watch for the client's leaving, and cut off a client that does not read."""
        options = self.stream.options
        while True:
            patience_s = options.unread_s if self.sending else options.ping_s
            left_s = self.last_s + patience_s - self.clock()
            if left_s > 0:
                if await _disconnected_within(receive, min(left_s, options.ping_s)):
                    raise ClientDisconnect
            elif self.sending:
                abort()
                raise ClientDisconnect
            else:
                await self.write(self.stream.ping)


async def _disconnected_within(receive: Receive, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            message: Message = await receive()
    except TimeoutError:
        return False
    return message["type"] == "http.disconnect"


def _abort_of(scope: Scope) -> Callable[[], None]:
    """What closes the connection without waiting for its buffer to empty, if the server can do that."""
    connection = scope.get("extensions", {}).get("plait.connection", {})
    return connection.get("abort", lambda: None)
