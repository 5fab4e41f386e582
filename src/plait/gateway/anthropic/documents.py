"""What the OpenAPI document says about answers in Anthropic's dialect."""

from typing import Any, Literal

from pydantic import BaseModel


class AnthropicErrorObject(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorEnvelope(BaseModel):
    """Anthropic's error envelope."""

    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": AnthropicErrorEnvelope, "description": "The request must change."},
    "5XX": {
        "model": AnthropicErrorEnvelope,
        "description": "The server cannot serve it now (529, with Retry-After) or failed.",
    },
}
_OBJECT: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {}}}

MESSAGE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "A message.", "content": {**_OBJECT, **_STREAM}},
    **_ERRORS,
}
COUNT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The number of tokens.", "content": _OBJECT},
    **_ERRORS,
}
