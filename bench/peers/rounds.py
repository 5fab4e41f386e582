"""Measuring engines in turns, so that whatever the machine does meanwhile happens to all of them."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from peers.engines import Choice
from peers.machine import Limit, OtherLoad, Probe, preferred_session, wait_until_quiet
from peers.process import EngineDied, EngineProcess


class Suspendable(Protocol):
    """Leaves the cores to others between its turns."""

    def suspend(self) -> None: ...
    def resume(self) -> None: ...


Started = TypeVar("Started", bound=EngineProcess)
Running = TypeVar("Running", bound=Suspendable)
Sample = dict[str, Any]

# A turn during which others took more of the cores than this is taken again.
DISTURBED_CORES = 0.15


def start(
    stack: ExitStack, choices: Sequence[Choice], make: Callable[[Choice], Started], absent: dict[str, str]
) -> dict[str, Started]:
    """Start what is installed, one after another, each suspended when ready; `absent` says what is not, and why."""
    running: dict[str, Started] = {}
    for choice in choices:
        if choice.missing:
            absent[choice.name] = f"not installed: {choice.missing}"
            continue
        print(f"starting {choice.name}", file=sys.stderr, flush=True)
        try:
            running[choice.name] = stack.enter_context(make(choice))
        except EngineDied as died:
            absent[choice.name] = f"did not start: {died}"
        else:
            running[choice.name].suspend()
    return running


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How engines take turns: `repetitions` rounds, each engine once in a round, every second round backwards."""

    probe: Probe
    repetitions: int
    quiet_wait_s: float
    """How long a turn waits for others to leave the cores alone."""
    nice: int
    """Weight of this session while it measures; see `preferred_session`."""
    tries: int
    """How often a turn that others disturbed is taken in all; the least disturbed one counts."""

    def measure(
        self,
        running: Mapping[str, Running],
        measure: Callable[[Running, int], Sample],
        *,
        warm_up: Callable[[Running], object],
        limits: Mapping[str, Limit],
    ) -> list[Sample]:
        """Call `measure` with every engine and the number of the round.

        `limits` names what of the machine is measured right before and after each engine's turn: the mean of the two is
        `limit` in the sample, in GB/s or Gop/s.
        """
        samples: list[Sample] = []
        for repetition in range(self.repetitions):
            names = list(running) if repetition % 2 == 0 else list(reversed(running))
            for name in names:
                turns: list[Sample] = []
                while not turns or (turns[-1]["foreign_cores"] > DISTURBED_CORES and len(turns) < self.tries):
                    turns.append(self._turn(running[name], measure, warm_up, repetition, limits[name]))
                best = min(turns, key=lambda sample: sample["foreign_cores"])
                samples.append({"engine": name, "repetition": repetition, "tries": len(turns), **best})
                print(samples[-1], file=sys.stderr, flush=True)
        return samples

    def _turn(
        self,
        engine: Running,
        measure: Callable[[Running, int], Sample],
        warm_up: Callable[[Running], object],
        repetition: int,
        limit: Limit,
    ) -> Sample:
        wait_until_quiet(self.quiet_wait_s)
        with preferred_session(self.nice):
            before = self.probe.measure(limit)  # with the engine suspended: llama.cpp's threads spin for ever
            engine.resume()
            try:
                warm_up(engine)
                with OtherLoad() as load:
                    sample = measure(engine, repetition)
            finally:
                engine.suspend()
            after = self.probe.measure(limit)
        return sample | {
            "foreign_cores": load.foreign_cores,
            "stolen_cores": load.stolen_cores,
            "limit_before": before,
            "limit_after": after,
            "limit": (before + after) / 2,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    return {
        "median": _round(statistics.median(values)),
        "min": _round(min(values)),
        "max": _round(max(values)),
    }


def values_of(samples: Sequence[Sample], engine: str, key: str) -> list[float]:
    """A quantity of one engine, in the order of the repetitions."""
    return [
        sample[key]
        for sample in sorted(samples, key=lambda sample: sample["repetition"])
        if sample["engine"] == engine and sample.get(key) is not None
    ]


def ratio(samples: Sequence[Sample], over: str, under: str, key: str) -> dict[str, float]:
    """`over` / `under`, repetition by repetition."""
    pairs = zip(values_of(samples, over, key), values_of(samples, under, key), strict=True)
    return spread([a / b for a, b in pairs])


def noise(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the machine did during the measurements that count."""
    if not samples:
        return {}
    return {
        "cores used by others": spread([sample["foreign_cores"] for sample in samples]),
        "cores used by the host": spread([sample["stolen_cores"] for sample in samples]),
        "measured again": sum(sample["tries"] - 1 for sample in samples),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")
