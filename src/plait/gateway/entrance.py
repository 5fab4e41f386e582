"""What every HTTP request passes before its handler: limits, keys, an id, and one line in the access log.

Plain ASGI around the whole app, so that nothing is read, parsed or kept for a request that is refused here.
"""

import asyncio
import ipaddress
import logging
import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plait.errors import NoCapacity, Unauthorized
from plait.gateway.auth import is_known_key, presented_key
from plait.gateway.errors import ErrorDialect, ErrorReply, error_response, http_reply, reply_of
from plait.gateway.options import GatewayOptions
from plait.gateway.request_id import current_request_id
from plait.metrics import ServingMetrics

log = logging.getLogger("plait.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_POLLED = frozenset({"/status", "/swarm/status", "/health", "/healthz", "/readyz", "/metrics"})
"""Asked every few seconds by pages and monitors: their successes are of no interest in a log."""
_HOSTNAME = socket.gethostname().lower()
_CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; it is only ever logged."""


class Entrance:
    """The outermost layer of the app.

    `is_open` says which paths need no key; `dialect_of` which envelope a path's errors have.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        options: GatewayOptions,
        metrics: ServingMetrics,
        is_open: Callable[[str], bool],
        dialect_of: Callable[[str], ErrorDialect],
    ) -> None:
        self._app = app
        self._options = options
        self._metrics = metrics
        self._is_open = is_open
        self._dialect_of = dialect_of
        self._open_posts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = time.monotonic()
        request_id = _request_id(scope["headers"])
        # OpenAI's clients look for the first, Anthropic's for the second.
        id_headers = ((b"x-request-id", request_id.encode()), (b"request-id", request_id.encode()))
        current_request_id.set(request_id)
        status = _CLIENT_GONE
        scope["plait.request_id"] = request_id

        async def send_tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *id_headers]
            await send(message)

        is_post = scope["method"] == "POST"
        self._open_posts += is_post
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal, self._dialect_of(scope["path"]))(scope, receive, send_tagged)
            else:
                await self._app(scope, _bounded(scope, receive, self._options), send_tagged)
        except Exception as error:
            # What the app let through after it had begun to answer: the connection cannot be saved.
            if status == _CLIENT_GONE:
                await error_response(reply_of(error), self._dialect_of(scope["path"]))(
                    scope, receive, send_tagged
                )
            else:
                scope["plait.outcome"] = "broken"
        finally:
            self._open_posts -= is_post
            # The route's path, of which there are few; what no route took has one word for all.
            self._metrics.http_response(getattr(scope.get("route"), "path", "other"), status)
            _log_access(scope, status, time.monotonic() - began_s)

    def _refusal(self, scope: Scope) -> ErrorReply | None:
        """Why this request goes no further, from its head alone."""
        options, headers = self._options, scope["headers"]
        header_bytes = sum(len(name) + len(value) for name, value in headers)
        if header_bytes > options.max_header_bytes or len(headers) > options.max_headers:
            return http_reply(
                431,
                f"{len(headers)} headers with {header_bytes} bytes; this server takes {options.max_headers} "
                f"headers with {options.max_header_bytes} bytes",
            )
        if options.api_key_hashes and not self._is_open(scope["path"]) and not _is_preflight(scope):
            key = presented_key(headers)
            if key is None:
                return reply_of(
                    Unauthorized("this server needs an API key; send Authorization: Bearer <key>")
                )
            if not is_known_key(key, options.api_key_hashes):
                return reply_of(
                    Unauthorized("this API key is not known here; make one with: plait token new")
                )
        if scope["method"] == "POST" and self._open_posts > options.max_open_requests:
            return reply_of(NoCapacity(f"{options.max_open_requests} requests are open already; retry soon"))
        if options.local_names_only and not is_local_name(host := _host(headers)):
            return http_reply(
                403,
                f"this server has no API key and answers only by this machine's own names, not {host[:100]!r}; "
                "call it by its address, or start it with a key ('plait token new')",
            )
        declared = next((value for name, value in headers if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > options.max_body_bytes:
            return _too_large(options)
        return None


def _bounded(scope: Scope, receive: Receive, options: GatewayOptions) -> Receive:
    """`receive` that refuses a body which grows too large or takes too long."""
    received_bytes = 0
    is_complete = False
    deadline_s = asyncio.get_running_loop().time() + options.body_s

    async def receive_bounded() -> Message:
        nonlocal received_bytes, is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline_s):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {options.body_s:g} s") from None
        if message["type"] == "http.request":
            received_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received_bytes > options.max_body_bytes:
                is_complete = True
                reply = _too_large(options)
                raise HTTPException(reply.status, reply.message)
        return message

    return receive_bounded


def _too_large(options: GatewayOptions) -> ErrorReply:
    return http_reply(
        413, f"the body is larger than the {options.max_body_bytes} bytes that this server takes"
    )


def _host(headers: Sequence[tuple[bytes, bytes]]) -> str:
    return next((value for name, value in headers if name == b"host"), b"").decode("latin-1")


def is_local_name(host: str) -> bool:
    """Whether a Host header names this machine: by an address, as localhost, or not at all.

    Addresses need no check, as no DNS answer stands behind them, nor does one from elsewhere behind `.localhost`
    and `.internal` (as in host.docker.internal).
    """
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.removesuffix(".")
    if name in ("", "localhost", _HOSTNAME) or name.endswith((".localhost", ".internal")):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_preflight(scope: Scope) -> bool:
    """A browser's question before a cross-origin request; it never carries a key."""
    return scope["method"] == "OPTIONS"


def _request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The client's own id, if it is one that is safe to echo and log."""
    for name, value in headers:
        if name == b"x-request-id":
            given = value.decode("latin-1").strip()
            if _REQUEST_ID.fullmatch(given):
                return given
    return uuid.uuid4().hex


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in _POLLED and status < 400 else logging.INFO
    if not log.isEnabledFor(level):
        return
    client = scope.get("client")
    fields = {
        "method": scope["method"],
        # A path is the client's text: escaped, and not without end.
        "path": scope["path"][:200].encode("unicode_escape").decode().replace(" ", "%20"),
        "status": status,
        "seconds": f"{seconds:.3f}",
        "client": client[0] if client else "-",
        "request_id": scope["plait.request_id"],
        "response_id": scope.get("plait.response_id", "-"),
        "outcome": scope.get("plait.outcome", "ok" if status < 400 else "refused"),
    }
    log.log(level, " ".join(f"{name}={value}" for name, value in fields.items()))
