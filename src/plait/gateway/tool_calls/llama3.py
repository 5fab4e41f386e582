"""The Llama 3.x format: the whole answer is `{"name": ..., "parameters": {...}}`, or several, split by `;`.

`<|python_tag|>` may stand before a call. Nothing else marks an answer as a call, so JSON that has other keys,
or names a tool that was not offered, is an answer in JSON and passed on as text. What does not parse goes on
as text too or, once its call was announced, as (invalid) arguments, which the caller then sees fail.
"""

from typing import Literal

from plait.gateway.tool_calls.call_scanner import ARGUMENTS_KEYS, NAME_KEYS, CallScanner
from plait.gateway.tool_calls.json_scanner import WHITE_SPACE
from plait.gateway.tool_calls.parts import CallArguments, CallStart, Part, TextPart

PYTHON_TAG = "<|python_tag|>"
SEPARATOR = ";"
_KEYS = NAME_KEYS | ARGUMENTS_KEYS | {"type", "id"}


class Llama3Parser:
    """Splits an answer into calls of the tools `names` and text."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._place: Literal["between", "call", "arguments", "text"] = "between"
        self._held = ""
        """Text since the last call (or the beginning) that is not passed on yet."""
        self._scanned = 0
        self._calls = 0
        self._scanner = CallScanner(_KEYS)
        self._announced = False

    def push(self, text: str) -> list[Part]:
        """Take more text; return what is now certain."""
        self._held += text
        parts: list[Part] = []
        while self._held and self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The answer has ended; return what was held back."""
        parts: list[Part] = []
        layout = self._calls > 0 and not self._held.strip(WHITE_SPACE)
        if self._held and not layout and not (self._place == "call" and self._announced):
            parts.append(TextPart(self._held))
        self._held = ""
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Make one move; False once no more can be made with the text at hand."""
        match self._place:
            case "between":
                return self._advance_between()
            case "call":
                return self._advance_call(parts)
            case "arguments":
                parts.append(CallArguments(self._calls - 1, self._held))
            case "text":
                parts.append(TextPart(self._held))
        self._held = ""
        return False

    def _advance_between(self) -> bool:
        at = _skip_space(self._held, 0)
        if self._calls > 0:
            if at < len(self._held) and self._held[at] != SEPARATOR:
                self._place = "text"
                return True
            at = _skip_space(self._held, at + 1)
        if at < len(self._held) and PYTHON_TAG.startswith(self._held[at : at + len(PYTHON_TAG)]):
            if len(self._held) - at < len(PYTHON_TAG):
                return False
            at = _skip_space(self._held, at + len(PYTHON_TAG))
        if at >= len(self._held):
            return False
        if self._held[at] != "{":
            self._place = "text"
            return True
        self._place, self._scanner = "call", CallScanner(_KEYS)
        self._scanned, self._announced = at, False
        return True

    def _advance_call(self, parts: list[Part]) -> bool:
        self._scanned = self._scanner.scan(self._held, self._scanned)
        name = self._scanner.name
        if name not in self._names:
            if name is not None or self._scanner.state == "malformed":
                self._place = "text"
                return True
            return False
        if not self._announced:
            parts.append(CallStart(self._calls, name))
            self._calls += 1
            self._announced = True
        fragment = self._scanner.take_arguments()
        if fragment:
            parts.append(CallArguments(self._calls - 1, fragment))
        self._held, self._scanned = self._held[self._scanned :], 0
        if self._scanner.state == "open":
            return False
        if self._scanner.state == "complete":
            self._place = "between"
        else:
            self._place = "text" if self._scanner.arguments_ended else "arguments"
        return True


def _skip_space(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip(WHITE_SPACE))
