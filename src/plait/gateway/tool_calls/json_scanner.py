"""Recognise one JSON value in text that arrives in pieces.

The scanner never looks back and keeps no text except an unfinished number or literal, so it finds the same
end however the text is cut. It follows RFC 8259 strictly: what it calls complete, `json.loads` accepts.
"""

import re
from typing import Literal

ScanState = Literal["open", "complete", "malformed"]
WHITE_SPACE = " \t\n\r"

_Expect = Literal["value", "value_or_end", "key", "key_or_end", "colon", "comma_or_end"]
_Within = Literal["nothing", "string", "escape", "unicode_escape", "number", "literal"]

_STRING_STOP = re.compile(r'["\\\x00-\x1f]')
_NOT_NUMBER = re.compile(r"[^0-9+\-.eE]")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERALS = ("true", "false", "null")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonScanner:
    """Scans one value; `state` says how far it is. White space before the value is skipped."""

    def __init__(self) -> None:
        self.state: ScanState = "open"
        self._expect: _Expect = "value"
        self._within: _Within = "nothing"
        self._closers: list[str] = []
        self._string_is_key = False
        self._hex_digits_left = 0
        self._word = ""

    def scan(self, text: str, at: int) -> int:
        """Scan from `text[at]`; return the index after the last character that belongs to the value.

        With `state` malformed, that is the index of the character that cannot follow.
        """
        while at < len(text) and self.state == "open":
            match self._within:
                case "string":
                    at = self._scan_string(text, at)
                case "escape":
                    at = self._scan_escape(text, at)
                case "unicode_escape":
                    at = self._scan_unicode_escape(text, at)
                case "number":
                    at = self._scan_number(text, at)
                case "literal":
                    at = self._scan_literal(text, at)
                case "nothing":
                    at = self._scan_structure(text, at)
        return at

    def _scan_structure(self, text: str, at: int) -> int:
        character = text[at]
        if character in WHITE_SPACE:
            return at + 1
        if character in "}]" and self._closers and self._closers[-1] == character:
            if self._expect not in ("value_or_end", "key_or_end", "comma_or_end"):
                return self._fail(at)
            self._closers.pop()
            self._end_value()
            return at + 1
        match self._expect:
            case "colon":
                if character != ":":
                    return self._fail(at)
                self._expect = "value"
                return at + 1
            case "comma_or_end":
                if character != ",":
                    return self._fail(at)
                self._expect = "key" if self._closers[-1] == "}" else "value"
                return at + 1
            case "key" | "key_or_end":
                if character != '"':
                    return self._fail(at)
                self._within, self._string_is_key = "string", True
                return at + 1
            case "value" | "value_or_end":
                return self._begin_value(character, at)

    def _begin_value(self, character: str, at: int) -> int:
        if character == '"':
            self._within, self._string_is_key = "string", False
        elif character == "{":
            self._closers.append("}")
            self._expect = "key_or_end"
        elif character == "[":
            self._closers.append("]")
            self._expect = "value_or_end"
        elif character in "-0123456789":
            self._within, self._word = "number", character
        elif character in "tfn":
            self._within, self._word = "literal", character
        else:
            return self._fail(at)
        return at + 1

    def _scan_string(self, text: str, at: int) -> int:
        found = _STRING_STOP.search(text, at)
        if found is None:
            return len(text)
        at = found.start()
        if text[at] == '"':
            self._within = "nothing"
            if self._string_is_key:
                self._expect = "colon"
            else:
                self._end_value()
        elif text[at] == "\\":
            self._within = "escape"
        else:
            return self._fail(at)
        return at + 1

    def _scan_escape(self, text: str, at: int) -> int:
        if text[at] == "u":
            self._within, self._hex_digits_left = "unicode_escape", 4
        elif text[at] in '"\\/bfnrt':
            self._within = "string"
        else:
            return self._fail(at)
        return at + 1

    def _scan_unicode_escape(self, text: str, at: int) -> int:
        if text[at] not in _HEX:
            return self._fail(at)
        self._hex_digits_left -= 1
        if self._hex_digits_left == 0:
            self._within = "string"
        return at + 1

    def _scan_number(self, text: str, at: int) -> int:
        # A number ends where something else begins, so its last character shows only with the next one.
        found = _NOT_NUMBER.search(text, at)
        end = found.start() if found else len(text)
        self._word += text[at:end]
        if found is not None:
            if not _NUMBER.fullmatch(self._word):
                return self._fail(end)
            self._within = "nothing"
            self._end_value()
        return end

    def _scan_literal(self, text: str, at: int) -> int:
        self._word += text[at]
        if self._word in _LITERALS:
            self._within = "nothing"
            self._end_value()
        elif not any(literal.startswith(self._word) for literal in _LITERALS):
            return self._fail(at)
        return at + 1

    def _end_value(self) -> None:
        if self._closers:
            self._expect = "comma_or_end"
        else:
            self.state = "complete"

    def _fail(self, at: int) -> int:
        self.state = "malformed"
        return at
