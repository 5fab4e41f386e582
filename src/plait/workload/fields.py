"""Values of untrusted trace files: bounded, of the right kind, or an error that says where."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

from plait.errors import BadSetup

PROMPT_BLOCK_TOKENS = 512
"""Tokens that one number of `TraceRequest.prompt_blocks` stands for, as in Mooncake's traces."""
MAX_LINE_CHARACTERS = 16 << 20
MAX_TOKENS = 2**31
MAX_SECONDS = 1e10


def json_object(line: str, place: str, needed: Sequence[str]) -> Mapping[str, object]:
    """The object of one line, with at least the needed fields.

    Raises:
        BadSetup: it is none, or too long, or a field is missing.
    """
    if len(line) > MAX_LINE_CHARACTERS:
        raise BadSetup(f"{place} is longer than any request: {len(line)} characters")
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadSetup(f"{place} is not JSON ({error}); write one JSON object a line") from error
    if not isinstance(record, dict):
        raise BadSetup(f"{place} is not a JSON object; write one with {', '.join(needed)}")
    fields = cast(dict[str, object], record)
    missing = [name for name in needed if name not in fields]
    if missing:
        raise BadSetup(f"{place}: field {missing[0]!r} is missing")
    return fields


def whole_number(fields: Mapping[str, object], name: str, place: str, *, least: int = 0) -> int:
    """A count; JSON numbers and CSV texts alike.

    Raises:
        BadSetup: it is none, or not between `least` and 2^31.
    """
    value = fields[name]
    count: int | None = None
    if isinstance(value, str):
        count = int(value) if value.isascii() and value.isdigit() and len(value) <= 12 else None
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    if count is None or not least <= count <= MAX_TOKENS:
        raise BadSetup(f"{place}: {name} must be a whole number from {least} on, not {value!r:.60}")
    return count


def seconds(fields: Mapping[str, object], name: str, place: str) -> float:
    """A time since the start of the trace; JSON numbers and CSV texts alike.

    Raises:
        BadSetup: it is none, negative, or further away than any trace.
    """
    value = fields[name]
    found: float | None = None
    if isinstance(value, str):
        try:
            found = float(value) if len(value) <= 40 else None
        except ValueError:
            found = None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value) if abs(value) <= MAX_SECONDS else math.inf
    if found is None:
        raise BadSetup(f"{place}: {name} must be a number of seconds, not {value!r:.60}")
    if not 0 <= found <= MAX_SECONDS:
        raise BadSetup(f"{place}: {name} must be a finite number of seconds from 0 on, not {value!r:.60}")
    return found


def block_numbers(fields: Mapping[str, object], name: str, prompt_tokens: int, place: str) -> tuple[int, ...]:
    """The blocks of a prompt: none, or as many as its tokens fill or begin.

    Raises:
        BadSetup: they are no whole numbers, or not so many.
    """
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadSetup(f"{place}: {name} must be a list of whole numbers, not {value!r:.60}")
    numbers = cast(list[object], value)
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise BadSetup(f"{place}: {name} must hold whole numbers only")
    wanted = -(-prompt_tokens // PROMPT_BLOCK_TOKENS)
    if numbers and len(numbers) != wanted:
        raise BadSetup(
            f"{place}: {name} has {len(numbers)} numbers, and a prompt of {prompt_tokens} tokens has {wanted} "
            f"blocks of {PROMPT_BLOCK_TOKENS}"
        )
    return tuple(cast(list[int], numbers))
