"""The body of `/v1/chat/completions`, and the turn it asks for."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from plait.errors import BadRequest
from plait.gateway.sampling_fields import SamplingFields
from plait.gateway.tool_calls import NamedTool, ToolChoice, ToolSpec
from plait.gateway.turn import Turn
from plait.gateway.wire import FirstError, WireModel

# OpenAI allows 20; so does vLLM by default.
MAX_TOP_LOGPROBS = 20


class ContentPart(WireModel):
    """A part of a message; this server reads text."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(WireModel):
    """What an assistant called; `arguments` is a JSON object written as a string."""

    name: str
    arguments: str | None = None


class ToolCall(WireModel):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(WireModel):
    """One message of the chat so far."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], FirstError()] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(WireModel):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(WireModel):
    """A tool; functions are the only kind served."""

    type: str
    function: FunctionDefinition | None = None


class FunctionName(WireModel):
    """A function by name."""

    name: str


class AllowedTools(WireModel):
    """OpenAI's way to narrow the tools without changing their list."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class ToolChoiceObject(WireModel):
    """A choice that names tools."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(SamplingFields):
    """The body of `/v1/chat/completions`: OpenAI's fields, and vLLM's beyond them."""

    messages: Annotated[list[ChatMessage], FirstError(), Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None

    def turn(self) -> Turn:
        """The turn asked for.

        Raises:
            BadRequest: something that this server does not do, or values that do not fit together.
        """
        self._check_supported()
        self.check_stream_options()
        max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        tools, tool_choice = self._tools()
        template_kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            template_kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        return Turn(
            messages=tuple(template_message(message, index) for index, message in enumerate(self.messages)),
            sampling=self.sampling(max_tokens=max_tokens, logprobs=self._logprobs()),
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            route=self.route_ask,
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            chat_template_kwargs=template_kwargs,
        )

    def _check_supported(self) -> None:
        if self.functions or self.function_call:
            raise BadRequest("functions and function_call are not served; use tools", param="functions")
        if self.audio is not None or "audio" in (self.modalities or ()):
            raise BadRequest("audio output is not served; this model writes text", param="modalities")
        if self.chat_template is not None:
            raise BadRequest(
                "a chat template in a request is not run; the operator sets one with --chat-template",
                param="chat_template",
            )

    def _logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def _tools(self) -> tuple[tuple[ToolSpec, ...], ToolChoice]:
        tools = tuple(_tool_spec(tool, index) for index, tool in enumerate(self.tools or ()))
        choice = self.tool_choice
        if choice is None:
            return tools, "auto" if tools else "none"
        if isinstance(choice, str):
            return tools, choice
        if choice.type == "function" and choice.function is not None:
            return tools, NamedTool(choice.function.name)
        if choice.type == "allowed_tools" and choice.allowed_tools is not None:
            return _allowed(tools, choice.allowed_tools), choice.allowed_tools.mode
        raise BadRequest(
            f"tool_choice of type {choice.type!r} needs a field {choice.type!r}", param="tool_choice"
        )


def template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as chat templates read it.

    Raises:
        BadRequest: a part that is not text, or a call whose arguments are not a JSON object.
    """
    content = message.content
    if isinstance(content, list):
        texts = (_part_text(part, f"messages.{index}.content.{at}") for at, part in enumerate(content))
        content = "\n".join(texts)
    written: dict[str, Any] = {"role": message.role, "content": content}
    for field in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, field)
        if value is not None:
            written[field] = value
    if message.tool_calls:
        written["tool_calls"] = [
            _template_call(call, f"messages.{index}.tool_calls.{at}")
            for at, call in enumerate(message.tool_calls)
        ]
    if content is None and not message.tool_calls:
        if message.role != "assistant":
            raise BadRequest(f"the {message.role} message has no content", param=f"messages.{index}.content")
        written["content"] = ""
    return written


def _part_text(part: ContentPart, where: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if text is None:
        reason = f"has no {part.type!r}" if part.type in ("text", "refusal") else "is not text"
        raise BadRequest(
            f"{where}, a part of type {part.type!r}, {reason}; this model reads text only", param=where
        )
    return text


def _template_call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest(
            f"{where}.function.arguments must be a JSON object, written as a string",
            param=f"{where}.function.arguments",
        )
    return {
        "id": call.id or "",
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _tool_spec(tool: Tool, index: int) -> ToolSpec:
    if tool.type != "function" or tool.function is None:
        raise BadRequest(
            f"tools.{index} is of type {tool.type!r}; only functions are served", param=f"tools.{index}.type"
        )
    function = tool.function
    return ToolSpec(
        name=function.name, description=function.description or "", parameters=function.parameters or {}
    )


def _allowed(tools: tuple[ToolSpec, ...], allowed: AllowedTools) -> tuple[ToolSpec, ...]:
    names = [tool.get("function", {}).get("name") for tool in allowed.tools]
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            raise BadRequest(
                f"tool_choice allows {name!r}, which is not among the tools", param="tool_choice"
            )
    return tuple(tool for tool in tools if tool.name in names)
