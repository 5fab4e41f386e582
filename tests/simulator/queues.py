"""Queues whose waiting times are known exactly, through the live scheduler and the event heap.

Requests of one token on a machine that runs one sequence at a time make a queue with one server, whose service times
are the cost model's; four machines that get one request each, the rest waiting at the gateway, make one with four.
"""

from collections.abc import Callable, Iterator

import numpy as np
from clusters import MODEL_BLOCKS, LinearCosts, machine

from plait.costs import StepWork
from plait.scheduling import StepLimits
from plait.simulator import ClusterRun, LinkSpec, NetworkSpec, RunOptions, stream
from plait.workload import TraceRequest

NO_WAY = LinkSpec(one_way_s=0.0, bandwidth_bytes_per_s=1e18)


class DrawnCosts(LinearCosts):
    """Every step takes a time of its own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def step_s(self, work: StepWork) -> float:
        if work.features.context_tokens:
            return 1.0  # asked for the announcement only
        return self.draw()


def exponential(seed: int) -> Callable[[], float]:
    rng = stream(seed, "service")
    drawn: list[float] = []

    def draw() -> float:
        if not drawn:
            drawn.extend(rng.exponential(1.0, 4096).tolist())
        return drawn.pop()

    return draw


def arrivals(count: int, rate_per_s: float, seed: int) -> Iterator[TraceRequest]:
    rng = stream(seed, "arrivals")
    at_s = 0.0
    for start in range(0, count, 4096):
        for gap_s in rng.exponential(1 / rate_per_s, min(4096, count - start)).tolist():
            at_s += gap_s
            yield TraceRequest(arrival_s=at_s, prompt_tokens=1, output_tokens=1)


def mean_wait_s(draw: Callable[[], float], servers: int, rate_per_s: float, count: int, seed: int) -> float:
    limits = StepLimits(step_tokens=1, max_waiting=10**9)
    costs = DrawnCosts(draw)
    machines = [machine(f"server-{number}", costs=costs, limits=limits) for number in range(servers)]
    options = RunOptions(
        seed=seed,
        sessions_per_machine=1 if servers > 1 else None,
        patience_s=1e9,
        announce_s=1e5,
        check="end",
    )
    run = ClusterRun(
        machines,
        NetworkSpec(within=NO_WAY, between=NO_WAY),
        model_blocks=MODEL_BLOCKS,
        options=options,
        requests=arrivals(count, rate_per_s, seed),
    )
    run.run()
    served_s = sum(worker.totals.busy_ns for worker in run.workers.values()) / 1e9
    time_s = sum(run.outcomes.end_s)
    # Little's law: the mean in flight is the arrival rate times the mean time.
    rate = len(run.outcomes) / run.heap.now_s
    in_flight = run.in_flight_ns / run.heap.now_ns
    assert abs(in_flight - rate * time_s / count) <= 1e-9 * in_flight
    return (time_s - served_s) / count


def erlang_wait_s(servers: int, load: float) -> float:
    """Mean wait of M/M/c with mean service 1 (Erlang C)."""
    terms = [load**k / float(np.prod(range(1, k + 1), dtype=float)) for k in range(servers + 1)]
    last = terms[-1] * servers / (servers - load)
    return last / (sum(terms[:-1]) + last) / (servers - load)


Queue = tuple[Callable[[int], Callable[[], float]], int, float, float, float]
QUEUES: dict[str, Queue] = {
    # Service, servers, arrivals a second, mean wait, and about two standard errors of it (relative) at 3,000 arrivals.
    "M/M/1": (exponential, 1, 0.5, 1.0, 0.15),
    "M/D/1": (lambda seed: lambda: 1.0, 1, 0.5, 0.5, 0.08),
    "M/M/4": (exponential, 4, 2.8, erlang_wait_s(4, 2.8), 0.25),
}
