"""`/v1/completions`: continue texts or token ids, several prompts in one call, whole or streamed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

from fastapi import APIRouter, Request, Response

from plait.errors import BadRequest, EngineFailure
from plait.gateway.completion_request import CompletionRequest
from plait.gateway.disconnect import unless_disconnected
from plait.gateway.front_door import Door, FrontDoor
from plait.gateway.json_body import JsonRoute
from plait.gateway.logprobs import LegacyLogprobs, prompt_logprobs_object
from plait.gateway.openai_documents import generation_responses
from plait.gateway.openai_json import DONE, answer_head, dumps, event, json_response, new_id, usage_object
from plait.gateway.prompt import check_room, text_prompt
from plait.gateway.sse import EventStream
from plait.ids import RequestId
from plait.session import GenerationRequest, PositionLogprobs, RequestDelta, SequenceDelta
from plait.worker import ServedModel

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/completions", responses=generation_responses("Completions of one or several prompts."))
async def create_completion(body: CompletionRequest, request: Request, door: Door) -> Response:
    """Continue each prompt, whole or (`stream: true`) as server-sent events."""
    model = await unless_disconnected(request, door.ready_model(body.model))
    id = request.scope["plait.response_id"] = new_id("cmpl")
    calls = await unless_disconnected(request, _engine_requests(door, model, id, body))
    if body.stream:
        return EventStream(_stream(door, model, calls, id, body), door.options)
    return json_response(await unless_disconnected(request, _whole(door, model, calls, id, body)))


async def _engine_requests(
    door: FrontDoor, model: ServedModel, id: str, body: CompletionRequest
) -> tuple[GenerationRequest, ...]:
    sampling = body.sampling_params()
    prompts = body.prompts
    if len(prompts) > door.options.max_prompts:
        raise BadRequest(
            f"{len(prompts)} prompts in one request; this server takes {door.options.max_prompts}",
            param="prompt",
        )
    requests: list[GenerationRequest] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            token_ids = await text_prompt(model, prompt, add_special_tokens=special)
        else:
            token_ids = tuple(prompt)
        if not token_ids:
            raise BadRequest("the prompt is empty; give at least one token", param="prompt")
        requests.append(
            GenerationRequest(
                id=RequestId(f"{id}-{index}"),
                prompt_token_ids=token_ids,
                sampling=check_room(model, len(token_ids), sampling),
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
                route=door.accepted_route(body.route_ask),
            )
        )
    return tuple(requests)


async def _deltas(
    door: FrontDoor, calls: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, RequestDelta], None]:
    """What all calls gain, as it comes, each with the number of its prompt."""
    if len(calls) == 1:
        async with aclosing(door.generate(calls[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, RequestDelta | Exception | None]] = asyncio.Queue(maxsize=len(calls))

    async def pump(index: int, call: GenerationRequest) -> None:
        try:
            async with aclosing(door.generate(call)) as deltas:
                async for delta in deltas:
                    await arrived.put((index, delta))
            await arrived.put((index, None))
        except Exception as error:
            await arrived.put((index, error))

    pumps = [asyncio.create_task(pump(index, call)) for index, call in enumerate(calls)]
    try:
        open_calls = len(calls)
        while open_calls:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_calls -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass(slots=True)
class _Choice:
    """One continuation of one prompt: what it has gained and how its parts are written."""

    index: int
    prompt: GenerationRequest
    echo_text: str | None
    logprobs: LegacyLogprobs | None
    text: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    positions: list[PositionLogprobs | None] = field(default_factory=list[PositionLogprobs | None])
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def take(self, delta: SequenceDelta, *, prompt_only: bool) -> None:
        if not prompt_only:
            self.text.append(delta.text)
            self.token_ids.extend(delta.token_ids)
            self.positions.extend(delta.logprobs or ())
        if delta.finish_reason == "abort":
            raise EngineFailure("the engine aborted the request")
        if delta.finish_reason is not None:
            self.finish_reason = "length" if prompt_only else delta.finish_reason
            self.stop_reason = None if prompt_only else delta.stop_reason

    def take_echo(self, prompt_logprobs: Sequence[PositionLogprobs | None] | None) -> None:
        """Put the prompt before what follows."""
        if self.echo_text is not None:
            self.text.append(self.echo_text)
            self.token_ids.extend(self.prompt.prompt_token_ids)
            self.positions.extend(prompt_logprobs or ())
            self.echo_text = None

    def flush(self, body: CompletionRequest) -> dict[str, Any]:
        """The JSON object of what was gained since the last call."""
        written: dict[str, Any] = {"index": self.index, "text": "".join(self.text), "logprobs": None}
        if self.logprobs is not None:
            written["logprobs"] = self.logprobs.take(self.positions, self.prompt.prompt_token_ids[0])
        written["finish_reason"] = self.finish_reason
        written["stop_reason"] = self.stop_reason
        if body.return_token_ids:
            written["token_ids"] = list(self.token_ids)
        self.text.clear()
        self.token_ids.clear()
        self.positions.clear()
        return written


@dataclass(slots=True)
class _Counts:
    """Tokens over all prompts, each prompt counted once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def take(self, delta: RequestDelta, *, prompt_only: bool) -> None:
        if not prompt_only:
            self.completion_tokens += sum(len(sequence.token_ids) for sequence in delta.sequences)
        if delta.finished:
            self.prompt_tokens += delta.prompt_tokens
            self.cached_tokens += delta.cached_tokens

    def usage(self) -> dict[str, Any]:
        return usage_object(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


def _choices(
    model: ServedModel, calls: Sequence[GenerationRequest], body: CompletionRequest
) -> list[list[_Choice]]:
    """For each prompt its choices; they are numbered through."""
    prompts = body.prompts
    choices: list[list[_Choice]] = []
    for prompt, call in zip(prompts, calls, strict=True):
        echo_text = None
        if body.echo:
            echo_text = (
                prompt
                if isinstance(prompt, str)
                else model.tokenizer.decode(prompt, skip_special_tokens=False)
            )
        n = call.sampling.n
        choices.append(
            [
                _Choice(
                    index=len(choices) * n + sample,
                    prompt=call,
                    echo_text=echo_text,
                    logprobs=None
                    if body.logprobs is None
                    else LegacyLogprobs(model.tokenizer, top=body.logprobs > 0),
                )
                for sample in range(n)
            ]
        )
    return choices


async def _whole(
    door: FrontDoor, model: ServedModel, calls: Sequence[GenerationRequest], id: str, body: CompletionRequest
) -> dict[str, Any]:
    choices = _choices(model, calls, body)
    counts = _Counts()
    prompt_logprobs: dict[int, Sequence[PositionLogprobs | None]] = {}
    async with aclosing(_deltas(door, calls)) as deltas:
        async for at, delta in deltas:
            counts.take(delta, prompt_only=body.prompt_only)
            if delta.prompt_logprobs is not None:
                prompt_logprobs[at] = delta.prompt_logprobs
            for choice in choices[at]:
                choice.take_echo(delta.prompt_logprobs)
            for sequence in delta.sequences:
                choices[at][sequence.index].take(sequence, prompt_only=body.prompt_only)
    whole = answer_head(id, "text_completion", model)
    written_choices: list[dict[str, Any]] = []
    for at, of_prompt in enumerate(choices):
        for choice in of_prompt:
            written = choice.flush(body)
            if body.prompt_logprobs is not None and at in prompt_logprobs:
                written["prompt_logprobs"] = prompt_logprobs_object(model.tokenizer, prompt_logprobs[at])
            if body.return_token_ids:
                written["prompt_token_ids"] = list(calls[at].prompt_token_ids)
            written_choices.append(written)
    whole["choices"] = written_choices
    whole["usage"] = counts.usage()
    return whole


async def _stream(
    door: FrontDoor, model: ServedModel, calls: Sequence[GenerationRequest], id: str, body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    choices = _choices(model, calls, body)
    counts = _Counts()
    head = answer_head(id, "text_completion", model)
    if body.includes_usage:
        head["usage"] = None
    plain = body.logprobs is None and not body.return_token_ids
    opening = "data: " + dumps(head)[:-1] + ',"choices":[{"index":'
    async with aclosing(_deltas(door, calls)) as deltas:
        async for at, delta in deltas:
            counts.take(delta, prompt_only=body.prompt_only)
            for choice in choices[at]:
                choice.take_echo(delta.prompt_logprobs)
            for sequence in delta.sequences:
                choice = choices[at][sequence.index]
                choice.take(sequence, prompt_only=body.prompt_only)
                if plain and sequence.finish_reason is None:
                    # Every token of every stream passes here.
                    if text := "".join(choice.text):
                        choice.text.clear()
                        yield (
                            f'{opening}{choice.index},"text":{encode_basestring(text)},'
                            '"logprobs":null,"finish_reason":null}]}\n\n'
                        ).encode()
                elif sequence.token_ids or sequence.text or sequence.finish_reason:
                    yield event({**head, "choices": [choice.flush(body)]})
    if body.includes_usage:
        yield event({**head, "choices": [], "usage": counts.usage()})
    yield DONE
