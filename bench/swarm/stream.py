"""One streamed answer: its tokens, and when each came."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx


@dataclass
class Answer:
    """Token ids in order, when each reached the client, and how it ended ("": in the usual way)."""

    token_ids: list[int] = field(default_factory=list)
    unix_s: list[float] = field(default_factory=list)
    error: str = ""

    def pause_s(self, since_unix_s: float) -> float:
        """The longest time between two tokens of which the second came after a moment."""
        gaps = [later - one for one, later in pairwise(self.unix_s) if later >= since_unix_s]
        return max(gaps, default=0.0)


def stream_answer(
    origin: str,
    prompt: Sequence[int],
    tokens: int,
    on_tokens: Callable[[int], None] = lambda count: None,
    **fields: Any,
) -> Answer:
    """Ask for so many tokens after a prompt; `on_tokens` is told how many have come, after each event."""
    answer = Answer()
    body = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **fields,
    }
    with httpx.stream("POST", origin + "/v1/completions", json=body, timeout=120) as response:
        if response.status_code != 200:
            answer.error = response.read().decode()
            return answer
        on_tokens(0)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.error = event["error"]["message"]
                continue
            for choice in event["choices"]:
                new = choice.get("token_ids") or []
                answer.token_ids += new
                answer.unix_s += [time.time()] * len(new)
            on_tokens(len(answer.token_ids))
    return answer
