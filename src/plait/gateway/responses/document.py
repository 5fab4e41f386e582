"""The response object before anything is generated: its id, and what was asked, echoed."""

import time
import uuid
from typing import Any

from plait.gateway.responses.request import ResponsesRequest
from plait.worker import ServedModel


def new_response(body: ResponsesRequest, model: ServedModel) -> dict[str, Any]:
    """A response in progress."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model.names[0],
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": _text(body),
        "tool_choice": _tool_choice(body),
        "tools": [_tool(tool.model_dump()) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _text(body: ResponsesRequest) -> dict[str, Any]:
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    return {"format": {"type": "text"}, "verbosity": "medium", **text}


def _tool_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return choice.model_dump()


def _tool(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "parameters": given["parameters"] or {}, "strict": bool(given["strict"])}
