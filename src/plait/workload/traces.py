"""A trace: requests in order of arrival.

Its file format is JSON lines, one request a line, blank lines ignored; the first three fields are needed, the others
are those of `TraceRequest`:

    {"arrival_s": 0.25, "prompt_tokens": 161, "output_tokens": 338, "prompt": "optional text"}
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from numpy.random import Generator

from plait.errors import BadSetup
from plait.workload.fields import block_numbers, json_object, seconds, whole_number
from plait.workload.lengths import LengthMix

_NEEDED = ("arrival_s", "prompt_tokens", "output_tokens")
_TEXTS = ("prompt", "answer", "conversation", "tenant", "adapter")
_FIELDS = (*_NEEDED, *_TEXTS, "turn", "deadline_s", "after_s", "prompt_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request: when it comes, and how many tokens it brings and asks for.

    `arrival_s` counts from the start of the trace, `deadline_s` from there too. `prompt` and `answer` are the texts,
    where the trace has them; then the counts of tokens are those of the tokenizer that made the trace. `turn` counts
    from 0 within a conversation, whose prompts contain their history; `after_s` is what passes between the end of the
    turn before and this one, where a trace knows that (a tool runs), and `arrival_s` is then an estimate. `adapter` is
    the model or adapter asked for.
    Equal numbers in `prompt_blocks` stand for equal prompts up to the end of that block; the last one may be partial.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None
    answer: str | None = None
    conversation: str | None = None
    turn: int = 0
    tenant: str | None = None
    adapter: str | None = None
    deadline_s: float | None = None
    after_s: float | None = None
    prompt_blocks: tuple[int, ...] = ()


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
        for name in _TEXTS:
            if getattr(request, name) is not None:
                record[name] = getattr(request, name)
        if request.turn:
            record["turn"] = request.turn
        if request.deadline_s is not None:
            record["deadline_s"] = request.deadline_s
        if request.after_s is not None:
            record["after_s"] = request.after_s
        if request.prompt_blocks:
            record["prompt_blocks"] = request.prompt_blocks
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
        raise BadSetup(f"{where} holds no request; write one JSON object a line with {', '.join(_NEEDED)}")
    return tuple(trace)


def _parse_request(line: str, place: str) -> TraceRequest:
    fields = json_object(line, place, _NEEDED)
    unknown = sorted(fields.keys() - set(_FIELDS))
    if unknown:
        raise BadSetup(f"{place}: unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    for name in _TEXTS:
        if fields.get(name) is not None and not isinstance(fields[name], str):
            raise BadSetup(f"{place}: {name} must be text, not {fields[name]!r:.60}")
    texts = {name: cast(str | None, fields.get(name)) for name in _TEXTS}
    prompt_tokens = whole_number(fields, "prompt_tokens", place, least=1)
    return TraceRequest(
        arrival_s=seconds(fields, "arrival_s", place),
        prompt_tokens=prompt_tokens,
        output_tokens=whole_number(fields, "output_tokens", place, least=1),
        turn=whole_number(fields, "turn", place) if "turn" in fields else 0,
        deadline_s=_seconds_if_any(fields, "deadline_s", place),
        after_s=_seconds_if_any(fields, "after_s", place),
        prompt_blocks=block_numbers(fields, "prompt_blocks", prompt_tokens, place),
        **texts,
    )


def _seconds_if_any(fields: Mapping[str, object], name: str, place: str) -> float | None:
    return None if fields.get(name) is None else seconds(fields, name, place)
