"""Read one call, a JSON object such as `{"name": "f", "arguments": {...}}`, in text that arrives in pieces.

The name is reported as soon as its string is complete and the arguments as they come, so a reader sees the
call grow. That makes a mistake after the name too late to take back. Hence two outcomes of malformed JSON:
before the name was reported nothing has been said, and the caller may treat all of it as text; after it the
call stands.
"""

import json
from typing import Literal

from plait.gateway.tool_calls.json_scanner import WHITE_SPACE, JsonScanner, ScanState

NAME_KEYS = frozenset({"name"})
ARGUMENTS_KEYS = frozenset({"arguments", "parameters"})

_Place = Literal[
    "before_object",
    "before_key",
    "before_key_or_end",
    "in_key",
    "before_colon",
    "before_value",
    "in_value",
    "after_value",
]


class CallScanner:
    """Scans one call object.

    `name` is None until its string is complete; `take_arguments` returns what is new of the arguments' JSON
    text. `state` is complete after the closing brace of an object that had a name.
    """

    def __init__(self, allowed_keys: frozenset[str] | None) -> None:
        """`allowed_keys`: any other key makes the object malformed, that is: not a call (None allows all)."""
        self.state: ScanState = "open"
        self.name: str | None = None
        self._allowed_keys = allowed_keys
        self._place: _Place = "before_object"
        self._member = JsonScanner()
        self._key = ""
        self._key_text = ""
        self._value_text = ""
        self._value_is_object = False
        self._arguments = ""
        self._arguments_seen = False

    @property
    def arguments_ended(self) -> bool:
        """Whether the value of the arguments is complete."""
        return self._arguments_seen and not self._in_arguments

    def take_arguments(self) -> str:
        """Return the part of the arguments that was not taken yet; "" while the name is unknown."""
        if self.name is None:
            return ""
        fragment, self._arguments = self._arguments, ""
        return fragment

    def scan(self, text: str, at: int) -> int:
        """Scan from `text[at]`; return the index after the last character that belongs to the object.

        With `state` malformed, that is the index of the first character that does not.
        """
        while at < len(text) and self.state == "open":
            if self._place == "in_key":
                at = self._scan_key(text, at)
            elif self._place == "in_value":
                at = self._scan_value(text, at)
            elif text[at] in WHITE_SPACE:
                at += 1
            else:
                at = self._scan_structure(text, at)
        return at

    def _scan_structure(self, text: str, at: int) -> int:
        character = text[at]
        match self._place, character:
            case "before_object", "{":
                self._place = "before_key_or_end"
            case (("before_key" | "before_key_or_end"), '"'):
                self._place, self._member, self._key_text = "in_key", JsonScanner(), ""
                return at
            case (("before_key_or_end" | "after_value"), "}"):
                if self.name is None:
                    return self._fail(at)
                if not self._arguments_seen:
                    self._arguments = "{}"
                self.state = "complete"
            case "before_colon", ":":
                self._place = "before_value"
            case "before_value", _:
                self._begin_value(character)
                return at
            case "after_value", ",":
                self._place = "before_key"
            case _:
                return self._fail(at)
        return at + 1

    def _scan_key(self, text: str, at: int) -> int:
        end = self._member.scan(text, at)
        self._key_text += text[at:end]
        if self._member.state == "malformed":
            return self._fail(end)
        if self._member.state == "complete":
            self._key = json.loads(self._key_text)
            twice = (self._key in NAME_KEYS and self.name is not None) or (
                self._key in ARGUMENTS_KEYS and self._arguments_seen
            )
            if twice or (self._allowed_keys is not None and self._key not in self._allowed_keys):
                return self._fail(end)
            self._place = "before_colon"
        return end

    def _begin_value(self, character: str) -> None:
        self._place, self._member, self._value_text = "in_value", JsonScanner(), ""
        self._value_is_object = character == "{"
        if self._key in ARGUMENTS_KEYS:
            self._arguments_seen = True

    def _scan_value(self, text: str, at: int) -> int:
        end = self._member.scan(text, at)
        if self._key in ARGUMENTS_KEYS and self._value_is_object:
            self._arguments += text[at:end]
        elif self._key in NAME_KEYS or self._key in ARGUMENTS_KEYS:
            self._value_text += text[at:end]
        if self._member.state == "malformed" or (self._member.state == "complete" and not self._end_value()):
            return self._fail(end)
        return end

    def _end_value(self) -> bool:
        """Read a value that is complete; False if it is not one that a call may have."""
        if self._key in NAME_KEYS:
            name = json.loads(self._value_text) if self._value_text.startswith('"') else ""
            if not name or not _is_unicode(name):
                return False
            self.name = name
        elif self._key in ARGUMENTS_KEYS and not self._value_is_object:
            arguments = _arguments_in(self._value_text)
            if arguments is None:
                return False
            self._arguments = arguments
        self._place = "after_value"
        return True

    def _fail(self, at: int) -> int:
        self.state = "malformed"
        if self._in_arguments and not self._value_is_object:
            self._arguments += self._value_text
        return at

    @property
    def _in_arguments(self) -> bool:
        return self._place == "in_value" and self._key in ARGUMENTS_KEYS


def _arguments_in(value_text: str) -> str | None:
    """The JSON object meant by arguments written as a string of JSON or as null; None for any other value."""
    if value_text == "null":
        return "{}"
    if not value_text.startswith('"'):
        return None
    text: str = json.loads(value_text)
    scanner = JsonScanner()
    end = scanner.scan(text, 0)
    whole = scanner.state == "complete" and not text[end:].strip(WHITE_SPACE)
    return text if whole and text.lstrip(WHITE_SPACE).startswith("{") and _is_unicode(text) else None


def _is_unicode(text: str) -> bool:
    """Whether the text can be sent: JSON can spell half a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
