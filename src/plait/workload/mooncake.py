"""Mooncake's traces (FAST 2025): times in milliseconds, lengths, and which prompts begin alike.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353]}

A prompt has one number for every 512 tokens that it fills or begins. In the conversation trace arrivals are bunched on
a grid of 3 s, which no client does: `spread_arrivals` draws them apart.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from numpy.random import Generator

from plait.errors import BadSetup
from plait.workload.fields import block_numbers, json_object, whole_number
from plait.workload.traces import TraceRequest

ARRIVAL_GRID_S = 3.0
_NEEDED = ("timestamp", "input_length", "output_length", "hash_ids")


def parse_mooncake(lines: Iterable[str], *, where: str) -> tuple[TraceRequest, ...]:
    """Read a trace.

    Raises:
        BadSetup: a line is malformed; the message names it.
    """
    found: list[tuple[int, TraceRequest]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        fields = json_object(line, place, _NEEDED)
        unknown = sorted(fields.keys() - set(_NEEDED))
        if unknown:
            raise BadSetup(f"{place}: unknown field {unknown[0]!r}; known are {', '.join(_NEEDED)}")
        milliseconds = whole_number(fields, "timestamp", place)
        prompt_tokens = whole_number(fields, "input_length", place, least=1)
        request = TraceRequest(
            arrival_s=milliseconds / 1000,
            prompt_tokens=prompt_tokens,
            output_tokens=whole_number(fields, "output_length", place, least=1),
            prompt_blocks=block_numbers(fields, "hash_ids", prompt_tokens, place),
        )
        found.append((milliseconds, request))
    if not found:
        raise BadSetup(f"{where} holds no request; write one JSON object a line with {', '.join(_NEEDED)}")
    return tuple(request for _, request in sorted(found, key=lambda pair: pair[0]))


def format_mooncake(trace: Iterable[TraceRequest]) -> Iterator[str]:
    """The lines of a file, without line ends; times are rounded to milliseconds."""
    for request in trace:
        yield json.dumps(
            {
                "timestamp": round(request.arrival_s * 1000),
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": list(request.prompt_blocks),
            }
        )


def spread_arrivals(
    trace: Sequence[TraceRequest], rng: Generator, *, grid_s: float = ARRIVAL_GRID_S
) -> tuple[TraceRequest, ...]:
    """The same requests, each somewhere within the cell of the grid that it was rounded down to."""
    later = [
        replace(request, arrival_s=request.arrival_s // grid_s * grid_s + float(offset_s))
        for request, offset_s in zip(trace, rng.uniform(0, grid_s, len(trace)), strict=True)
    ]
    return tuple(sorted(later, key=lambda request: request.arrival_s))
