"""`/v1/messages`: one turn in Anthropic's dialect, whole or streamed, and the counting of its tokens."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from plait.errors import EngineFailure
from plait.gateway.anthropic.answer import Answer, Event
from plait.gateway.anthropic.documents import COUNT_RESPONSES, MESSAGE_RESPONSES
from plait.gateway.anthropic.errors import ANTHROPIC_ERRORS
from plait.gateway.anthropic.request import CountTokensRequest, MessagesRequest, turn_of
from plait.gateway.disconnect import unless_disconnected
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.openai_json import dumps, json_response
from plait.gateway.sse import EventStream
from plait.gateway.turn import Turn, TurnEnd, run_turn, turn_prompt

router = APIRouter(route_class=JsonRoute, tags=["generation"])

PING_EVENT: Event = {"type": "ping"}


@router.post("/v1/messages", responses=MESSAGE_RESPONSES)
async def create_message(body: MessagesRequest, request: Request, door: Door) -> Response:
    """Answer a conversation, whole or (`stream: true`) as server-sent events."""
    turn = turn_of(body)
    model = await unless_disconnected(request, door.ready_model(body.model))
    prompt_token_ids = await turn_prompt(door, turn)
    room_tokens = model.max_model_tokens - len(prompt_token_ids)
    fills_context = body.max_tokens > room_tokens
    if fills_context:
        turn = replace(turn, sampling=replace(turn.sampling, max_tokens=None))
    id = request.scope["plait.response_id"] = f"msg_{uuid.uuid4().hex[:24]}"
    answer = Answer(id, model.names[0], len(prompt_token_ids), fills_context=fills_context)
    run = _Run(door, turn, prompt_token_ids, answer)
    if body.stream:
        ping = _encode([PING_EVENT])
        return EventStream(run.streamed(), door.options, errors=ANTHROPIC_ERRORS, ping=ping)
    return json_response(await unless_disconnected(request, run.whole()))


@router.post("/v1/messages/count_tokens", responses=COUNT_RESPONSES)
async def count_tokens(body: CountTokensRequest, request: Request, door: Door) -> Response:
    """Count the tokens that a conversation's prompt has."""
    turn = turn_of(body)
    await unless_disconnected(request, door.ready_model(body.model))
    return json_response({"input_tokens": len(await turn_prompt(door, turn))})


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a turn."""

    door: FrontDoor
    turn: Turn
    prompt_token_ids: tuple[int, ...]
    answer: Answer

    async def whole(self) -> dict[str, Any]:
        async for _ in self._events():
            pass
        return self.answer.message

    async def streamed(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._events()) as steps:
            async for events in steps:
                if events:
                    yield _encode(events)

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        begun = ended = False
        id = self.answer.message["id"]
        async with aclosing(run_turn(self.door, self.turn, id, self.prompt_token_ids)) as turn_events:
            async for turn_event in turn_events:
                if not begun:
                    begun = True
                    yield [*self.answer.begin(), PING_EVENT]
                ended = isinstance(turn_event, TurnEnd)
                yield self.answer.on(turn_event)
        if not ended:
            raise EngineFailure("the engine ended without an answer")


def _encode(events: Sequence[Event]) -> bytes:
    return "".join(f"event: {event['type']}\ndata: {dumps(event)}\n\n" for event in events).encode()
