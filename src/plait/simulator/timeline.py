"""A run as people look at it: a Chrome trace (chrome://tracing, Perfetto) of steps and requests."""

import json
from pathlib import Path
from typing import Any

from plait.errors import BadSetup
from plait.scheduling import ScheduledStep
from plait.simulator.flight import Flight
from plait.simulator.outcomes import Ending
from plait.simulator.simulated_worker import SimulatedWorker

MAX_EVENTS = 1_000_000
_NS_PER_US = 1000


class Timeline:
    """Steps of machines and lives of requests, up to a million of them; what comes after is counted."""

    def __init__(self) -> None:
        self.left_out = 0
        self._events: list[dict[str, Any]] = []
        self._rows: dict[str, int] = {}

    def step(self, worker: SimulatedWorker, step: ScheduledStep, began_ns: int, ended_ns: int) -> None:
        """A machine has run a step."""
        self._add(
            {
                "name": f"{len(step.chunks)} sequences",
                "cat": "step",
                "ph": "X",
                "pid": 0,
                "tid": self._row(worker.name),
                "ts": began_ns / _NS_PER_US,
                "dur": (ended_ns - began_ns) / _NS_PER_US,
                "args": {
                    "tokens": step.tokens,
                    "admitted": len(step.admitted),
                    "preempted": len(step.preempted),
                },
            }
        )

    def request(self, flight: Flight, ending: Ending) -> None:
        """A request is over."""
        end_ns = max(flight.last_ns, flight.arrival_ns)
        common = {"cat": "request", "pid": 1, "id": flight.number, "name": flight.id}
        args = {"prompt": len(flight.prompt), "output": flight.produced, "ending": ending}
        self._add({**common, "ph": "b", "ts": flight.arrival_ns / _NS_PER_US, "args": args})
        if flight.first_ns:
            self._add(
                {**common, "ph": "n", "ts": flight.first_ns / _NS_PER_US, "args": {"what": "first token"}}
            )
        self._add({**common, "ph": "e", "ts": end_ns / _NS_PER_US})

    def write(self, file: Path) -> None:
        """Write the trace.

        Raises:
            BadSetup: the file cannot be written.
        """
        names: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "machines"}},
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "requests"}},
        ]
        names += [
            {"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": name}}
            for name, row in self._rows.items()
        ]
        trace = {"traceEvents": names + self._events, "displayTimeUnit": "ms"}
        try:
            file.write_text(json.dumps(trace, separators=(",", ":")))
        except OSError as error:
            raise BadSetup(f"the trace cannot be written to {str(file)!r}: {error.strerror}") from error

    def _row(self, name: str) -> int:
        return self._rows.setdefault(name, len(self._rows))

    def _add(self, event: dict[str, Any]) -> None:
        if len(self._events) < MAX_EVENTS:
            self._events.append(event)
        else:
            self.left_out += 1
