"""A trace: requests in order of arrival.

Its file format is JSON lines, one request a line, blank lines ignored:

    {"arrival_s": 0.25, "prompt_tokens": 161, "output_tokens": 338, "prompt": "optional text"}
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from numpy.random import Generator

from plait.errors import BadSetup
from plait.workload.lengths import LengthMix

_FIELDS = ("arrival_s", "prompt_tokens", "output_tokens", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request: when it comes, and how many tokens it brings and asks for.

    `arrival_s` counts from the start of the trace. `prompt` is the text, where the trace has it; then
    `prompt_tokens` says how long it was for the tokenizer that made the trace.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None


def synthesize_trace(
    arrivals_s: Sequence[float], mix: LengthMix, rng: Generator, *, most_total_tokens: int = 2**31
) -> tuple[TraceRequest, ...]:
    """Give requests at `arrivals_s` lengths of `mix`, each at most `most_total_tokens` together."""
    prompts, outputs = mix.draw(len(arrivals_s), rng, most_total_tokens=most_total_tokens)
    return tuple(
        TraceRequest(arrival_s=float(arrival_s), prompt_tokens=int(prompt), output_tokens=int(output))
        for arrival_s, prompt, output in zip(arrivals_s, prompts, outputs, strict=True)
    )


def format_trace(trace: Iterable[TraceRequest]) -> Iterator[str]:
    """The lines of a trace file, without line ends; reading them gives an equal trace."""
    for request in trace:
        record: dict[str, object] = {
            "arrival_s": request.arrival_s,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
        }
        if request.prompt is not None:
            record["prompt"] = request.prompt
        yield json.dumps(record, ensure_ascii=False)


def parse_trace(lines: Iterable[str], *, where: str) -> tuple[TraceRequest, ...]:
    """Read a trace; `where` (a file name) is for the messages.

    Raises:
        BadSetup: a line that is no such request or is out of order; the message names line and field.
    """
    trace: list[TraceRequest] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        request = _parse_request(line, place)
        if trace and request.arrival_s < trace[-1].arrival_s:
            raise BadSetup(
                f"{place}: arrival_s {request.arrival_s} is before that of the request above "
                f"({trace[-1].arrival_s}); sort the trace by arrival_s"
            )
        trace.append(request)
    if not trace:
        raise BadSetup(
            f"{where} holds no request; write one JSON object a line with {', '.join(_FIELDS[:3])}"
        )
    return tuple(trace)


def _parse_request(line: str, place: str) -> TraceRequest:
    try:
        record: object = json.loads(line)
    except ValueError as error:
        raise BadSetup(f"{place} is not JSON ({error}); write one JSON object a line") from error
    if not isinstance(record, dict):
        raise BadSetup(f"{place} is not a JSON object; write one with {', '.join(_FIELDS[:3])}")
    fields = cast(dict[str, object], record)
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise BadSetup(f"{place}: unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    missing = [name for name in _FIELDS[:3] if name not in fields]
    if missing:
        raise BadSetup(f"{place}: field {missing[0]!r} is missing")
    arrival_s = fields["arrival_s"]
    if isinstance(arrival_s, bool) or not isinstance(arrival_s, int | float):
        raise BadSetup(f"{place}: arrival_s must be a number of seconds, not {arrival_s!r}")
    if not (arrival_s >= 0 and math.isfinite(arrival_s)):
        raise BadSetup(f"{place}: arrival_s must be a finite number of seconds from 0 on, not {arrival_s!r}")
    prompt = fields.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise BadSetup(f"{place}: prompt must be text, not {prompt!r}")
    return TraceRequest(
        arrival_s=float(arrival_s),
        prompt_tokens=_token_count(fields, "prompt_tokens", place),
        output_tokens=_token_count(fields, "output_tokens", place),
        prompt=prompt,
    )


def _token_count(fields: dict[str, object], name: str, place: str) -> int:
    count = fields[name]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadSetup(f"{place}: {name} must be a whole number from 1 on, not {count!r}")
    return count
