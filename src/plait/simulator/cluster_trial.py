"""One trial of the event heap: a small cluster, 200 requests and its faults, all drawn from a seed.

The books of each machine are walked after every event in which something happened to it; at the end nothing may be
held, and every request must be over. What is found is named with seed and event (`EventFailed`, `Deadlock`,
`Livelock`); the same seed finds it again at the same event. `shrink_trial` leaves out the faults and requests that it
does not take.

Clusters are replicas under any policy, or chains over unequal machines at one to three sites; their memories are so
small that requests are preempted, swapped and refused. Prompts begin alike. In two of three trials faults of all kinds
strike at random, in a third machines are swizzled, and in half rare branches are made frequent (buggify.py).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from plait.cluster import peer_id_of_name
from plait.costs import Formats, SpanShape
from plait.model import published_spec
from plait.scheduling import StepLimits, policy_named
from plait.simulator.cluster_run import ClusterRun, RunOptions
from plait.simulator.event_heap import EventFailed
from plait.simulator.faults_of_run import (
    DEFAULT_STRENGTH,
    FAULT_KINDS,
    FaultRate,
    RunFault,
    draw_faults,
    swizzled,
)
from plait.simulator.random_streams import stream
from plait.simulator.scenario import LinearPart
from plait.simulator.scenario_run import LinearCosts
from plait.simulator.shrinking import shrunk
from plait.simulator.simulated_network import LinkSpec, NetworkSpec
from plait.simulator.simulated_worker import MachineSpec
from plait.simulator.virtual_loop import Deadlock, Livelock
from plait.workload import PROMPT_BLOCK_TOKENS, TraceRequest, gamma_arrivals_s

REQUESTS = 200
_MODEL = "llama-3-8b"
_BLOCK_TOKENS = 8
_NEAR = LinkSpec(one_way_s=1e-4, bandwidth_bytes_per_s=1e9)
_LONG = 1.5  # as long as arrivals take, faults strike


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTrial:
    """All that a trial is made of."""

    seed: int
    machines: tuple[MachineSpec, ...]
    network: NetworkSpec
    requests: tuple[TraceRequest, ...]
    faults: tuple[RunFault, ...]
    options: RunOptions

    @property
    def model_blocks(self) -> int:
        """Blocks of the model."""
        return len(published_spec(_MODEL).blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTrialReport:
    """What became of a trial; it is right if there is no `violation`, which names event, time and what is wrong."""

    seed: int
    violation: str
    events: int
    digest: str
    virtual_s: float
    finished: int
    refused: int
    failed: int
    moves: int
    preemptions: int
    steps: int


def draw_cluster_trial(seed: int, requests: int = REQUESTS) -> ClusterTrial:
    """The trial of a seed; the same on every machine."""
    rng = stream(seed, "trial")
    rate_per_s = float(rng.choice([2.0, 5.0, 20.0]))
    machines = _draw_replicas(rng) if rng.random() < 0.4 else _draw_swarm(rng)
    drawn = _draw_requests(rng, requests, rate_per_s)
    far = LinkSpec(
        one_way_s=float(rng.choice([0.001, 0.02, 0.08])),
        bandwidth_bytes_per_s=float(rng.choice([1e6, 1e8])),
    )
    return ClusterTrial(
        seed=seed,
        machines=machines,
        network=NetworkSpec(within=_NEAR, between=far, gateway_site="site-0"),
        requests=drawn,
        faults=_draw_all_faults(rng, seed, machines, drawn[-1].arrival_s * _LONG),
        options=RunOptions(
            seed=seed,
            sessions_per_machine=int(rng.choice([2, 8])) if rng.random() < 0.3 else None,
            patience_s=float(rng.choice([5.0, 120.0])),
            announce_s=float(rng.choice([1.0, 5.0])),
            silence_s=float(rng.choice([0.5, 3.0])),
            buggify_fraction=float(rng.choice([0.0, 0.02, 0.2], p=[0.5, 0.3, 0.2])),
            check="event",
        ),
    )


def run_of_trial(trial: ClusterTrial) -> ClusterRun:
    """The run of a trial, which has not begun."""
    return ClusterRun(
        trial.machines,
        trial.network,
        model_blocks=trial.model_blocks,
        options=trial.options,
        requests=trial.requests,
        faults=trial.faults,
    )


def run_cluster_trial(trial: ClusterTrial) -> ClusterTrialReport:
    """Run a trial to its end, or to the event that breaks something."""
    run = run_of_trial(trial)
    found: list[str] = []
    with _noting(run, found):
        run.run()
    workers = run.workers.values()
    return ClusterTrialReport(
        seed=trial.seed,
        violation=found[0] if found else "",
        events=run.heap.events,
        digest=run.heap.digest(),
        virtual_s=run.heap.now_s,
        finished=len(run.outcomes.ended("finished")),
        refused=len(run.outcomes.ended("refused")),
        failed=len(run.outcomes.ended("failed")),
        moves=sum(run.outcomes.retries),
        preemptions=sum(worker.totals.preemptions for worker in workers),
        steps=sum(worker.totals.steps for worker in workers),
    )


def shrink_trial(trial: ClusterTrial) -> ClusterTrial:
    """The same with only those faults and requests that its violation takes; it may be found at another event then."""

    def shows(smaller: ClusterTrial) -> bool:
        return bool(smaller.requests) and bool(run_cluster_trial(smaller).violation)

    assert shows(trial), f"seed {trial.seed} shows nothing that could be shrunk"
    faults = shrunk(trial.faults, lambda fewer: shows(replace(trial, faults=fewer)))
    trial = replace(trial, faults=faults)
    requests = shrunk(trial.requests, lambda fewer: shows(replace(trial, requests=fewer)))
    return replace(trial, requests=requests)


@contextmanager
def _noting(run: ClusterRun, found: list[str]) -> Generator[None]:
    try:
        yield
    except EventFailed as error:
        found.append(str(error).partition("; run the same")[0])
    except (Deadlock, Livelock) as error:
        found.append(f"event {run.heap.events}: {type(error).__name__}: {error}")
    except Exception as error:
        found.append(f"event {run.heap.events}, {run.heap.now_s:.9f} s: {type(error).__name__}: {error}")


def _machine(
    rng: np.random.Generator, name: str, blocks: range, *, policy: str, slots: int, sites: int
) -> MachineSpec:
    """A machine whose steps and memory are drawn; `slots` requests of usual length fit it."""
    given = LinearPart(
        per_step_s=float(rng.choice([0.002, 0.01, 0.03])) * float(rng.uniform(0.5, 2)),
        per_token_s=float(rng.choice([0.0, 0.0001])),
    )
    swaps = rng.random() < 0.25
    return MachineSpec(
        name=name,
        peer=peer_id_of_name(name),
        blocks=blocks,
        costs=LinearCosts(given=given, shape=SpanShape(published_spec(_MODEL), blocks, Formats())),
        policy=policy_named(policy),
        limits=StepLimits(
            step_tokens=int(rng.choice([32, 128, 512])),
            max_running_sequences=int(rng.choice([4, 32])),
            max_waiting=int(rng.choice([4, 1000], p=[0.2, 0.8])),
            preemption="swap" if swaps else "recompute",
        ),
        kv_blocks=slots * 10 + 60,
        block_tokens=_BLOCK_TOKENS,
        host_kv_blocks=60 if swaps else 0,
        site=f"site-{int(rng.integers(sites))}",
    )


def _draw_replicas(rng: np.random.Generator) -> tuple[MachineSpec, ...]:
    blocks = range(len(published_spec(_MODEL).blocks))
    policy = str(rng.choice(["paged", "paged", "paged", "orca", "static"]))
    slots, sites = int(rng.choice([1, 4, 20])), int(rng.integers(1, 3))
    return tuple(
        _machine(rng, f"replica-{number}", blocks, policy=policy, slots=slots, sites=sites)
        for number in range(int(rng.integers(1, 5)))
    )


def _draw_swarm(rng: np.random.Generator) -> tuple[MachineSpec, ...]:
    """Two or three machines for each part of the model, and some that hold several parts."""
    blocks = len(published_spec(_MODEL).blocks)
    parts = int(rng.choice([2, 3, 4]))
    bounds = [blocks * part // parts for part in range(parts + 1)]
    slots, sites = int(rng.choice([2, 6, 30])), int(rng.integers(1, 4))
    spans = [range(bounds[part], bounds[part + 1]) for part in range(parts)] * int(rng.integers(2, 4))
    if rng.random() < 0.5:
        spans += [range(bounds[1]), range(bounds[1], blocks)]
    if rng.random() < 0.3:
        spans.append(range(blocks))
    return tuple(
        _machine(rng, f"machine-{number}", span, policy="paged", slots=slots, sites=sites)
        for number, span in enumerate(spans)
    )


def _draw_requests(rng: np.random.Generator, count: int, rate_per_s: float) -> tuple[TraceRequest, ...]:
    """Short answers to prompts of which a third begin with one of four instructions."""
    arrivals_s = gamma_arrivals_s(count, rate_per_s, float(rng.choice([1.0, 3.0])), rng)
    longest = int(rng.choice([40, 200]))
    requests: list[TraceRequest] = []
    for arrival_s in arrivals_s.tolist():
        prompt_tokens = int(rng.integers(1, longest))
        prompt_blocks: tuple[int, ...] = ()
        if rng.random() < 1 / 3:
            prompt_tokens = max(prompt_tokens, PROMPT_BLOCK_TOKENS // 4)
            prompt_blocks = (int(rng.integers(4)),)
        requests.append(
            TraceRequest(
                arrival_s=arrival_s,
                prompt_tokens=prompt_tokens,
                output_tokens=1 + int(rng.geometric(1 / 6)) % 40,
                prompt_blocks=prompt_blocks,
            )
        )
    return tuple(requests)


def _draw_all_faults(
    rng: np.random.Generator, seed: int, machines: tuple[MachineSpec, ...], until_s: float
) -> tuple[RunFault, ...]:
    names = [machine.name for machine in machines]
    rates = [
        FaultRate(
            kind=kind,
            per_hour=float(rng.choice([0.0, 3.0, 12.0], p=[0.4, 0.4, 0.2])) * 3600 / until_s,
            mean_s=float(rng.choice([0.2, 2.0, 8.0])),
            strength=DEFAULT_STRENGTH.get(kind, 0.0),
        )
        for kind in FAULT_KINDS
    ]
    faults: tuple[RunFault, ...] = ()
    if rng.random() < 2 / 3:
        faults += draw_faults(seed, rates, names, until_s)
    if rng.random() < 1 / 3:
        kind = FAULT_KINDS[int(rng.integers(len(FAULT_KINDS)))]
        if kind != "partition":
            order: list[int] = rng.permutation(len(names)).tolist()
            some = [names[place] for place in order[: int(rng.integers(2, 8))]]
            at_s, apart_s = float(rng.uniform(0, until_s / 2)), float(rng.choice([0.05, 0.5, 2.0]))
            strength = DEFAULT_STRENGTH.get(kind, 0.0)
            faults += tuple(
                replace(each, strength=strength) for each in swizzled(kind, some, at_s, apart_s, rng)
            )
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
