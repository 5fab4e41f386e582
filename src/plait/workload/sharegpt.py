"""ShareGPT's conversations, as benchmarks use them: the first question and its answer, filtered by length.

    [{"id": "a1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}]

The filter is that of vLLM's benchmark: both at least 4 tokens, the question at most 1,024, together at most 2,048.
There are no times: all arrive at 0, and the user chooses arrivals.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

from plait.errors import BadSetup
from plait.workload.traces import TraceRequest

MAX_FILE_CHARACTERS = 2 << 30
_QUESTIONS = ("human", "user")
_ANSWERS = ("gpt", "chatgpt", "assistant", "bard", "bing")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareGptFilter:
    """Which conversations are taken, by tokens."""

    least_tokens: int = 4
    most_prompt_tokens: int = 1024
    most_total_tokens: int = 2048


USUAL_FILTER = ShareGptFilter()


def parse_sharegpt(
    text: str,
    count_tokens: Callable[[str], int],
    *,
    where: str,
    lengths: ShareGptFilter = USUAL_FILTER,
) -> tuple[TraceRequest, ...]:
    """Read a file, in its order. Conversations that do not begin with a question and its answer are left out.

    Raises:
        BadSetup: the file is no list of conversations, or none of them passes.
    """
    if len(text) > MAX_FILE_CHARACTERS:
        raise BadSetup(f"{where} is larger than any ShareGPT file: {len(text)} characters")
    try:
        entries: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSetup(f"{where} is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise BadSetup(f"{where} is no list of conversations")
    found: list[TraceRequest] = []
    for number, entry in enumerate(cast(list[object], entries), start=1):
        id, turns = _conversation(entry, f"{where}, conversation {number}")
        if len(turns) < 2 or turns[0][0] not in _QUESTIONS or turns[1][0] not in _ANSWERS:
            continue
        prompt, answer = turns[0][1], turns[1][1]
        prompt_tokens, output_tokens = count_tokens(prompt), count_tokens(answer)
        if (
            min(prompt_tokens, output_tokens) < lengths.least_tokens
            or prompt_tokens > lengths.most_prompt_tokens
            or prompt_tokens + output_tokens > lengths.most_total_tokens
        ):
            continue
        found.append(
            TraceRequest(
                arrival_s=0.0,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                prompt=prompt,
                answer=answer,
                conversation=id,
            )
        )
    if not found:
        raise BadSetup(f"{where}: no conversation passes the filter {lengths}")
    return tuple(found)


def format_sharegpt(trace: Iterable[TraceRequest]) -> str:
    """The text of a file.

    Raises:
        BadSetup: a request without its texts.
    """
    entries: list[dict[str, object]] = []
    for number, request in enumerate(trace):
        if request.prompt is None or request.answer is None:
            raise BadSetup(f"request {number} has no texts, and a ShareGPT file has nothing else")
        turns = [{"from": "human", "value": request.prompt}, {"from": "gpt", "value": request.answer}]
        entries.append({"id": request.conversation or str(number), "conversations": turns})
    return json.dumps(entries, ensure_ascii=False, indent=1)


def _conversation(entry: object, place: str) -> tuple[str | None, list[tuple[str, str]]]:
    if not isinstance(entry, dict):
        raise BadSetup(f"{place} is no JSON object")
    fields = cast(dict[str, object], entry)
    turns, id = fields.get("conversations"), fields.get("id")
    if not isinstance(turns, list):
        raise BadSetup(f"{place} has no list of turns, 'conversations'")
    found: list[tuple[str, str]] = []
    for turn in cast(list[object], turns):
        said = cast(dict[str, object], turn) if isinstance(turn, dict) else {}
        who, value = said.get("from"), said.get("value")
        if not isinstance(who, str) or not isinstance(value, str):
            raise BadSetup(f"{place} has a turn without the texts 'from' and 'value'")
        found.append((who, value))
    return None if id is None else str(id), found
