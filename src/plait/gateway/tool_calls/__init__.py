"""Tool calls in the text of an answer: finding them as they stream, and forcing them.

tools.py          what may be called, and what must be
parts.py          what an answer is split into; the interface of a parser
json_scanner.py   one JSON value in pieces
call_scanner.py   one call object in pieces
hermes.py         Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>
llama3.py         Llama 3.x: {"name": ..., "parameters": {...}}
formats.py        which format a model uses
constraints.py    the grammar for "required" and named choices
"""

from plait.gateway.tool_calls.constraints import MAX_FORCED_CALLS, tool_constraint
from plait.gateway.tool_calls.formats import (
    TOOL_FORMATS,
    ToolFormat,
    check_tool_format,
    recognised_format,
    tool_call_format,
    tool_call_parser,
)
from plait.gateway.tool_calls.hermes import HermesParser
from plait.gateway.tool_calls.llama3 import Llama3Parser
from plait.gateway.tool_calls.parts import CallArguments, CallStart, Part, TextPart, ToolCallParser
from plait.gateway.tool_calls.tools import NamedTool, ToolChoice, ToolSpec

__all__ = [
    "MAX_FORCED_CALLS",
    "TOOL_FORMATS",
    "CallArguments",
    "CallStart",
    "HermesParser",
    "Llama3Parser",
    "NamedTool",
    "Part",
    "TextPart",
    "ToolCallParser",
    "ToolChoice",
    "ToolFormat",
    "ToolSpec",
    "check_tool_format",
    "recognised_format",
    "tool_call_format",
    "tool_call_parser",
    "tool_constraint",
]
