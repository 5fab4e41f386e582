"""The bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat turn they ask for."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from plait.errors import BadRequest
from plait.gateway.content_type import content_type
from plait.gateway.tool_calls import NamedTool, ToolChoice, ToolSpec
from plait.gateway.turn import Turn
from plait.gateway.wire import FirstError, WireModel
from plait.session import Constraint, SamplingParams

Message = dict[str, Any]
"""A message as chat templates read it."""


class TextBlock(WireModel):
    type: Literal["text"]
    text: str


class ToolUseBlock(WireModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OtherBlock(WireModel):
    """A kind of content that this server cannot read."""

    type: str


def _is_text(value: Any) -> str:
    return "text" if content_type(value) == "text" else "other"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[OtherBlock, Tag("other")], Discriminator(_is_text)
]


class ToolResultBlock(WireModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultBlock], FirstError()] = ""
    is_error: bool | None = None


class ThinkingBlock(WireModel):
    """Thinking of an earlier answer; chat templates leave it out of the prompt, and so do we."""

    type: Literal["thinking", "redacted_thinking"]


_BLOCK_TAGS = {
    "text": "text",
    "tool_use": "tool_use",
    "tool_result": "tool_result",
    "thinking": "thinking",
    "redacted_thinking": "thinking",
}


def _block_tag(value: Any) -> str:
    return _BLOCK_TAGS.get(content_type(value), "other")


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_block_tag),
]


class InputMessage(WireModel):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], FirstError()]


class Tool(WireModel):
    """A tool of the client's own; the API's built-in ones have other types and are refused by name."""

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class Choice(WireModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(WireModel):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    format: OutputFormat | None = None


class CountTokensRequest(WireModel):
    """Body of POST /v1/messages/count_tokens; fields that it does not name are ignored."""

    model: str | None = None
    messages: Annotated[list[InputMessage], FirstError(), Field(min_length=1)]
    system: str | Annotated[list[TextBlock], FirstError()] | None = None
    tools: Annotated[list[Tool], FirstError()] | None = None
    tool_choice: Choice | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages; fields that it does not name are ignored."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[str], FirstError()] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


def turn_of(body: CountTokensRequest) -> Turn:
    """The turn that a request asks for.

    Raises:
        BadRequest: it asks for something that this server does not do; the message names it.
    """
    messages = _messages(body.messages)
    if isinstance(body.system, str) and body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    elif body.system:
        text = "\n".join(block.text for block in body.system)
        messages.insert(0, {"role": "system", "content": text})
    tools, choice, parallel = _tools(body)
    return Turn(
        messages=tuple(messages),
        sampling=_sampling(body) if isinstance(body, MessagesRequest) else SamplingParams(),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        continue_final_message=_is_prefilled(messages),
    )


def _sampling(body: MessagesRequest) -> SamplingParams:
    format = body.output_config.format if body.output_config else None
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        constraint=None
        if format is None
        else Constraint(kind="json_schema", text=json.dumps(format.json_schema)),
    )


def _is_prefilled(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer, to be continued."""
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    where = "messages"
    if "tool_calls" in last:
        raise BadRequest(
            "the last message has tool_use blocks; answer them with tool_result blocks in a user message",
            param=where,
        )
    if not last["content"] or last["content"] != last["content"].rstrip():
        raise BadRequest(
            "the last message is the assistant's and must be the beginning of its answer: not empty, and "
            "without white space at its end",
            param=where,
        )
    return True


def _messages(given: Sequence[InputMessage]) -> list[Message]:
    messages: list[Message] = []
    for index, message in enumerate(given):
        where = f"messages.{index}.content"
        content = message.content
        blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else content
        for place, block in enumerate(blocks):
            _add_block(messages, message.role, block, f"{where}.{place}")
    if not messages:
        raise BadRequest("messages have no content", param="messages")
    return messages


def _add_block(messages: list[Message], role: str, block: Any, where: str) -> None:
    """Add a block to the conversation; neighbouring texts of one role are one message, as the API has it."""
    match block:
        case TextBlock(text=text):
            last = messages[-1] if messages else None
            if last is not None and last["role"] == role and "tool_calls" not in last:
                last["content"] += "\n" + text
            else:
                messages.append({"role": role, "content": text})
        case ToolUseBlock(id=id, name=name, input=input) if role == "assistant":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": name, "arguments": input}
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": id, "type": "function", "function": function})
        case ToolResultBlock(tool_use_id=id, content=content) if role == "user":
            messages.append({"role": "tool", "tool_call_id": id, "content": _result_text(content, where)})
        case ThinkingBlock():
            pass
        case ToolUseBlock() | ToolResultBlock():
            raise BadRequest(f"{where}: a {role} message cannot have a {block.type} block", param=where)
        case _:
            known = ", ".join(_BLOCK_TAGS)
            raise BadRequest(f"{where} has type {block.type!r}; this server reads {known}", param=where)


def _result_text(content: str | Sequence[TextBlock | OtherBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for place, block in enumerate(content):
        if not isinstance(block, TextBlock):
            at = f"{where}.content.{place}"
            raise BadRequest(f"{at} has type {block.type!r}; this server reads text only", param=at)
        texts.append(block.text)
    return "\n".join(texts)


def _tools(body: CountTokensRequest) -> tuple[tuple[ToolSpec, ...], ToolChoice, bool]:
    tools: list[ToolSpec] = []
    for index, tool in enumerate(body.tools or ()):
        where = f"tools.{index}"
        if tool.type not in (None, "custom"):
            raise BadRequest(
                f"{where} has type {tool.type!r}; this server offers only tools with an input_schema",
                param=f"{where}.type",
            )
        if tool.input_schema is None:
            raise BadRequest(f"{where}.input_schema: Field required", param=f"{where}.input_schema")
        tools.append(
            ToolSpec(name=tool.name, description=tool.description or "", parameters=tool.input_schema)
        )
    choice = body.tool_choice
    if choice is None:
        return tuple(tools), "auto", True
    return tuple(tools), _choice(choice), not choice.disable_parallel_tool_use


def _choice(choice: Choice) -> ToolChoice:
    match choice.type:
        case "tool":
            if not choice.name:
                raise BadRequest("tool_choice.name: Field required", param="tool_choice.name")
            return NamedTool(choice.name)
        case "any":
            return "required"
        case "auto" | "none":
            return choice.type
