"""Errors as Anthropic's clients expect them: https://docs.anthropic.com/en/api/errors."""

import json
from typing import Any

from plait.gateway.errors import ErrorDialect, ErrorReply
from plait.gateway.request_id import current_request_id

# What their API answers when it has no room. Clients retry it, as they do 429 and every 5xx.
OVERLOADED = 529

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def anthropic_status(reply: ErrorReply) -> int:
    """The status to send: no room in the queue, the cache or a server that is loading is 529."""
    return OVERLOADED if reply.retry_after_s is not None and reply.status in (429, 503) else reply.status


def anthropic_body(reply: ErrorReply) -> dict[str, Any]:
    """Anthropic's envelope."""
    status = anthropic_status(reply)
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": reply.message}
    return {"type": "error", "error": error, "request_id": current_request_id.get()}


def anthropic_event(reply: ErrorReply) -> bytes:
    """Anthropic's envelope as the last event of a stream."""
    return b"event: error\ndata: " + json.dumps(anthropic_body(reply)).encode() + b"\n\n"


ANTHROPIC_ERRORS = ErrorDialect(anthropic_body, anthropic_event, anthropic_status)
