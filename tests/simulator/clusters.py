"""Clusters for tests: machines whose steps follow a line, and whatever else a run needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plait.cluster import peer_id_of_name
from plait.costs import StepWork
from plait.routing import RouteWish
from plait.scheduling import SchedulingPolicy, StepLimits, policy_named
from plait.simulator import (
    ClusterRun,
    LinkSpec,
    MachineSpec,
    NetworkSpec,
    RunFault,
    RunOptions,
    Timeline,
)
from plait.workload import TraceRequest, poisson_arrivals_s

MODEL_BLOCKS = 8


@dataclass
class LinearCosts:
    """A step takes a fixed time and some for each token."""

    per_step_s: float = 0.01
    per_token_s: float = 0.0001
    per_context_token_s: float = 0.0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 1
    hidden_bytes_per_token: int = 8192
    idle_watts: float = 0.0
    extrapolated_steps: int = 0

    def step_s(self, work: StepWork) -> float:
        return self.per_step_s + self.per_token_s * work.features.tokens + self.attention_s(work)

    def attention_s(self, work: StepWork) -> float:
        return self.per_context_token_s * work.features.context_tokens

    def host_s(self, work: StepWork) -> float:
        return 0.0

    def ideal(self, work: StepWork) -> None:
        return None

    def energy_j(self, work: StepWork) -> float:
        return 1.0


NEAR = LinkSpec(one_way_s=1e-4, bandwidth_bytes_per_s=1e9)
FAR = LinkSpec(one_way_s=0.02, bandwidth_bytes_per_s=1e7)
NETWORK = NetworkSpec(within=NEAR, between=FAR)


def machine(
    name: str,
    blocks: range = range(MODEL_BLOCKS),
    *,
    costs: LinearCosts | None = None,
    policy: str | SchedulingPolicy = "paged",
    limits: StepLimits | None = None,
    kv_blocks: int = 400,
    site: str = "",
) -> MachineSpec:
    return MachineSpec(
        name=name,
        peer=peer_id_of_name(name),
        blocks=blocks,
        costs=costs or LinearCosts(),
        policy=policy_named(policy) if isinstance(policy, str) else policy,
        limits=limits or StepLimits(step_tokens=256),
        kv_blocks=kv_blocks,
        site=site,
    )


def replicas(count: int, **changes: object) -> list[MachineSpec]:
    return [machine(f"replica-{number}", **changes) for number in range(count)]  # pyright: ignore[reportArgumentType]


def swarm(seed: int, kv_blocks: int = 200) -> list[MachineSpec]:
    """Two machines for each quarter of the model, two for its halves, in a third of the seeds one for all of it; they
    are unequal and at two sites."""
    rng = np.random.default_rng(seed)
    spans = [range(start, start + 2) for start in (0, 2, 4, 6)] * 2 + [range(4), range(4, 8), range(8)][
        : 3 if seed % 3 == 0 else 2
    ]
    return [
        machine(
            f"m{number}",
            blocks,
            costs=LinearCosts(per_step_s=0.01 * len(blocks) / 8 * float(rng.uniform(0.5, 3))),
            kv_blocks=kv_blocks,
            site="ab"[number % 2],
        )
        for number, blocks in enumerate(spans)
    ]


def trace(
    seed: int, count: int, rate_per_s: float, *, prompt: int = 400, output: int = 30
) -> list[TraceRequest]:
    rng = np.random.default_rng(seed)
    arrivals_s = poisson_arrivals_s(count, rate_per_s, rng)
    return [
        TraceRequest(arrival_s=float(arrival_s), prompt_tokens=int(prompt), output_tokens=int(output))
        for arrival_s, prompt, output in zip(
            arrivals_s, rng.integers(1, prompt, count), rng.integers(1, output, count), strict=True
        )
    ]


def run_of(
    machines: Sequence[MachineSpec],
    requests: Sequence[TraceRequest],
    *,
    seed: int = 0,
    wish: RouteWish | None = None,
    faults: Sequence[RunFault] = (),
    timeline: Timeline | None = None,
    network: NetworkSpec = NETWORK,
    **options: object,
) -> ClusterRun:
    checks = {"check": "event", **options}
    chosen = RunOptions(seed=seed, wish=wish or RouteWish(), **checks)  # pyright: ignore[reportArgumentType]
    return ClusterRun(
        machines,
        network,
        model_blocks=MODEL_BLOCKS,
        options=chosen,
        requests=requests,
        faults=faults,
        timeline=timeline,
    )
