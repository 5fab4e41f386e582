# pyright: standard
"""Chat templates: Jinja programs that come with a checkpoint and write a conversation as one string.

They run as `transformers.apply_chat_template` runs them (same sandbox, functions, options and normalisation
of messages), so the same checkpoint gets the same prompt. They are code of unknown origin, so they run in
Jinja's immutable sandbox, see plain JSON values only, and have bounded output, loop steps and values. What is
not bounded is one built-in filter that asks for a huge string (`'x' | center(10**10)`): a template of
an operator's own choosing can waste its server's memory, but not reach outside the sandbox.

A string typed by a user may spell a control token (`<|im_end|>`). `ControlTokens.mark` wraps those in
private-use characters before rendering; the tokenizer then encodes what is wrapped as plain text. This is
what transformers does with `sanitize_control_tokens=True`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from plait.errors import BadRequest, BadSetup

# About four times the characters of a million tokens: more than any served context, far less than memory.
MAX_RENDERED_CHARACTERS = 16 * 2**20
# Attribute reads, calls and range steps of one rendering; a conversation of 1,000 messages needs about 15,000.
MAX_RENDER_STEPS = 2_000_000

MARK_START = "\U000f0000"
MARK_END = "\U000f0001"

_RESERVED_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
# The names under which clients pass a message's reasoning; templates read the first, gpt-oss the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "plait-probe"

Message = Mapping[str, Any]


class ChatTemplate:
    """One compiled template; rendering is pure but for `strftime_now`, and safe from several threads.

    `where` names the template's origin in error messages.

    Raises:
        BadSetup: the template is not valid Jinja.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source = source
        self.where = where
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BadSetup(
                f"the chat template of {where} is not valid Jinja: {error}; "
                "fix it, or pass another with --chat-template"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a conversation as the text that the model was trained to continue.

        `messages` have the shape of OpenAI's API. Text parts become one string for templates that expect
        strings, and JSON strings of tool-call arguments become objects for templates that expect those.
        `variables` are further names for the template (`bos_token`, `enable_thinking`, ...).

        Raises:
            BadRequest: the template refuses the conversation (the message says why), or exceeds its bounds.
        """
        if not messages:
            raise BadRequest("a chat needs at least one message", param="messages")
        reserved = [name for name in variables or {} if name in _RESERVED_VARIABLES]
        if reserved:
            raise BadRequest(
                f"{reserved[0]!r} cannot be set as a template variable", param="chat_template_kwargs"
            )
        chat = [self._adapt(_plain(message)) for message in messages]
        final_text = ""
        if continue_final_message:
            if add_generation_prompt:
                raise BadRequest(
                    "continue_final_message and add_generation_prompt exclude each other",
                    param="continue_final_message",
                )
            final_text = _tag_final_message(chat[-1])
        text = self._run(
            chat,
            _plain(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            documents=_plain(documents) if documents else None,
            **_plain(dict(variables or {})),
        )
        return _cut_at_tag(text, final_text) if continue_final_message else text

    def _run(self, messages: list[dict[str, Any]], tools: Any, **variables: Any) -> str:
        token = _BUDGET.set(_Budget())
        pieces: list[str] = []
        characters = 0
        try:
            for piece in self._template.generate(messages=messages, tools=tools, **variables):
                pieces.append(piece)
                characters += len(piece)
                if characters > MAX_RENDERED_CHARACTERS:
                    _refuse(f"more than {MAX_RENDERED_CHARACTERS} characters of output")
        except Exception as error:
            # Any exception here comes out of the template: untrusted code that ends with this request.
            raise BadRequest(
                f"the chat template of {self.where} refuses this conversation: {_reason(error)}",
                param="messages",
            ) from error
        finally:
            _BUDGET.reset(token)
        return "".join(pieces)

    def _adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give a message the shape that this template reads."""
        adapted = {key: value for key, value in message.items() if value is not None}
        reasoning = next((adapted[name] for name in _REASONING_FIELDS if name in adapted), None)
        if reasoning is not None:
            adapted = {"thinking": reasoning, **adapted, "reasoning_content": reasoning}
        content = adapted.get("content")
        if isinstance(content, str) and self._reads == _Reads.PARTS_ONLY:
            adapted["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and self._reads == _Reads.STRINGS_ONLY:
            adapted["content"] = _joined_text(cast("list[Any]", content))
        calls = adapted.get("tool_calls")
        if isinstance(calls, list) and self._wants_argument_objects:
            adapted["tool_calls"] = [_with_argument_object(call) for call in cast("list[Any]", calls)]
        return adapted

    @cached_property
    def _reads(self) -> int:
        """Whether this template reads message content as strings, as lists of parts, or both: by trying."""
        text = self._probe([{"role": "user", "content": _PROBE}])
        parts = self._probe([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        if text is not None and _PROBE in text:
            return _Reads.BOTH if parts == text else _Reads.STRINGS_ONLY
        return _Reads.PARTS_ONLY if parts is not None and _PROBE in parts else _Reads.BOTH

    @cached_property
    def _wants_argument_objects(self) -> bool:
        """Whether tool-call arguments go in as objects (most often) or as the client's JSON: by trying."""

        def attempt(arguments: Any) -> str | None:
            call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": arguments}}
            content = [{"type": "text", "text": "a"}] if self._reads == _Reads.PARTS_ONLY else "a"
            return self._probe(
                [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                ]
            )

        return attempt({"key": _PROBE}) is not None or attempt('{"key": 1}') is None

    def _probe(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._run(
                messages, None, add_generation_prompt=False, documents=None, bos_token="", eos_token=""
            )
        except BadRequest:
            return None


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The special tokens of a tokenizer, to be told apart when users type them."""

    contents: tuple[str, ...]
    pattern: re.Pattern[str] = field(init=False)
    marked_pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.contents, key=lambda content: (-len(content), content))
        any_token = "|".join(map(re.escape, longest_first)) or "(?!)"
        object.__setattr__(self, "pattern", re.compile(any_token))
        marked = f"{MARK_START}({any_token}){MARK_END}|[{MARK_START}{MARK_END}]"
        object.__setattr__(self, "marked_pattern", re.compile(marked))

    def mark(self, value: Any) -> Any:
        """Copy JSON-like data with every control token in its strings and keys wrapped in marks."""
        if isinstance(value, str):
            clean = value.replace(MARK_START, "").replace(MARK_END, "")
            return self.pattern.sub(f"{MARK_START}\\g<0>{MARK_END}", clean)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {self.mark(key): self.mark(item) for key, item in items}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in cast("Sequence[Any]", value)]
        return value

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """Split a rendered chat into (text, whether it is a marked token to be encoded as plain text)."""
        parts = self.marked_pattern.split(text)
        return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]


class _Reads:
    STRINGS_ONLY, PARTS_ONLY, BOTH = range(3)


class _Budget:
    """Steps that one rendering may still take."""

    def __init__(self) -> None:
        self.left_steps = MAX_RENDER_STEPS

    def spend(self, steps: int) -> None:
        self.left_steps -= steps
        if self.left_steps < 0:
            _refuse(f"more than {MAX_RENDER_STEPS} steps")


_BUDGET: ContextVar[_Budget] = ContextVar("chat_template_budget")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also counts steps and refuses huge values."""

    intercepted_binops = frozenset({"*", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        _BUDGET.get().spend(1)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _BUDGET.get().spend(1)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (Jinja's own names)
        result = super().call(__context, __obj, *args, **kwargs)
        _BUDGET.get().spend(1 + len(result) if isinstance(result, range) else 1)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if abs(right) > 1000 or abs(left) > 10**6:
                _refuse(f"the power {left!r} ** {right!r}")
        else:
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _bounded(len(cast("Sequence[Any]", value)) * times)
        return super().call_binop(context, operator, left, right)


class _GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateNamespace(Namespace):
    """`namespace(...)` without names that reach into Python, and without values that double for ever."""

    # The first parameter has no name of its own so that `namespace(self=1)` works, as in Jinja.
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes: dict[str, Any] = dict(*rest, **kwargs)
        for name, value in attributes.items():
            _check_attribute(name, value)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name, value)
        super().__setitem__(name, value)


class _TemplateDict:
    """`dict(...)` for templates: makes dicts, and is not the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _tojson
    names: dict[str, Any] = environment.globals  # typed in Jinja as what it has by default only
    names["raise_exception"] = _raise_exception
    names["strftime_now"] = _strftime_now
    names["dict"] = _TemplateDict()
    names["namespace"] = _TemplateNamespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _refuse(what: str) -> NoReturn:
    raise SecurityError(f"the template exceeds its bounds: {what}")


def _bounded(characters: int) -> None:
    if characters > MAX_RENDERED_CHARACTERS:
        _refuse(f"a value of {characters} characters")


def _check_attribute(name: Any, value: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute cannot start with an underscore: {name!r}")
    if isinstance(value, str | list):
        _bounded(len(cast("Sequence[Any]", value)))


def _reason(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError):
        return error.message or type(error).__name__
    return f"{type(error).__name__}: {error}"


def _plain(value: Any) -> Any:
    """Rebuild a value out of exact JSON types: objects with methods never reach a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return f"<{type(value).__name__}>"


def _joined_text(parts: list[Any]) -> str:
    """Join text parts by newlines, as vLLM does.

    Raises:
        BadRequest: a part is not text.
    """
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(cast("dict[str, Any]", part)["text"])
        else:
            kind = cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRequest(f"this model reads text only, not content of type {kind!r}", param="messages")
    return "\n".join(texts)


def _with_argument_object(call: Any) -> Any:
    """Parse the JSON string of a tool call's arguments, if it holds an object."""
    if not isinstance(call, dict):
        return call
    whole = cast("dict[str, Any]", call)
    function = whole.get("function")
    if not isinstance(function, dict):
        return whole
    arguments = cast("dict[str, Any]", function).get("arguments")
    if not isinstance(arguments, str):
        return whole
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return whole
    return {**whole, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else whole


def _tag_final_message(message: dict[str, Any]) -> str:
    """Put a tag behind the text of the last message, and return that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(cast("list[Any]", content) if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = cast("dict[str, Any]", part)["text"]
            part["text"] = text + _CONTINUE_TAG
            return text
    raise BadRequest("continue_final_message needs text in the last message", param="continue_final_message")


def _cut_at_tag(rendered: str, final_text: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if final_text.strip() not in rendered or tag not in rendered:
        raise BadRequest(
            "the chat template does not write the last message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    at = rendered.rindex(tag)
    whole = rendered[at : at + len(_CONTINUE_TAG)] == _CONTINUE_TAG
    return rendered[:at] if whole else rendered[:at].rstrip()
