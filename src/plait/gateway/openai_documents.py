"""What the OpenAPI document says about answers that are written by hand."""

from typing import Any

from pydantic import BaseModel


class ErrorObject(BaseModel):
    """What went wrong and whose turn it is."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorEnvelope(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorObject


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "The request must change, or wait its turn (429)."},
    "5XX": {
        "model": ErrorEnvelope,
        "description": "The server cannot serve it now (503, with Retry-After) or failed.",
    },
}


def generation_responses(description: str) -> dict[int | str, dict[str, Any]]:
    """A JSON object, or a stream of events where the request asked for one; errors in OpenAI's envelope."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {}},
    }
    return {200: {"description": description, "content": content}, **ERROR_RESPONSES}


def json_responses(description: str, *, errors: bool = True) -> dict[int | str, dict[str, Any]]:
    """A JSON object; errors in OpenAI's envelope."""
    content = {"application/json": {"schema": {"type": "object"}}}
    return {200: {"description": description, "content": content}, **(ERROR_RESPONSES if errors else {})}
