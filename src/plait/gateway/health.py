"""Is it alive, can it serve, how busy is it: for load balancers, for Prometheus and for the web page."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from plait import __version__
from plait.cluster import format_blocks
from plait.gateway.errors import http_reply, openai_body
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.openai_documents import json_responses
from plait.gateway.openai_json import json_response
from plait.worker import EngineState

router = APIRouter(route_class=JsonRoute, tags=["operation"])

_RETRY_AFTER_S = 2

_MESSAGES: dict[EngineState, str] = {
    "ready": "Ready",
    "loading": "Loading model",
    "draining": "Shutting down",
    "failed": "Engine failed",
}


@router.get("/health", responses=json_responses("It can serve."))
@router.get("/readyz", responses=json_responses("It can serve."))
async def health(door: Door) -> Response:
    """200 if a request sent now would be served; else 503 with the reason, and progress while loading."""
    state = door.engine.state
    missing = door.swarm.missing_blocks() if door.swarm is not None and state == "ready" else ()
    if state == "ready" and not missing:
        return json_response({"status": "ok"})
    message = _MESSAGES[state] if not missing else f"No machine serves blocks {format_blocks(missing)}"
    if state == "failed" and door.engine.failure is not None:
        message = f"{message}: {door.engine.failure.message}"
    # llama.cpp's shape, for those who wait for it: the code is the status, as a number.
    body: dict[str, Any] = {"error": {"code": 503, "message": message, "type": "unavailable_error"}}
    if state == "loading":
        body["loading"] = _loading_object(door)
    response = json_response(body, 503)
    response.headers["retry-after"] = str(_RETRY_AFTER_S)
    return response


@router.get("/healthz", responses=json_responses("The process answers."))
async def alive(door: Door) -> Response:
    """200 while the process answers and its engine has not failed: restart it otherwise."""
    if door.engine.state == "failed":
        reason = door.engine.failure.message if door.engine.failure is not None else "it stopped"
        return json_response(openai_body(http_reply(503, f"the engine has failed: {reason}")), 503)
    return json_response({"status": "ok"})


@router.get("/version", responses=json_responses("The server's version.", errors=False))
async def version() -> Response:
    """The server's version."""
    return json_response({"version": __version__})


@router.get("/status", responses=json_responses("How busy the server is.", errors=False))
async def status(door: Door) -> Response:
    """How busy the server is, as of the engine's latest step."""
    counts = door.engine.status()
    is_loaded = door.engine.state in ("ready", "draining")
    return json_response(
        {
            "state": door.engine.state,
            "model": door.engine.names[0],
            "swarm": door.swarm is not None,
            "max_model_tokens": door.engine.model.max_model_tokens if is_loaded else None,
            "running": counts.running,
            "waiting": counts.waiting,
            "swapped": counts.swapped,
            "kv_blocks_used": counts.kv_blocks_used,
            "kv_blocks_total": counts.kv_blocks_total,
            "kv_blocks_cached": counts.kv_blocks_cached,
            "tokens_per_s": round(door.metrics.token_rate.per_s(time.monotonic()), 2),
            "prompt_tokens_total": counts.prompt_tokens_total,
            "generated_tokens_total": counts.generated_tokens_total,
            "preemptions_total": counts.preemptions_total,
            "prefix_query_tokens_total": counts.prefix_query_tokens_total,
            "prefix_hit_tokens_total": counts.prefix_hit_tokens_total,
            "uptime_s": int(time.time()) - door.started_unix_s,
            "version": __version__,
            "loading": _loading_object(door) if door.engine.state == "loading" else None,
            "failure": door.engine.failure.message if door.engine.failure is not None else None,
        }
    )


@router.get(
    "/metrics", responses={200: {"description": "Prometheus metrics.", "content": {"text/plain": {}}}}
)
async def metrics(request: Request, door: Door) -> Response:
    """Every metric, in Prometheus' text format or OpenMetrics."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(door.metrics.registry), headers={"content-type": content_type})


def _loading_object(door: FrontDoor) -> dict[str, Any]:
    progress = door.engine.load_progress
    known = progress.total_bytes > 0
    return {
        "state": door.engine.state,
        "stage": progress.stage,
        "percent": round(100 * progress.done_bytes / progress.total_bytes, 1) if known else None,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes if known else None,
    }
