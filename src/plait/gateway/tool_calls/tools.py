"""What a caller offers the model to call, and which of it the model has to call."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plait.errors import BadRequest

# OpenAI allows 64 characters and Anthropic 128; the alphabet is the same.
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """One function; `parameters` is the JSON schema of its arguments.

    Raises:
        BadRequest: a name outside `[a-zA-Z0-9_-]{1,128}`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            message = f"tool name {self.name!r} must be 1 to 128 letters, digits, '_' or '-'; rename the tool"
            raise BadRequest(message, param="tools")

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates expect (OpenAI's)."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The choice that leaves the model only one tool to call, exactly once."""

    name: str


ToolChoice = Literal["auto", "none", "required"] | NamedTool
