"""The inner side of an engine process: lines of JSON in, lines of JSON out.

The first line out says what was loaded. Then each line in is one run, answered by one line:

    {"prompts": [[token id, ...], ...], "output_tokens": [n, ...]}    add requests and compute until all have ended
    {..., "until_tokens": n}                                          ... until each request has n more tokens
    {"until_tokens": n}                                               go on with those added before
    {"forget": true}                                                  end all requests

    -> {"arrivals_s": [[seconds, ...], ...], "kernel_s": seconds or null, "steps": n}

Arrivals count from the start of the run, one list for each request in the order they were added. What the libraries
print goes to standard error. Standard library only: this file is imported in the environment of every peer.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class DrivenEngine(Protocol):
    """What a driver makes of its library; requests are numbered from 0 in the order they are added."""

    def facts(self) -> dict[str, Any]:
        """Versions, settings and bytes, for the record."""
        ...

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a request: greedy, and always as long as asked for."""
        ...

    def step(self) -> Sequence[int]:
        """One step; returns the request of every token that came."""
        ...

    def has_work(self) -> bool: ...

    def forget(self) -> None:
        """End and drop all requests."""
        ...

    def kernel_s(self) -> float | None:
        """Seconds spent in arithmetic so far, if the engine knows."""
        ...


def drive(load: Callable[[dict[str, Any]], DrivenEngine]) -> None:
    """Load the engine that the JSON of the first argument describes, and serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    start_s = time.perf_counter()
    engine = load(json.loads(sys.argv[1]))
    print(json.dumps({"load_s": time.perf_counter() - start_s, **engine.facts()}), file=answers)
    open_requests = 0
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("forget"):
            engine.forget()
            open_requests = 0
            print("{}", file=answers)
            continue
        result = _run(engine, command, open_requests)
        open_requests = len(result["arrivals_s"]) if engine.has_work() else 0
        print(json.dumps(result), file=answers)


def _run(engine: DrivenEngine, command: dict[str, Any], open_requests: int) -> dict[str, Any]:
    prompts: list[list[int]] = command.get("prompts", [])
    until_tokens: int | None = command.get("until_tokens")
    arrivals_s: list[list[float]] = [[] for _ in range(open_requests + len(prompts))]
    steps, kernel_before_s, start_s = 0, engine.kernel_s(), time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(open_requests + number, prompt, command["output_tokens"][number])
    while engine.has_work() and (
        until_tokens is None or any(len(times) < until_tokens for times in arrivals_s)
    ):
        came = engine.step()
        now_s = time.perf_counter() - start_s
        steps += 1
        for request in came:
            arrivals_s[request].append(now_s)
    kernel_after_s = engine.kernel_s()
    kernel_s = None
    if kernel_before_s is not None and kernel_after_s is not None:
        kernel_s = kernel_after_s - kernel_before_s
    return {"arrivals_s": arrivals_s, "kernel_s": kernel_s, "steps": steps}
