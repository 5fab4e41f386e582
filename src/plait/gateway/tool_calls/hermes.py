"""The Hermes and Qwen format: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere in a text.

              <tool_call>                    the object's end (the closing tag is dropped)
    text ────────────────────────────▶ call ───────────────────────────────────────────▶ text
     ▲                                 │  │
     └─ no JSON before the name: text ─┘  └─ no JSON after it ──▶ raw ── </tool_call> ──▶ text

White space around a call is layout and dropped. Whatever else does not parse is passed on: as text if the
call was not announced yet, and otherwise as (invalid) arguments up to the closing tag, which the caller then
sees fail.
"""

from typing import Literal

from plait.gateway.tool_calls.call_scanner import CallScanner
from plait.gateway.tool_calls.json_scanner import WHITE_SPACE
from plait.gateway.tool_calls.parts import CallArguments, CallStart, Part, TextPart

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"


class HermesParser:
    """Splits an answer into text and calls; names are passed on unchecked, as the tags leave no doubt."""

    def __init__(self) -> None:
        self._place: Literal["text", "call", "raw"] = "text"
        self._held = ""
        """Not yet passed on: white space and what may become a tag; of a call without a name, all of it."""
        self._layout = ""
        self._scanned = 0
        self._calls = 0
        self._scanner = CallScanner(None)
        self._announced = False
        self._close_tag_due = False
        self._only_space_since_call = False

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
        while self._place == "call" and not self._announced:
            self._call_was_text(parts)
            while self._held and self._advance(parts):
                pass
        if self._place == "raw":
            self._add_arguments(parts, self._held)
        elif self._place == "text" and not (
            self._only_space_since_call and not self._held.strip(WHITE_SPACE)
        ):
            self._add_text(parts, self._held)
        self._held = ""
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Make one move; False once no more can be made with the text at hand."""
        match self._place:
            case "text":
                return self._advance_text(parts)
            case "call":
                return self._advance_call(parts)
            case "raw":
                return self._advance_raw(parts)

    def _advance_text(self, parts: list[Part]) -> bool:
        tags = (OPEN_TAG, CLOSE_TAG) if self._close_tag_due else (OPEN_TAG,)
        found = [(at, tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if not found:
            kept = len(self._held) - max(_tag_begun(self._held, tag) for tag in tags)
            kept = len(self._held[:kept].rstrip(WHITE_SPACE))
            self._add_text(parts, self._held[:kept])
            self._held = self._held[kept:]
            return False
        at, tag = min(found)
        before = self._held[:at].rstrip(WHITE_SPACE)
        self._add_text(parts, before)
        self._layout = self._held[len(before) : at]
        self._held = self._held[at + len(tag) :]
        self._close_tag_due = False
        if tag == OPEN_TAG:
            self._place, self._scanner = "call", CallScanner(None)
            self._scanned, self._announced = 0, False
        return True

    def _advance_call(self, parts: list[Part]) -> bool:
        self._scanned = self._scanner.scan(self._held, self._scanned)
        if self._scanner.name is None:
            if self._scanner.state == "malformed":
                self._call_was_text(parts)
                return True
            return False
        if not self._announced:
            parts.append(CallStart(self._calls, self._scanner.name))
            self._calls += 1
            self._announced = True
        self._add_arguments(parts, self._scanner.take_arguments())
        self._held, self._scanned = self._held[self._scanned :], 0
        if self._scanner.state == "open":
            return False
        self._only_space_since_call = True
        if self._scanner.state == "complete" or self._scanner.arguments_ended:
            self._place, self._close_tag_due = "text", True
        else:
            self._place = "raw"
        return True

    def _advance_raw(self, parts: list[Part]) -> bool:
        at = self._held.find(CLOSE_TAG)
        kept = at if at >= 0 else len(self._held) - _tag_begun(self._held, CLOSE_TAG)
        self._add_arguments(parts, self._held[:kept])
        self._held = self._held[kept:]
        if at >= 0:
            self._held = self._held[len(CLOSE_TAG) :]
            self._place = "text"
        return at >= 0

    def _call_was_text(self, parts: list[Part]) -> None:
        self._place = "text"
        self._add_text(parts, self._layout + OPEN_TAG)

    def _add_text(self, parts: list[Part], text: str) -> None:
        if text:
            parts.append(TextPart(text))
            self._only_space_since_call = False

    def _add_arguments(self, parts: list[Part], fragment: str) -> None:
        if fragment:
            parts.append(CallArguments(self._calls - 1, fragment))


def _tag_begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    if tag[0] not in text[-len(tag) :]:
        return 0
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
