"""Errors as HTTP: one table from our errors to statuses, and one envelope for each API dialect.

Whatever goes wrong becomes an `ErrorReply`, which the dialect of the request's path writes in its own way:
as a body when nothing has been sent, as a last event when a stream is under way.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from plait.errors import (
    BadRequest,
    ContextLengthExceeded,
    KvCacheFull,
    NoCapacity,
    NotFound,
    NotReady,
    ServingError,
    Unauthorized,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """An error on its way to a client: `kind` is OpenAI's `type`, `code` its machine-readable reason."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class ErrorDialect:
    """How one API writes errors: the JSON body of a whole answer, and the bytes of a stream's last event."""

    body: Callable[[ErrorReply], Mapping[str, Any]]
    event: Callable[[ErrorReply], bytes]
    status: Callable[[ErrorReply], int] = lambda reply: reply.status


def openai_body(reply: ErrorReply) -> dict[str, Any]:
    """OpenAI's envelope."""
    error = {"message": reply.message, "type": reply.kind, "param": reply.param, "code": reply.code}
    return {"error": error}


def openai_event(reply: ErrorReply) -> bytes:
    """OpenAI's envelope as a server-sent event; the stream closes after it, without `[DONE]`."""
    return b"data: " + json.dumps(openai_body(reply)).encode() + b"\n\n"


OPENAI_ERRORS = ErrorDialect(openai_body, openai_event)


def reply_of(error: Exception) -> ErrorReply:
    """What to tell the client about an error; one that is not ours says nothing about our insides."""
    match error:
        case ServingError():
            return _serving_reply(error)
        case RequestValidationError():
            return _validation_reply(error)
        case HTTPException():
            return http_reply(error.status_code, str(error.detail))
        case _:
            log.error("unexpected error while answering a request", exc_info=error)
            return http_reply(500, "the server failed to answer this request; its log says why")


def http_reply(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorReply:
    """A reply that is known by its HTTP status alone."""
    return ErrorReply(
        status=status,
        kind=_KIND_OF_STATUS.get(status, _kind_of(status)),
        message=message,
        param=param,
        code=code,
    )


def error_response(reply: ErrorReply, dialect: ErrorDialect) -> Response:
    """The whole answer for an error, in a dialect."""
    headers = {} if reply.retry_after_s is None else {"retry-after": str(max(1, round(reply.retry_after_s)))}
    status = dialect.status(reply)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    content = json.dumps(dialect.body(reply), ensure_ascii=False).encode()
    return Response(content, status, headers, media_type="application/json")


def _serving_reply(error: ServingError) -> ErrorReply:
    match error:
        case Unauthorized():
            return http_reply(401, error.message, code="invalid_api_key")
        case NotFound():
            code = "model_not_found" if error.param == "model" else None
            return http_reply(404, error.message, param=error.param, code=code)
        case ContextLengthExceeded():
            return http_reply(400, error.message, param=error.param, code="context_length_exceeded")
        case BadRequest():
            return http_reply(400, error.message, param=error.param)
        case NotReady() | KvCacheFull():
            return ErrorReply(
                status=503,
                kind="unavailable_error",
                message=error.message,
                code="unavailable",
                retry_after_s=error.retry_after_s,
            )
        case NoCapacity():
            return ErrorReply(
                status=429,
                kind="rate_limit_error",
                message=error.message,
                code="queue_full",
                retry_after_s=error.retry_after_s,
            )
        case _:
            return http_reply(500, error.message)


def _validation_reply(error: RequestValidationError) -> ErrorReply:
    """Name the first field at fault, as a path from the body's root.

    A value that is none of a union's alternatives has one error for each; the deepest is what was meant.
    """
    errors = error.errors()
    field = errors[0]["loc"][:2]
    of_field = [found for found in errors if found["loc"][:2] == field]
    path, message = max(((_path_in(error.body, e["loc"][1:]), e["msg"]) for e in of_field), key=_path_length)
    written = ".".join(path)
    more = len(errors) - len(of_field)
    text = (f"{written}: " if written else "") + message + (f" (and {more} more fields)" if more else "")
    return http_reply(400, text, param=written or None)


def _path_length(found: tuple[list[str], str]) -> int:
    return len(found[0])


def _path_in(body: Any, location: Sequence[str | int]) -> list[str]:
    """The part of pydantic's location that the client wrote: pydantic also names alternatives of unions."""
    path: list[str] = []
    value: Any = body
    for at, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list):
            value = cast("list[Any]", value)[part]
        elif isinstance(value, dict) and (part in value or at == len(location) - 1):
            value = cast("dict[Any, Any]", value).get(part)
        else:
            continue
        path.append(str(part))
    return path


_KIND_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


def _kind_of(status: int) -> str:
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
