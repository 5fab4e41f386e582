"""`/v1/responses`: one turn in OpenAI's newer dialect, whole or streamed, and the answers kept."""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from plait.errors import EngineFailure, ServingError
from plait.gateway.disconnect import unless_disconnected
from plait.gateway.errors import http_reply, reply_of
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.logprobs import chat_logprobs
from plait.gateway.openai_documents import generation_responses, json_responses
from plait.gateway.openai_json import dumps, json_response
from plait.gateway.responses.answer import Answer, Event
from plait.gateway.responses.document import new_response
from plait.gateway.responses.request import ResponsesRequest, messages_of_output, turn_of
from plait.gateway.responses.store import ResponseStore, StoredResponse
from plait.gateway.sse import EventStream
from plait.gateway.turn import Turn, TurnEnd, run_turn
from plait.session import PositionLogprobs

router = APIRouter(route_class=JsonRoute, tags=["generation"])


def store_of(request: Request) -> ResponseStore:
    """The app's store of answers, made when it is first wanted."""
    state = request.app.state
    if not hasattr(state, "response_store"):
        state.response_store = ResponseStore()
    return state.response_store


Store = Annotated[ResponseStore, Depends(store_of)]


@router.post("/v1/responses", responses=generation_responses("A response."))
async def create_response(body: ResponsesRequest, request: Request, door: Door, store: Store) -> Response:
    """Answer a conversation, whole or (`stream: true`) as server-sent events."""
    history = ()
    if body.previous_response_id is not None:
        history = store.get(body.previous_response_id, time.monotonic()).messages
    turn, conversation = turn_of(body, history)
    model = await unless_disconnected(request, door.ready_model(body.model))

    def write_logprobs(positions: Sequence[PositionLogprobs]) -> list[dict[str, Any]]:
        return chat_logprobs(model.tokenizer, positions)

    answer = Answer(new_response(body, model), write_logprobs)
    request.scope["plait.response_id"] = answer.response["id"]

    def keep() -> None:
        if body.store is not False:
            messages = (*conversation, *messages_of_output(answer.response["output"]))
            size_bytes = len(dumps((answer.response, messages[len(history) :])))
            stored = StoredResponse(response=answer.response, messages=messages, size_bytes=size_bytes)
            store.put(stored, time.monotonic())

    run = _Run(door, turn, answer, keep)
    if body.stream:
        return EventStream(run.streamed(), door.options)
    return json_response(await unless_disconnected(request, run.whole()))


@router.get("/v1/responses/{response_id}", responses=json_responses("A response."))
async def get_response(response_id: str, store: Store) -> Response:
    """Return an answer that is still kept."""
    return json_response(store.get(response_id, time.monotonic()).response)


@router.delete("/v1/responses/{response_id}", responses=json_responses("What was deleted."))
async def delete_response(response_id: str, store: Store) -> Response:
    """Forget an answer."""
    store.delete(response_id, time.monotonic())
    return json_response({"id": response_id, "object": "response", "deleted": True})


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a turn; `keep` is called when the answer is complete and not yet sent."""

    door: FrontDoor
    turn: Turn
    answer: Answer
    keep: Callable[[], None]

    async def whole(self) -> dict[str, Any]:
        async for _ in self._events():
            pass
        return self.answer.response

    async def streamed(self) -> AsyncGenerator[bytes, None]:
        begun = False
        try:
            async with aclosing(self._events()) as steps:
                async for events in steps:
                    begun = True
                    if events:
                        yield _encode(events)
        except Exception as error:
            if begun:
                known = isinstance(error, ServingError)
                reply = (
                    reply_of(error) if known else http_reply(500, "the server failed to answer this request")
                )
                yield _encode(self.answer.fail(reply))
            raise

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        begun = ended = False
        async with aclosing(run_turn(self.door, self.turn, self.answer.response["id"])) as turn_events:
            async for turn_event in turn_events:
                if not begun:
                    begun = True
                    yield self.answer.begin()
                events = self.answer.on(turn_event)
                if isinstance(turn_event, TurnEnd):
                    ended = True
                    self.keep()
                yield events
        if not ended:
            raise EngineFailure("the engine ended without an answer")


def _encode(events: Sequence[Event]) -> bytes:
    return "".join(f"event: {event['type']}\ndata: {dumps(event)}\n\n" for event in events).encode()
