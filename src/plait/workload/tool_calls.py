"""Conversations with tools: a model calls one, it runs for a while, and the next call of the model follows.

One conversation a line. A call comes `tool_s` seconds after the one before it has ended, the first at `arrival_s`:

    {"conversation": "a", "arrival_s": 1.5, "calls": [{"prompt_tokens": 900, "output_tokens": 60},
     {"prompt_tokens": 1300, "output_tokens": 20, "tool_s": 2.5}]}

When an answer ends is known only to who serves it. So a request keeps `after_s`, and its arrival is an estimate for
whoever sends at given times: answers come at `output_tokens_per_s`.
"""

import json
from collections.abc import Iterable, Iterator
from typing import cast

from plait.errors import BadSetup
from plait.workload.fields import json_object, seconds, whole_number
from plait.workload.traces import TraceRequest

_NEEDED = ("conversation", "arrival_s", "calls")
_CALL = ("prompt_tokens", "output_tokens", "tool_s")
MAX_CALLS = 100_000


def parse_tool_calls(
    lines: Iterable[str], *, where: str, output_tokens_per_s: float = 20.0
) -> tuple[TraceRequest, ...]:
    """Read conversations; their requests in order of (estimated) arrival.

    Raises:
        BadSetup: a line is malformed; the message names it.
    """
    if not 0 < output_tokens_per_s < 1e9:
        raise BadSetup(f"answers come at a rate above 0, not at {output_tokens_per_s} tokens/s")
    found: list[TraceRequest] = []
    names: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        calls = _conversation(line, place, output_tokens_per_s)
        name = calls[0].conversation or ""
        if name in names:
            raise BadSetup(f"{place}: conversation {name!r:.60} has a line already")
        names.add(name)
        found.extend(calls)
    if not found:
        raise BadSetup(
            f"{where} holds no conversation; write one JSON object a line with {', '.join(_NEEDED)}"
        )
    return tuple(sorted(found, key=lambda request: request.arrival_s))


def format_tool_calls(trace: Iterable[TraceRequest]) -> Iterator[str]:
    """The lines of a file, without line ends, conversations in the order in which they begin.

    Raises:
        BadSetup: a request belongs to no conversation, or follows no call.
    """
    conversations: dict[str, list[TraceRequest]] = {}
    for request in trace:
        if request.conversation is None:
            raise BadSetup(f"the request at {request.arrival_s:g} s belongs to no conversation")
        conversations.setdefault(request.conversation, []).append(request)
    for name, unordered in conversations.items():
        calls = sorted(unordered, key=lambda request: request.turn)
        written: list[dict[str, float]] = []
        for number, call in enumerate(calls):
            if (call.after_s is None) != (number == 0):
                raise BadSetup(f"conversation {name!r:.60}: exactly its first call comes after no other")
            written.append({"prompt_tokens": call.prompt_tokens, "output_tokens": call.output_tokens})
            if call.after_s is not None:
                written[-1]["tool_s"] = call.after_s
        record = {"conversation": name, "arrival_s": calls[0].arrival_s, "calls": written}
        yield json.dumps(record, ensure_ascii=False)


def _conversation(line: str, place: str, output_tokens_per_s: float) -> list[TraceRequest]:
    fields = json_object(line, place, _NEEDED)
    name, calls = fields["conversation"], fields["calls"]
    unknown = sorted(fields.keys() - set(_NEEDED))
    if unknown:
        raise BadSetup(f"{place}: unknown field {unknown[0]!r:.60}; known are {', '.join(_NEEDED)}")
    if not isinstance(name, str) or not name:
        raise BadSetup(f"{place}: conversation must be a name, not {name!r:.60}")
    if not isinstance(calls, list) or not 0 < len(cast("list[object]", calls)) <= MAX_CALLS:
        raise BadSetup(f"{place}: calls must be a list of 1 to {MAX_CALLS} calls")
    at_s = seconds(fields, "arrival_s", place)
    found: list[TraceRequest] = []
    for turn, call in enumerate(cast("list[object]", calls)):
        here = f"{place}, call {turn + 1}"
        if not isinstance(call, dict) or call.keys() - set(_CALL):
            raise BadSetup(f"{here} is no object with {', '.join(_CALL)}")
        values = cast("dict[str, object]", call)
        missing = [each for each in _CALL[: 3 if turn else 2] if each not in values]
        if missing or (not turn and "tool_s" in values):
            raise BadSetup(
                f"{here}: every call has the tokens of {' and '.join(_CALL[:2])}, all but the first tool_s"
            )
        after_s = seconds(values, "tool_s", here) if turn else None
        if after_s is not None:
            at_s += found[-1].output_tokens / output_tokens_per_s + after_s
        found.append(
            TraceRequest(
                arrival_s=at_s,
                prompt_tokens=whole_number(values, "prompt_tokens", here, least=1),
                output_tokens=whole_number(values, "output_tokens", here, least=1),
                conversation=name,
                turn=turn,
                after_s=after_s,
            )
        )
    return found
