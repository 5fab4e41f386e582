"""JSON request bodies: read strictly, before anything else looks at them."""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from plait.errors import BadRequest
from plait.gateway.front_door import front_door_of

EXACT_INTEGERS = 2**53
"""Below this a float says which integer it is."""


class JsonRequest(Request):
    """A request whose JSON body has been read and checked."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, must be JSON and says so in its content type.

    Demanding the content type also keeps other web pages' forms from reaching a server on this machine:
    a browser sends `application/json` across origins only after asking.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def handle_json(request: Request) -> Response:
            if not takes_body:
                return await handle(request)
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                given = repr(media_type) if media_type else "none"
                raise HTTPException(415, f"the content type must be 'application/json', not {given}")
            parsed_request = JsonRequest(request.scope, request.receive)
            max_depth = front_door_of(request).options.max_json_depth
            parsed_request.parsed = parse_json(await parsed_request.body(), max_depth)
            return await handle(parsed_request)

        return handle_json


def parse_json(body: bytes, max_depth: int) -> Any:
    """Parse a body as strict JSON.

    Raises:
        BadRequest: it is not JSON in UTF-8, has NaN, half a surrogate pair, or is nested too deeply.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_float=_number, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 (byte {error.start}); send JSON in UTF-8") from None
    except RecursionError:
        raise BadRequest(f"the body is nested deeper than {max_depth} levels") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if b"\\ud" in body or b"\\uD" in body:
        _check_surrogates(value)
    if _depth(value) > max_depth:
        raise BadRequest(f"the body is nested deeper than {max_depth} levels")
    return value


def _number(text: str) -> int | float:
    """JSON has one kind of number: some clients write 16 as 16.0."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return int(value) if value.is_integer() and abs(value) < EXACT_INTEGERS else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequest("the body has half of a UTF-16 surrogate pair (\\ud800 to \\udfff alone)") from None


def _depth(value: Any) -> int:
    """Levels of lists and objects; iterative, as the input chooses the depth."""
    depth = 0
    level: list[Any] = [value]
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(cast("dict[str, Any]", item).values())
            elif isinstance(item, list):
                inner.extend(cast("list[Any]", item))
        depth += 1
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth
