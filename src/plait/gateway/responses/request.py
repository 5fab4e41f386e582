"""The body of POST /v1/responses, and the chat turn it asks for."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag

from plait.errors import BadRequest
from plait.gateway.content_type import content_type
from plait.gateway.tool_calls import NamedTool, ToolChoice, ToolSpec
from plait.gateway.turn import Turn
from plait.gateway.wire import FirstError, WireModel
from plait.session import Constraint, SamplingParams

Message = dict[str, Any]
"""A message as chat templates read it."""

MAX_TOP_LOGPROBS = 20
LOGPROBS = "message.output_text.logprobs"


class TextPart(WireModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(WireModel):
    type: Literal["refusal"]
    refusal: str


class OtherPart(WireModel):
    """A kind of content that this server cannot read."""

    type: str


def _part_tag(value: Any) -> str:
    kind = content_type(value)
    if kind in ("input_text", "output_text", "text"):
        return "text"
    return "refusal" if kind == "refusal" else "other"


ContentPart = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[RefusalPart, Tag("refusal")]
    | Annotated[OtherPart, Tag("other")],
    Discriminator(_part_tag),
]


class MessageItem(WireModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[ContentPart], FirstError()]


class FunctionCallItem(WireModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(WireModel):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[ContentPart], FirstError()]


class ReasoningItem(WireModel):
    """Reasoning of an earlier answer; chat templates leave it out of the prompt, and so do we."""

    type: Literal["reasoning"]


class OtherItem(WireModel):
    """A kind of item that this server does not know."""

    type: str


_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _item_tag(value: Any) -> str:
    kind = content_type(value, "message")
    return kind if kind in _ITEM_TYPES else "other"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_tag),
]


class ResponseTool(WireModel):
    """A tool; only functions can be offered, other types are refused by name."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(WireModel):
    type: Literal["function"]
    name: str


class AllowedTools(WireModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


class TextFormat(WireModel):
    """How the text must be; `schema` is the JSON schema of `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class TextConfig(WireModel):
    format: TextFormat | None = None
    verbosity: str | None = None


MetadataValue = Annotated[str, Field(max_length=512)]
MetadataKey = Annotated[str, Field(max_length=64)]


class ResponsesRequest(WireModel):
    """Body of POST /v1/responses; fields that it does not name are ignored."""

    model: str | None = None
    input: str | Annotated[list[InputItem], FirstError(), Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # As other servers of open models take them:
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the probabilities of the text's tokens are to be sent."""
        return self.include is not None and LOGPROBS in self.include


def turn_of(body: ResponsesRequest, history: Sequence[Message]) -> tuple[Turn, tuple[Message, ...]]:
    """The turn to run, and the conversation to remember with its answer (which excludes `instructions`).

    Raises:
        BadRequest: it asks for something that this server does not do; the message names it.
    """
    _refuse_unsupported(body)
    tools, choice = _tools(body)
    conversation = (*history, *_messages(body.input))
    if not conversation:
        raise BadRequest("input has no message", param="input")
    instructions: tuple[Message, ...] = ()
    if body.instructions:
        instructions = ({"role": "system", "content": body.instructions},)
    logprobs = (body.top_logprobs or 0) if body.wants_logprobs else None
    sampling = SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        seed=body.seed,
        max_tokens=body.max_output_tokens,
        logprobs=logprobs,
        constraint=_constraint(body.text),
    )
    turn = Turn(
        messages=(*instructions, *conversation),
        sampling=sampling,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )
    return turn, conversation


def messages_of_output(output: Iterable[Mapping[str, Any]]) -> list[Message]:
    """The messages that the items of an answer become when the conversation goes on."""
    messages: list[Message] = []
    for item in output:
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"])
            messages.append({"role": "assistant", "content": text})
        else:
            _add_call(messages, item["call_id"], item["name"], item["arguments"])
    return messages


def _messages(given: str | list[InputItem]) -> list[Message]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    for index, item in enumerate(given):
        where = f"input.{index}"
        match item:
            case MessageItem(role=role, content=content):
                messages.append({"role": role, "content": _text(content, f"{where}.content")})
            case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
                _add_call(messages, call_id, name, arguments)
            case FunctionCallOutputItem(call_id=call_id, output=output):
                text = _text(output, f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
            case ReasoningItem():
                pass
            case OtherItem(type=kind):
                known = ", ".join(_ITEM_TYPES)
                raise BadRequest(f"{where} has type {kind!r}; this server reads {known}", param=where)
    return messages


def _add_call(messages: list[Message], call_id: str, name: str, arguments: str) -> None:
    """Add a call to the assistant's message at the end, which templates show as one turn."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    function = {"name": name, "arguments": _arguments(arguments)}
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": call_id, "type": "function", "function": function})


def _arguments(text: str) -> Any:
    """Arguments as templates want them: the object, or the text if a model wrote something else."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return cast(object, value) if isinstance(value, dict) else text


def _text(content: str | list[ContentPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        match part:
            case TextPart(text=text):
                texts.append(text)
            case RefusalPart(refusal=refusal):
                texts.append(refusal)
            case OtherPart(type=kind):
                raise BadRequest(
                    f"{where}.{index} has type {kind!r}; this server reads text only",
                    param=f"{where}.{index}",
                )
    return "\n".join(texts)


def _tools(body: ResponsesRequest) -> tuple[tuple[ToolSpec, ...], ToolChoice]:
    tools: list[ToolSpec] = []
    for index, tool in enumerate(body.tools or ()):
        if tool.type != "function":
            message = f"tools.{index} has type {tool.type!r}; this server offers functions only"
            raise BadRequest(message, param=f"tools.{index}.type")
        if not tool.name:
            raise BadRequest(f"tools.{index} has no name", param=f"tools.{index}.name")
        tools.append(
            ToolSpec(name=tool.name, description=tool.description or "", parameters=tool.parameters or {})
        )
    match body.tool_choice:
        case None:
            return tuple(tools), "auto"
        case FunctionChoice(name=name):
            return tuple(tools), NamedTool(name)
        case AllowedTools(mode=mode, tools=allowed):
            names = {choice.name for choice in allowed}
            return tuple(tool for tool in tools if tool.name in names), mode
        case choice:
            return tuple(tools), choice


def _constraint(text: TextConfig | None) -> Constraint | None:
    format = text.format if text else None
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return Constraint(kind="json_object")
    if format.json_schema is None:
        raise BadRequest("text.format of type 'json_schema' needs a schema", param="text.format.schema")
    return Constraint(kind="json_schema", text=json.dumps(format.json_schema))


def _refuse_unsupported(body: ResponsesRequest) -> None:
    unsupported = {
        "background": body.background,
        "conversation": body.conversation,
        "prompt": body.prompt,
    }
    for name, value in unsupported.items():
        if value:
            raise BadRequest(f"{name} is not supported by this server; leave it out", param=name)
    if body.truncation == "auto":
        raise BadRequest("truncation 'auto' is not supported; shorten the input yourself", param="truncation")
