"""Azure's LLM inference traces (2023 and 2024): arrival times and lengths, nothing else.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:17:03.9799600,4808,10

Times are counted in ticks of 100 ns, all that seven digits hold, so that reading what was written gives equal times.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

from plait.errors import BadSetup
from plait.workload.csv_lines import csv_records
from plait.workload.fields import whole_number
from plait.workload.traces import TraceRequest

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TICKS_PER_S = 10**7
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,7}))?(Z|[+-]\d\d:?\d\d)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_azure(lines: Iterable[str], *, where: str) -> tuple[TraceRequest, ...]:
    """Read a trace; its first arrival is at 0. Requests without output were not served, and are left out.

    Raises:
        BadSetup: a line is malformed; the message names it.
    """
    found: list[tuple[int, int, int]] = []
    for place, fields in csv_records(lines, needed=_COLUMNS, where=where):
        ticks = _ticks(str(fields["TIMESTAMP"]), place)
        prompt_tokens = whole_number(fields, "ContextTokens", place, least=1)
        output_tokens = whole_number(fields, "GeneratedTokens", place)
        if output_tokens:
            found.append((ticks, prompt_tokens, output_tokens))
    if not found:
        raise BadSetup(f"{where} holds no request")
    found.sort(key=lambda request: request[0])
    first = found[0][0]
    return tuple(
        TraceRequest(
            arrival_s=(ticks - first) / _TICKS_PER_S, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )
        for ticks, prompt_tokens, output_tokens in found
    )


def format_azure(trace: Iterable[TraceRequest], *, start: datetime | None = None) -> Iterator[str]:
    """The lines of a file, without line ends; the trace begins at `start` (1970 in UTC if none is given)."""
    start = start or _EPOCH
    yield ",".join(_COLUMNS)
    for request in trace:
        whole_s, ticks = divmod(round(request.arrival_s * _TICKS_PER_S), _TICKS_PER_S)
        moment = start + timedelta(seconds=whole_s)
        yield f"{moment:%Y-%m-%d %H:%M:%S}.{ticks:07d},{request.prompt_tokens},{request.output_tokens}"


def _ticks(stamp: str, place: str) -> int:
    match = _STAMP.fullmatch(stamp)
    if match is None:
        raise BadSetup(f"{place}: TIMESTAMP must look like 2023-11-16 18:17:03.9799600, not {stamp!r:.60}")
    try:
        moment = datetime.fromisoformat(match[1] + (match[3] or "+00:00"))
    except ValueError as error:
        raise BadSetup(f"{place}: TIMESTAMP {stamp!r:.60} is no moment ({error})") from error
    since = moment - _EPOCH
    whole_s = since.days * 86400 + since.seconds
    return whole_s * _TICKS_PER_S + int((match[2] or "").ljust(7, "0"))
