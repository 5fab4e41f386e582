"""`/v1/models`: what this server serves, known before it is loaded."""

from typing import Any

from fastapi import APIRouter, Response

from plait.errors import NotFound
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.openai_documents import json_responses
from plait.gateway.openai_json import json_response

router = APIRouter(route_class=JsonRoute, tags=["models"])


@router.get("/v1/models", responses=json_responses("The served model under each of its names."))
async def list_models(door: Door) -> Response:
    """List the served model under each of its names."""
    return json_response(
        {"object": "list", "data": [_model_object(door, name) for name in door.engine.names]}
    )


@router.get("/v1/models/{model_id:path}", responses=json_responses("One model."))
async def retrieve_model(model_id: str, door: Door) -> Response:
    """Describe one model."""
    if model_id not in door.engine.names:
        raise NotFound(f"the model {model_id!r} does not exist here; see /v1/models", param="model")
    return json_response(_model_object(door, model_id))


def _model_object(door: FrontDoor, name: str) -> dict[str, Any]:
    is_loaded = door.engine.state in ("ready", "draining")
    return {
        "id": name,
        "object": "model",
        "created": door.engine.model.created_unix_s if is_loaded else door.started_unix_s,
        "owned_by": "plait",
        "root": door.engine.names[0],
        "parent": None,
        "max_model_len": door.engine.model.max_model_tokens if is_loaded else None,
        "permission": [],
    }
