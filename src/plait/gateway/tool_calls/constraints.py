"""Make a model call a tool: a grammar of answers that are calls with arguments of the right schema.

The grammar is Lark in llguidance's dialect, whose `%json` takes a JSON schema inline. White space is fixed to
what Python's `json.dumps` and Jinja's `tojson` write, since chat templates show calls to the model that way.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from plait.errors import BadRequest
from plait.gateway.tool_calls.formats import ToolFormat
from plait.gateway.tool_calls.hermes import CLOSE_TAG, OPEN_TAG
from plait.gateway.tool_calls.llama3 import SEPARATOR
from plait.gateway.tool_calls.tools import NamedTool, ToolChoice, ToolSpec
from plait.session import Constraint

# A small model that must call something may never stop calling; a real one rarely makes ten calls at a time.
MAX_FORCED_CALLS = 16

# Keywords that llguidance does not know are ignored rather than refused: a tool is often written for another
# server, and its caller checks the arguments anyway.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_COMPOSING = frozenset({"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if"})


def tool_constraint(
    format: ToolFormat, tools: Sequence[ToolSpec], choice: ToolChoice, parallel: bool
) -> Constraint | None:
    """What an answer must be for a choice of tools; None where the model may write freely.

    `parallel` allows several calls ("required" only; a named tool is called once).

    Raises:
        BadRequest: a tool's parameters are not the schema of an object, two tools share a name, or the choice
            names a tool that is not among them.
    """
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"two tools are named {twice!r}; give each its own name", param="tools")
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise BadRequest(
            f"tool_choice names {choice.name!r}, which is not among the tools ({', '.join(names)})",
            param="tool_choice",
        )
    if choice in ("auto", "none"):
        return None
    if not tools:
        raise BadRequest(f"tool_choice {choice!r} needs tools; add some", param="tool_choice")
    if isinstance(choice, NamedTool):
        tools, parallel = [tool for tool in tools if tool.name == choice.name], False
    return Constraint(kind="grammar", text=_calls_grammar(format, tools, parallel))


def _calls_grammar(format: ToolFormat, tools: Sequence[ToolSpec], parallel: bool) -> str:
    if format == "hermes":
        before, key, after, separator = OPEN_TAG + "\n", "arguments", "\n" + CLOSE_TAG, "\n"
    else:
        before, key, after, separator = "", "parameters", "", SEPARATOR + " "
    more = f" ({_literal(separator)} call){{0,{MAX_FORCED_CALLS - 1}}}" if parallel else ""
    lines = [f"start: call{more}", "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        head = f'{before}{{"name": {json.dumps(tool.name)}, "{key}": '
        lines.append(f"call_{index}: {_literal(head)} arguments_{index} {_literal('}' + after)}")
        lines.append(f"arguments_{index}: %json {json.dumps(_arguments_schema(tool))}")
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """A Lark string; its escapes are JSON's."""
    return json.dumps(text)


def _arguments_schema(tool: ToolSpec) -> Mapping[str, Any]:
    """The schema of a tool's arguments, closed against properties it does not name."""
    schema = dict(tool.parameters)
    if schema.setdefault("type", "object") != "object":
        raise BadRequest(
            f"the parameters of tool {tool.name!r} have type {schema['type']!r}; a tool takes an object",
            param="tools",
        )
    takes_nothing = not tool.parameters
    if takes_nothing or ("properties" in schema and not _COMPOSING & schema.keys()):
        schema["additionalProperties"] = False
    schema["x-guidance"] = _JSON_LAYOUT
    return schema
