"""Which format a model writes its calls in, and the parser for it."""

from collections.abc import Sequence
from typing import Literal, Protocol, cast, get_args

from plait.errors import BadRequest, BadSetup
from plait.gateway.tool_calls.hermes import OPEN_TAG, HermesParser
from plait.gateway.tool_calls.llama3 import PYTHON_TAG, Llama3Parser
from plait.gateway.tool_calls.parts import ToolCallParser
from plait.gateway.tool_calls.tools import NamedTool, ToolChoice, ToolSpec

ToolFormat = Literal["hermes", "llama3"]
TOOL_FORMATS = ("auto", *get_args(ToolFormat), "none")
"""What an operator may ask for."""

# Qwen3-Coder writes `<function=f><parameter=p>` between the same tags.
_XML_CALL = "<function="
# The sentence of Meta's templates that explains the format to the model.
_LLAMA3_SENTENCE = '{"name": function name, "parameters":'


class Templated(Protocol):
    """What knows the chat template of a model; "" if it has none."""

    @property
    def chat_template_source(self) -> str: ...


def check_tool_format(asked: str) -> None:
    """Check what an operator asked for.

    Raises:
        BadSetup: there is no such format.
    """
    if asked not in TOOL_FORMATS:
        raise BadSetup(f"--tool-format {asked!r} is not known; choose one of {', '.join(TOOL_FORMATS)}")


def tool_call_format(asked: str, tokenizer: Templated) -> ToolFormat:
    """The format to use where `asked` (`--tool-format`) was asked for and the model has this tokenizer.

    Raises:
        BadRequest: this model is not known to call tools, or was told not to.
    """
    check_tool_format(asked)
    if asked == "auto":
        found = recognised_format(tokenizer.chat_template_source)
        if found is None:
            raise BadRequest(
                "this model's chat template shows no known format for tool calls; leave out tools, "
                "or start the server with --tool-format hermes or llama3",
                param="tools",
            )
        return found
    if asked == "none":
        raise BadRequest(
            "this server was started with --tool-format none; leave out tools, or start it with another",
            param="tools",
        )
    return cast(ToolFormat, asked)


def recognised_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches the model, if we know it."""
    if OPEN_TAG in chat_template and _XML_CALL not in chat_template:
        return "hermes"
    if _LLAMA3_SENTENCE in chat_template or PYTHON_TAG in chat_template:
        return "llama3"
    return None


def tool_call_parser(format: ToolFormat, tools: Sequence[ToolSpec], choice: ToolChoice) -> ToolCallParser:
    """A parser for one answer in a format."""
    names = {choice.name} if isinstance(choice, NamedTool) else {tool.name for tool in tools}
    return HermesParser() if format == "hermes" else Llama3Parser(frozenset(names))
