"""BurstGPT's traces: times in seconds, sessions (in its second release), models and kinds of clients.

    Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
    5,1024,2.7,ChatGPT,472,18,490,Conversation log

A session becomes a conversation, the model an adapter, the kind of log a tenant. How long an answer took there is not
kept: it is a result.
"""

from collections.abc import Iterable, Iterator

from plait.errors import BadSetup
from plait.workload.csv_lines import csv_records
from plait.workload.fields import seconds, whole_number
from plait.workload.traces import TraceRequest

_COLUMNS = (
    "Timestamp",
    "Session ID",
    "Elapsed time",
    "Model",
    "Request tokens",
    "Response tokens",
    "Total tokens",
    "Log Type",
)
_NEEDED = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")


def parse_burstgpt(lines: Iterable[str], *, where: str) -> tuple[TraceRequest, ...]:
    """Read a trace. Requests without response tokens failed, and are left out.

    Raises:
        BadSetup: a line is malformed; the message names it.
    """
    found: list[tuple[float, TraceRequest]] = []
    turns: dict[str, int] = {}
    for place, fields in csv_records(lines, needed=_NEEDED, where=where):
        arrival_s = seconds(fields, "Timestamp", place)
        prompt_tokens = whole_number(fields, "Request tokens", place)
        output_tokens = whole_number(fields, "Response tokens", place)
        if not output_tokens:
            continue
        if not prompt_tokens:
            raise BadSetup(f"{place}: Request tokens is 0 and Response tokens is not")
        session = str(fields.get("Session ID", "")) or None
        turn = 0 if session is None else turns.get(session, 0)
        if session is not None:
            turns[session] = turn + 1
        request = TraceRequest(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            conversation=session,
            turn=turn,
            tenant=str(fields["Log Type"]) or None,
            adapter=str(fields["Model"]) or None,
        )
        found.append((arrival_s, request))
    if not found:
        raise BadSetup(f"{where} holds no request that succeeded")
    return tuple(request for _, request in sorted(found, key=lambda pair: pair[0]))


def format_burstgpt(trace: Iterable[TraceRequest]) -> Iterator[str]:
    """The lines of a file, without line ends; the elapsed time is left empty."""
    yield ",".join(_COLUMNS)
    for request in trace:
        texts = [request.conversation or "", "", request.adapter or ""]
        counts = [request.prompt_tokens, request.output_tokens, request.prompt_tokens + request.output_tokens]
        yield ",".join(
            [repr(request.arrival_s), *map(_quoted, texts), *map(str, counts), _quoted(request.tenant or "")]
        )


def _quoted(cell: str) -> str:
    if any(character in cell for character in ',"\r\n'):
        return '"' + cell.replace('"', '""') + '"'
    return cell
