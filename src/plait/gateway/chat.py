"""`/v1/chat/completions`: one turn in OpenAI's older dialect, whole or streamed."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, assert_never

from fastapi import APIRouter, Request, Response

from plait.errors import EngineFailure
from plait.gateway.chat_request import ChatRequest
from plait.gateway.disconnect import unless_disconnected
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.logprobs import chat_logprobs, prompt_logprobs_object
from plait.gateway.openai_documents import generation_responses
from plait.gateway.openai_json import DONE, answer_head, dumps, event, json_response, new_id, usage_object
from plait.gateway.sse import EventStream
from plait.gateway.turn import ChoiceEnd, TextDelta, ToolCallArguments, ToolCallStart, Turn, TurnEnd, run_turn
from plait.worker import ServedModel

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/chat/completions", responses=generation_responses("A chat completion."))
async def create_chat_completion(body: ChatRequest, request: Request, door: Door) -> Response:
    """Answer a chat, whole or (`stream: true`) as server-sent events."""
    turn = body.turn()
    model = await unless_disconnected(request, door.ready_model(body.model))
    id = request.scope["plait.response_id"] = new_id("chatcmpl")
    if body.stream:
        return EventStream(_stream(door, model, turn, id, body), door.options)
    return json_response(await unless_disconnected(request, _whole(door, model, turn, id, body)))


# -- whole ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answer:
    """One choice while it is collected."""

    text: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    arguments: list[list[str]] = field(default_factory=list[list[str]])
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def choice(self, index: int, body: ChatRequest) -> dict[str, Any]:
        text = "".join(self.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            for call, fragments in zip(self.calls, self.arguments, strict=True):
                call["function"]["arguments"] = "".join(fragments)
            message["content"] = text or None
            message["tool_calls"] = self.calls
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if body.logprobs else None,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = self.token_ids
        return choice


async def _whole(
    door: FrontDoor, model: ServedModel, turn: Turn, id: str, body: ChatRequest
) -> dict[str, Any]:
    answers = [_Answer() for _ in range(turn.sampling.n)]
    end: TurnEnd | None = None
    async with aclosing(run_turn(door, turn, id)) as events:
        async for turn_event in events:
            match turn_event:
                case TextDelta(choice, text, token_ids, logprobs):
                    answers[choice].text.append(text)
                    answers[choice].token_ids.extend(token_ids)
                    if logprobs:
                        answers[choice].logprobs += chat_logprobs(model.tokenizer, logprobs)
                case ToolCallStart(choice, _, call_id, name):
                    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
                    answers[choice].calls.append(call)
                    answers[choice].arguments.append([])
                case ToolCallArguments(choice, index, fragment):
                    answers[choice].arguments[index].append(fragment)
                case ChoiceEnd(choice, finish_reason, stop_reason):
                    answers[choice].finish_reason = finish_reason
                    answers[choice].stop_reason = stop_reason
                case TurnEnd():
                    end = turn_event
                case _:
                    assert_never(turn_event)
    if end is None:
        raise EngineFailure("the engine ended without an answer")
    whole = answer_head(id, "chat.completion", model)
    whole["choices"] = [answer.choice(index, body) for index, answer in enumerate(answers)]
    whole["usage"] = usage_object(end.prompt_tokens, end.completion_tokens, end.cached_tokens)
    if end.prompt_logprobs is not None:
        whole["prompt_logprobs"] = prompt_logprobs_object(model.tokenizer, end.prompt_logprobs)
    if body.return_token_ids:
        whole["prompt_token_ids"] = list(end.prompt_token_ids)
    return whole


# -- streamed ------------------------------------------------------------------------------------------


class _Chunks:
    """Writes the chunks of one stream; what never changes is written once.

    Every token of every stream passes here, so a text chunk is one concatenation and one encoding.
    """

    def __init__(self, model: ServedModel, id: str, body: ChatRequest) -> None:
        self._model = model
        self._shows_token_ids = bool(body.return_token_ids)
        self._shows_logprobs = bool(body.logprobs)
        self._head = answer_head(id, "chat.completion.chunk", model)
        if body.includes_usage:
            self._head["usage"] = None
        opening = "data: " + dumps(self._head)[:-1] + ',"choices":[{"index":'
        self._text_heads = [f'{opening}{index},"delta":{{"content":' for index in range(body.n or 1)]

    def opening(self, choice: int) -> bytes:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def text(self, delta: TextDelta) -> bytes:
        if not self._shows_logprobs and not self._shows_token_ids:
            return self._plain_text(delta.choice, delta.text) if delta.text else b""
        if not delta.text and not delta.token_ids:
            return b""
        logprobs = None
        if delta.logprobs is not None:
            logprobs = {"content": chat_logprobs(self._model.tokenizer, delta.logprobs), "refusal": None}
        extra = {"token_ids": list(delta.token_ids)} if self._shows_token_ids else {}
        return self._chunk(delta.choice, {"content": delta.text}, logprobs=logprobs, **extra)

    def call(self, start: ToolCallStart) -> bytes:
        function = {"name": start.name, "arguments": ""}
        call = {"index": start.index, "id": start.call_id, "type": "function", "function": function}
        return self._chunk(start.choice, {"tool_calls": [call]})

    def arguments(self, arguments: ToolCallArguments) -> bytes:
        call = {"index": arguments.index, "function": {"arguments": arguments.fragment}}
        return self._chunk(arguments.choice, {"tool_calls": [call]})

    def choice_end(self, end: ChoiceEnd) -> bytes:
        return self._chunk(end.choice, {}, finish_reason=end.finish_reason, stop_reason=end.stop_reason)

    def usage(self, end: TurnEnd) -> bytes:
        usage = usage_object(end.prompt_tokens, end.completion_tokens, end.cached_tokens)
        return event({**self._head, "choices": [], "usage": usage})

    def _plain_text(self, choice: int, text: str) -> bytes:
        head = self._text_heads[choice]
        return f'{head}{encode_basestring(text)}}},"logprobs":null,"finish_reason":null}}]}}\n\n'.encode()

    def _chunk(self, choice: int, delta: dict[str, Any], **fields: object) -> bytes:
        base = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
        return event({**self._head, "choices": [{**base, **fields}]})


async def _stream(
    door: FrontDoor, model: ServedModel, turn: Turn, id: str, body: ChatRequest
) -> AsyncGenerator[bytes, None]:
    chunks = _Chunks(model, id, body)
    opened = False
    async with aclosing(run_turn(door, turn, id)) as events:
        async for turn_event in events:
            if not opened:
                opened = True
                yield b"".join(chunks.opening(choice) for choice in range(turn.sampling.n))
            match turn_event:
                case TextDelta():
                    if chunk := chunks.text(turn_event):
                        yield chunk
                case ToolCallStart():
                    yield chunks.call(turn_event)
                case ToolCallArguments():
                    yield chunks.arguments(turn_event)
                case ChoiceEnd():
                    yield chunks.choice_end(turn_event)
                case TurnEnd():
                    if body.includes_usage:
                        yield chunks.usage(turn_event)
                case _:
                    assert_never(turn_event)
    yield DONE
