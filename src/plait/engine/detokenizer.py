"""Token ids to text as they come, ending exactly where the whole decode would.

Theory. A tokenizer's decoder is one of two kinds here. Byte-level ones concatenate the bytes that tokens
spell and read them as UTF-8. The others (Metaspace, or `Replace` with `ByteFallback`, as sentencepiece models
have) concatenate strings, where a run of byte tokens such as `<0xE4>` is read as UTF-8 if the run as a whole
is valid, and else gives one U+FFFD per byte. Hence what can be said after each token: for bytes, all complete
characters; for strings, everything up to the last run of byte tokens that may still grow.

Invariant: the texts of all `push` calls and of `flush` concatenate to `tokenizer.decode(all token ids)`, up
to the first stop string. Stop strings are matched character by character (Aho and Corasick 1975), so where a
text is cut does not depend on how it falls into tokens: the match that ends first wins, of those that end
together the longest.
"""

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from plait.engine.tokenizer import BYTE_OF_CHARACTER, BYTE_TOKEN, Tokenizer, decoder_steps
from plait.errors import BadSetup


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text, step by step.

    Text that may be the beginning of a stop string is held back until it cannot be one. After a stop string
    was found nothing more is said. With `include_stop` the text ends with the stop string, else just before
    it. `continues_text` keeps the space that some tokenizers drop in front of the first word of a text: right
    when the tokens continue a prompt that is shown with them.

    Raises:
        BadSetup: the tokenizer's decoder is of a kind not known here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        *,
        continues_text: bool = False,
    ) -> None:
        self._decoder = _decoder_for(tokenizer, skip_special_tokens, continues_text)
        self._stops = _StopMatcher(stop_strings) if stop_strings else None
        self._include_stop = include_stop
        self._node = 0
        self._held = ""
        self._stopped: str | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stopped

    def push(self, token_ids: Sequence[int], *, match_stops: bool = True) -> tuple[str, str | None]:
        """Take the next tokens; returns the text that is now certain, and the stop string found, if any.

        `match_stops` False takes tokens that cannot stop the sequence, nor be part of a stop string
        (`min_tokens`).
        """
        if self._stopped is not None:
            return "", self._stopped
        text = self._decoder.push(token_ids)
        if match_stops:
            return self._emit(text), self._stopped
        held, self._held, self._node = self._held, "", 0
        return held + text, None

    def flush(self) -> str:
        """End the sequence; returns the text still held back.

        Bytes that never became a character are replaced by U+FFFD. A stop string may only now have come
        complete: then `stop_string` is set.
        """
        if self._stopped is not None:
            return ""
        text = self._emit(self._decoder.flush())
        if self._stopped is not None:
            return text
        held, self._held, self._node = self._held, "", 0
        return text + held

    def fork(self) -> "IncrementalDetokenizer":
        """A copy that goes on independently."""
        copy = object.__new__(IncrementalDetokenizer)
        copy.__dict__.update(self.__dict__)
        copy._decoder = self._decoder.fork()
        return copy

    def _emit(self, text: str) -> str:
        """Look for stop strings in new text; returns what is certain of it and of the text held back."""
        if self._stops is None or not text:
            return text
        self._node, end, stop = self._stops.scan(self._node, text)
        known = self._held + text
        if stop is not None:
            self._stopped = stop
            upto = len(self._held) + end
            self._held = ""
            return known[: upto if self._include_stop else upto - len(stop)]
        certain = len(known) - self._stops.depth[self._node]
        self._held = known[certain:]
        return known[:certain]


class _Decoder(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...
    def fork(self) -> "_Decoder": ...


class _ByteDecoder:
    """Decodes tokens that spell bytes; `pieces` remembers those of token ids, for all sequences."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], pieces: dict[int, bytes]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1:
            return self._utf8.decode(self._piece(token_ids[0]))
        return self._utf8.decode(b"".join(map(self._piece, token_ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def fork(self) -> "_ByteDecoder":
        copy = _ByteDecoder(self._tokenizer, self._skipped, self._pieces)
        copy._utf8.setstate(self._utf8.getstate())
        return copy

    def _piece(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            content = None if token_id in self._skipped else self._tokenizer.token_content(token_id)
            piece = self._pieces[token_id] = b"" if content is None else _spelled_bytes(content)
        return piece


@dataclass(frozen=True, slots=True)
class _TextRules:
    """What a decoder that works on strings does.

    Each token has `replacements` made, and is a byte if `byte_fallback` and it is spelled so. The first loses
    every `first_drops`. Tokens are joined by `separator`. Then up to `strip_count` times `strip` goes from
    the front of the text, or of each token if `strip_each`.
    """

    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    first_drops: str = ""
    separator: str = ""
    strip: str = ""
    strip_count: int = 0
    strip_each: bool = False


class _TextDecoder:
    """Decodes tokens that spell strings, or single bytes (an int in `pieces`); None is a skipped token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skipped: frozenset[int],
        pieces: dict[int, str | int | None],
        rules: _TextRules,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._pieces = pieces
        self._rules = rules
        self._run = b""
        self._is_first = True
        self._left_to_strip = 0 if rules.strip_each else rules.strip_count

    def push(self, token_ids: Sequence[int]) -> str:
        found: list[str] = []
        for token_id in token_ids:
            piece = self._pieces[token_id] if token_id in self._pieces else self._learn(token_id)
            if isinstance(piece, int):
                self._run += bytes([piece])
            elif piece is not None:
                if self._run:
                    found.append(self._end_run())
                found.append(
                    self._first(token_id, piece) if self._is_first else self._rules.separator + piece
                )
            self._is_first = self._is_first and piece is None
        return self._stripped("".join(found))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def fork(self) -> "_TextDecoder":
        copy = _TextDecoder(self._tokenizer, self._skipped, self._pieces, self._rules)
        copy._run, copy._is_first, copy._left_to_strip = self._run, self._is_first, self._left_to_strip
        return copy

    def continue_text(self) -> None:
        """Treat the next token as one in the middle of a text."""
        self._is_first = False
        self._left_to_strip = 0

    def _learn(self, token_id: int) -> str | int | None:
        piece: str | int | None = None
        content = None if token_id in self._skipped else self._tokenizer.token_content(token_id)
        if content is not None:
            piece = content
            for old, new in self._rules.replacements:
                piece = piece.replace(old, new)
            match = BYTE_TOKEN.fullmatch(piece) if self._rules.byte_fallback else None
            if match is not None:
                piece = int(match[1], 16)
            elif self._rules.strip_each:
                piece = _without_prefix(piece, self._rules.strip, self._rules.strip_count)
        self._pieces[token_id] = piece
        return piece

    def _first(self, token_id: int, piece: str) -> str:
        if not self._rules.first_drops:
            return piece
        content = self._tokenizer.token_content(token_id) or ""
        return content.replace(self._rules.first_drops, "")

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        if not self._left_to_strip or not text:
            return text
        rest = _without_prefix(text, self._rules.strip, self._left_to_strip)
        self._left_to_strip = 0 if rest else self._left_to_strip - len(text)
        return rest


class _StopMatcher:
    """The automaton of Aho and Corasick over a request's stop strings.

    Nodes are prefixes of stop strings, node 0 the empty one; `depth` is their length: after any text the node
    is its longest suffix that some stop string begins with.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self._fail = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()

    def scan(self, node: int, text: str) -> tuple[int, int, str | None]:
        """Read `text` from `node`; returns the node, where in `text` reading ended, and the stop found."""
        follow, fail = self._next, self._fail
        for index, character in enumerate(text):
            while node and character not in follow[node]:
                node = fail[node]
            node = follow[node].get(character, 0)
            if self._match[node] is not None:
                return node, index + 1, self._match[node]
        return node, len(text), None

    def _insert(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[node] + 1)
                self._fail.append(0)
                self._match.append(None)
            node = self._next[node][character]
        self._match[node] = stop

    def _link(self) -> None:
        waiting = deque([0])
        while waiting:
            node = waiting.popleft()
            for character, child in self._next[node].items():
                waiting.append(child)
                if node == 0:
                    continue
                link = self._fail[node]
                while link and character not in self._next[link]:
                    link = self._fail[link]
                self._fail[child] = self._next[link].get(character, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]


def _decoder_for(tokenizer: Tokenizer, skip_special_tokens: bool, continues_text: bool) -> _Decoder:
    skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
    pieces = tokenizer.pieces[skip_special_tokens]
    if tokenizer.is_byte_level:
        return _ByteDecoder(tokenizer, skipped, pieces)
    decoder = _TextDecoder(tokenizer, skipped, pieces, _text_rules(tokenizer))
    if continues_text:
        decoder.continue_text()
    return decoder


def _text_rules(tokenizer: Tokenizer) -> _TextRules:
    """Read the decoder of a tokenizer.json.

    Raises:
        BadSetup: it has a step, or an order of steps, that is not known here.
    """
    steps = decoder_steps(tokenizer.decoder_config)
    if not steps:
        return _TextRules(separator=" ")
    rules: dict[str, Any] = {}
    fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                rules["replacements"] = (*rules.get("replacements", ()), (old, new))
            case {"type": "ByteFallback"} if not fused:
                rules["byte_fallback"] = True
            case {"type": "Metaspace", "replacement": str(mark)} if len(steps) == 1:
                rules["replacements"] = ((mark, " "),)
                rules["first_drops"] = "" if step.get("prepend_scheme") == "never" else mark
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(strip), "start": int(count), "stop": 0} if (
                "strip" not in rules
            ):
                rules |= {"strip": strip, "strip_count": count, "strip_each": not fused}
            case _:
                raise BadSetup(
                    f"the tokenizer in {tokenizer.folder} decodes with {_name(step)} among "
                    f"{[_name(one) for one in steps]}; known are ByteLevel, Metaspace, and Replace, "
                    "ByteFallback, Fuse, Strip in this order"
                )
    return _TextRules(**rules)


def _name(step: Mapping[str, Any]) -> str:
    return str(step.get("type"))


def _spelled_bytes(content: str) -> bytes:
    """Read a token in GPT-2's alphabet; one with any other character stands for itself."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in content])
    except KeyError:
        return content.encode()


def _without_prefix(text: str, prefix: str, count: int) -> str:
    start = 0
    while start < min(count, len(text)) and text[start] == prefix:
        start += 1
    return text[start:]
