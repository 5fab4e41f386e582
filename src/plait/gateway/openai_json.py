"""Pieces that every OpenAI-shaped answer has: ids, fingerprint, usage, and how it is written as JSON."""

import hashlib
import json
import time
import uuid
from typing import Any

from starlette.responses import Response

from plait import __version__
from plait.worker import ServedModel

DONE = b"data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    """An id for an answer, such as `chatcmpl-...`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def answer_head(id: str, kind: str, model: ServedModel) -> dict[str, Any]:
    """The fields that open an answer and each of its chunks."""
    return {
        "id": id,
        "object": kind,
        "created": int(time.time()),
        "model": model.names[0],
        "system_fingerprint": fingerprint(model),
    }


def fingerprint(model: ServedModel) -> str:
    """Changes with what may change an answer to the same seed: the server's version and the model."""
    text = f"{__version__} {model.names[0]} {model.max_model_tokens} {model.tokenizer.vocab_tokens}"
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def json_response(value: object, status: int = 200) -> Response:
    """A value as a JSON answer, in UTF-8."""
    return Response(dumps(value).encode(), status, media_type="application/json")


def dumps(value: object) -> str:
    """Compact JSON; a number that JSON lacks is a fault of ours."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(value: object) -> bytes:
    """A value as one server-sent event."""
    return f"data: {dumps(value)}\n\n".encode()
