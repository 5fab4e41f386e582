"""One chat turn, apart from any API dialect: the question, the events that answer it, and what runs it.

A dialect (chat completions, responses, messages) translates its request into a `Turn`, iterates `run_turn`,
and writes the events its own way. Order of the events, for each choice:

    TextDelta | ToolCallStart | ToolCallArguments   any number; a call's start before its arguments,
                                                    one call after the other
    ChoiceEnd                                       once
    TurnEnd                                         once, after every choice, last of all

Errors are raised, never events: `ServingError` before or between events.

How the package `tool_calls` is used here (it never imports this file):

    tool_call_format(asked: str, tokenizer) -> str                 "auto" becomes a known format's name
    tool_constraint(format, tools, choice, parallel) -> Constraint | None     None: write freely
    parser = tool_call_parser(format, tools, choice)               one per choice, only if tools may be called
    parser.push(text: str) -> list[Part]                           whole text as it arrives; may hold back
    parser.finish() -> list[Part]                                  what was held back, at its end
"""

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from plait.errors import BadRequest, EngineFailure
from plait.gateway.front_door import FrontDoor
from plait.gateway.prompt import check_room, off_loop_if_long
from plait.gateway.tool_calls import (
    CallArguments,
    CallStart,
    NamedTool,
    Part,
    TextPart,
    ToolCallParser,
    ToolChoice,
    ToolFormat,
    ToolSpec,
    tool_call_format,
    tool_call_parser,
    tool_constraint,
)
from plait.ids import RequestId
from plait.session import GenerationRequest, PositionLogprobs, RouteAsk, SamplingParams, SequenceDelta

__all__ = [
    "ChoiceEnd",
    "NamedTool",
    "TextDelta",
    "ToolCallArguments",
    "ToolCallStart",
    "ToolChoice",
    "ToolSpec",
    "Turn",
    "TurnEnd",
    "TurnEvent",
    "run_turn",
    "turn_prompt",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A chat so far, and how to answer it.

    `messages` are as chat templates read them: role, content (a string, or None beside tool calls), and for
    tools `tool_calls` (with `function.arguments` as a mapping) and `tool_call_id`.
    """

    messages: tuple[dict[str, Any], ...]
    sampling: SamplingParams
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    priority: int = 0
    cache_salt: str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    route: RouteAsk | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of one choice; `token_ids` and `logprobs` are those behind it and may come with empty text."""

    choice: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model begins to call a tool; `index` counts the calls of the choice."""

    choice: int
    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next part of a call's arguments, which together are one JSON object."""

    choice: int
    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """A choice is complete; `stop_reason` is the stop string or token id that ended it, if one did."""

    choice: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The turn is complete; tokens over all choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None


TurnEvent = TextDelta | ToolCallStart | ToolCallArguments | ChoiceEnd | TurnEnd


async def turn_prompt(door: FrontDoor, turn: Turn) -> tuple[int, ...]:
    """The prompt of a turn in token ids; also what an API that counts tokens wants.

    Raises:
        BadRequest: the chat template refuses these messages.
        NotReady: no model is loaded.
    """
    shown_tools = () if turn.tool_choice == "none" else turn.tools
    for name in turn.chat_template_kwargs:
        if name in _TEMPLATE_ARGUMENTS or not name.isidentifier():
            raise BadRequest(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
    encode = partial(
        door.engine.model.tokenizer.encode_chat,
        turn.messages,
        [tool.for_template() for tool in shown_tools] or None,
        turn.add_generation_prompt and not turn.continue_final_message,
        continue_final_message=turn.continue_final_message,
        **turn.chat_template_kwargs,
    )
    characters = sum(_content_characters(message) for message in turn.messages)
    return tuple(await off_loop_if_long(encode, characters))


async def run_turn(
    door: FrontDoor, turn: Turn, request_id: str, prompt_token_ids: tuple[int, ...] | None = None
) -> AsyncGenerator[TurnEvent, None]:
    """Answer a turn; closing the iterator early aborts it.

    `prompt_token_ids` is `turn_prompt` of the turn, from a caller that needed it before.

    Raises:
        BadRequest: the turn cannot be served as it is.
        NoCapacity, EngineFailure: as the engine says; possibly after some events.
    """
    if prompt_token_ids is None:
        prompt_token_ids = await turn_prompt(door, turn)
    tool_format = _tool_format(door, turn)
    sampling = check_room(door.engine.model, len(prompt_token_ids), _constrained(turn, tool_format))
    request = GenerationRequest(
        id=RequestId(request_id),
        prompt_token_ids=prompt_token_ids,
        sampling=sampling,
        priority=turn.priority,
        cache_salt=turn.cache_salt,
        continues_text=turn.continue_final_message,
        route=door.accepted_route(turn.route),
    )
    choices = [
        _Choice(
            index,
            tool_call_parser(tool_format, turn.tools, turn.tool_choice) if tool_format else None,
            parallel=turn.parallel_tool_calls,
        )
        for index in range(sampling.n)
    ]
    completion_tokens = 0
    prompt_logprobs = None
    async with aclosing(door.generate(request)) as deltas:
        async for delta in deltas:
            for sequence in delta.sequences:
                completion_tokens += len(sequence.token_ids)
                for event in choices[sequence.index].events(sequence):
                    yield event
            if delta.prompt_logprobs is not None:
                prompt_logprobs = delta.prompt_logprobs
            if delta.finished:
                yield TurnEnd(
                    prompt_tokens=delta.prompt_tokens,
                    cached_tokens=delta.cached_tokens,
                    completion_tokens=completion_tokens,
                    prompt_token_ids=prompt_token_ids,
                    prompt_logprobs=prompt_logprobs,
                )


def _tool_format(door: FrontDoor, turn: Turn) -> ToolFormat | None:
    """How this answer may write calls; None if it may not call anything."""
    if turn.tool_choice == "none" or (turn.tool_choice == "auto" and not turn.tools):
        return None
    return tool_call_format(door.options.tool_format, door.engine.model.tokenizer)


def _constrained(turn: Turn, tool_format: ToolFormat | None) -> SamplingParams:
    """The turn's sampling, held to a call where one is demanded."""
    if tool_format is None:
        return turn.sampling
    constraint = tool_constraint(tool_format, turn.tools, turn.tool_choice, turn.parallel_tool_calls)
    if constraint is None:
        return turn.sampling
    if turn.sampling.constraint is not None:
        raise BadRequest(
            "tool_choice demands a call and response_format demands something else; leave out one of the two",
            param="tool_choice",
        )
    return replace(turn.sampling, constraint=constraint)


class _Choice:
    """Turns one sequence's deltas into events."""

    __slots__ = ("called", "index", "parallel", "parser")

    def __init__(self, index: int, parser: ToolCallParser | None, *, parallel: bool) -> None:
        self.index = index
        self.parser = parser
        self.parallel = parallel
        self.called = False

    def events(self, delta: SequenceDelta) -> Sequence[TurnEvent]:
        if self.parser is None:
            text = TextDelta(self.index, delta.text, delta.token_ids, delta.logprobs)
            return (text,) if delta.finish_reason is None else (text, self._end(delta))
        parts = list(self.parser.push(delta.text)) if delta.text else []
        if delta.finish_reason is not None:
            parts.extend(self.parser.finish())
        events = self._part_events(parts, delta)
        if delta.finish_reason is not None:
            events.append(self._end(delta))
        return events

    def _part_events(self, parts: Sequence[Part], delta: SequenceDelta) -> list[TurnEvent]:
        events: list[TurnEvent] = []
        token_ids, logprobs = delta.token_ids, delta.logprobs
        for part in parts:
            match part:
                case TextPart(text):
                    events.append(TextDelta(self.index, text, token_ids, logprobs))
                    token_ids, logprobs = (), None
                case CallStart(index, name) if self._allowed(index):
                    self.called = True
                    call_id = f"call_{uuid.uuid4().hex[:24]}"
                    events.append(ToolCallStart(self.index, index, call_id, name))
                case CallArguments(index, fragment) if self._allowed(index):
                    events.append(ToolCallArguments(self.index, index, fragment))
                case _:
                    pass
        if token_ids:
            events.append(TextDelta(self.index, "", token_ids, logprobs))
        return events

    def _allowed(self, index: int) -> bool:
        return index == 0 or self.parallel

    def _end(self, delta: SequenceDelta) -> ChoiceEnd:
        if delta.finish_reason == "abort" or delta.finish_reason is None:
            raise EngineFailure("the engine aborted the request")
        reason = "tool_calls" if self.called and delta.finish_reason == "stop" else delta.finish_reason
        return ChoiceEnd(self.index, reason, delta.stop_reason)


_TEMPLATE_ARGUMENTS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "self"}
)


def _content_characters(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return len(content) if isinstance(content, str) else 0
