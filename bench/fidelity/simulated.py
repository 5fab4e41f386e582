"""The same runs on the event heap: measured tables, and what surrounds a step, fitted on runs that judge nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from fidelity.live import LiveRun, RequestTimes
from plait.cluster import peer_id_of_name
from plait.costs import (
    HostOverhead,
    LiveFactors,
    Profile,
    StepParts,
    StepWork,
    apply_factors,
    non_negative_least_squares,
)
from plait.engine import EngineOptions
from plait.ids import RequestId
from plait.scheduling import policy_named
from plait.simulator import (
    ClusterRun,
    DecisionLog,
    LinkSpec,
    MachineSpec,
    NetworkSpec,
    RunOptions,
    work_of,
)
from plait.workload import TraceRequest

_FOREVER_S = 1e9
_PRIOR_FRACTION = 0.01
"""What it is worth that a factor is 1, beside all of the calibration's seconds: the parts of a step vary together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What calibration runs say: `profile` with their factors and their host's part, and a message's way to or from a
    client. `factors` are those of this fit alone."""

    profile: Profile
    factors: LiveFactors
    one_way_s: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What a simulated run left, as a live one does."""

    requests: tuple[RequestTimes, ...]
    steps: int
    preemptions: int
    extrapolated_steps: int


def calibrate(profile: Profile, runs: Sequence[LiveRun]) -> Calibration:
    """Fit three factors of the tables to the seconds of the kernels, and the host's part to what the tables then leave
    of the seconds from step to step, of steps in which the engine was not held up.

    A step counts as much as it takes long: so short ones and prompts have a say, and sums come out right.
    """
    tables = profile.table_costs(extrapolates=True)
    works: list[StepWork] = []
    device_s: list[float] = []
    seconds: list[float] = []
    for run in runs:
        for step, times in zip(run.steps, run.step_times, strict=True):
            if times.seconds is not None and not times.interrupted:
                works.append(work_of(step.decision))
                device_s.append(times.device_s)
                seconds.append(times.seconds)
    factors = _fit_factors([tables.parts_s(work) for work in works], device_s)
    fitted = replace(profile, tables=apply_factors(profile.tables, factors))
    costs = fitted.table_costs(extrapolates=True)
    host = _fit_host(works, seconds, [costs.step_s(work) for work in works])
    return Calibration(
        profile=replace(fitted, host=host), factors=factors, one_way_s=_one_way_s(runs), steps=len(works)
    )


def _fit_factors(parts: Sequence[StepParts], device_s: Sequence[float]) -> LiveFactors:
    rows = np.array([(each.dense_s, each.prefill_s, each.decode_s) for each in parts])
    known = rows.sum(axis=1)
    weights = (
        known**-0.5
    )  # by what is predicted: weights by what was measured would prefer whatever came out short
    prior = np.eye(3) * (_PRIOR_FRACTION * known.sum()) ** 0.5
    matrix = np.concatenate([rows * weights[:, None], prior])
    target = np.concatenate([np.array(device_s) * weights, prior.sum(axis=1)])
    dense, prefill, decode = non_negative_least_squares(matrix, target).tolist()
    return LiveFactors(dense=dense, prefill=prefill, decode=decode)


def _fit_host(
    works: Sequence[StepWork], seconds: Sequence[float], predicted_s: Sequence[float]
) -> HostOverhead:
    rows = np.array([(1.0, work.features.sequences, work.features.tokens, work.sampled) for work in works])
    known = np.array(predicted_s)
    weights = known**-0.5
    matrix = rows * weights[:, None]
    scale = matrix.max(axis=0)
    rest = (np.array(seconds) - known) * weights
    per_step_s, per_sequence_s, per_token_s, per_sample_s = (
        non_negative_least_squares(matrix / scale, rest) / scale
    ).tolist()
    return HostOverhead(
        per_step_s=per_step_s,
        per_sequence_s=per_sequence_s,
        per_token_s=per_token_s,
        per_sample_s=per_sample_s,
    )


def _one_way_s(runs: Sequence[LiveRun]) -> float:
    ways: list[float] = []
    for run in runs:
        first_out_s: dict[RequestId, float] = {}
        for step, times in zip(run.steps, run.step_times, strict=True):
            for id, _, _, samples in step.decision.chunks:
                if samples and id not in first_out_s:
                    first_out_s[id] = times.ended_s
        idle_until_s = -np.inf
        for each, times in zip(run.record, run.requests, strict=True):
            begin_s = times.arrival_s
            out_s = begin_s + times.first_s - first_out_s[each.id]
            if begin_s > idle_until_s:  # the engine waited for it, and not it for the engine
                ways.append((times.added_s + out_s) / 2)
            idle_until_s = max(idle_until_s, begin_s + times.end_s)
    return median(ways)


def machine_like(options: EngineOptions, kv_blocks: int, profile: Profile) -> MachineSpec:
    """A simulated machine that is as an engine with these options is."""
    return MachineSpec(
        name="engine",
        peer=peer_id_of_name("engine"),
        blocks=range(profile.model.model_blocks),
        costs=profile.table_costs(extrapolates=True),
        policy=policy_named(options.policy),
        limits=options.limits,
        kv_blocks=kv_blocks,
        block_tokens=options.block_tokens,
    )


def simulate(machine: MachineSpec, trace: Sequence[TraceRequest], one_way_s: float) -> SimulatedRun:
    """Run a trace on one machine behind a gateway, as `plait simulate` does."""
    way = LinkSpec(one_way_s=one_way_s, bandwidth_bytes_per_s=1e12)
    log = DecisionLog()
    run = ClusterRun(
        [machine],
        NetworkSpec(within=way, between=way),
        model_blocks=len(machine.blocks),
        options=RunOptions(check="end", patience_s=_FOREVER_S),
        requests=trace,
        timeline=log,
    )
    before = machine.costs.extrapolated_steps
    run.run()
    outcomes = run.outcomes
    finished = outcomes.ended("finished")
    assert len(finished) == len(trace), f"{len(trace) - len(finished)} simulated requests did not finish"
    by_number = {outcomes.number[row]: row for row in finished}
    requests = tuple(
        RequestTimes(
            outcomes.first_s[row],
            outcomes.end_s[row],
            outcomes.output_tokens[row],
            outcomes.prompt_tokens[row],
            outcomes.arrival_s[row],
        )
        for _, row in sorted(by_number.items())
    )
    totals = next(iter(run.workers.values())).totals
    return SimulatedRun(
        requests=requests,
        steps=totals.steps,
        preemptions=totals.preemptions,
        extrapolated_steps=machine.costs.extrapolated_steps - before,
    )
