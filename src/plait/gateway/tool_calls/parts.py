"""What a parser finds in an answer, in order."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text for the reader, outside any call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`: the fragments of a call, joined, are their JSON text."""

    index: int
    fragment: str


Part = TextPart | CallStart | CallArguments


class ToolCallParser(Protocol):
    """Splits the text of one answer, however it is cut into pieces, into text and calls."""

    def push(self, text: str) -> list[Part]:
        """Take more text; return what is now certain."""
        ...

    def finish(self) -> list[Part]:
        """The answer has ended; return what was held back."""
        ...
