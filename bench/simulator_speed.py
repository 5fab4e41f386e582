"""How fast the event heap simulates: many requests on a few replicas, and many sessions on many machines.

    replicas   100,000 requests of 10 output tokens on 8 replicas; the goal is a minute on one core
    swarm      10,000 sessions in flight at once over chains of 1,000 machines; the goal is five minutes

The schedulers, the pools and the router are the live ones, so their cost is most of it. CPU time of the process is what
counts, since a busy neighbour on the machine is not the simulator's cost; wall time is recorded beside it.

    python bench/simulator_speed.py             about six minutes of one core
"""

import argparse
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from results import write_result

from plait.cluster import peer_id_of_name
from plait.costs import Formats, RooflineCosts, SpanShape, device_named
from plait.model import published_spec
from plait.scheduling import StepLimits, policy_named
from plait.simulator import ClusterRun, LinkSpec, MachineSpec, NetworkSpec, RunOptions, stream
from plait.workload import TraceRequest, length_mix_named, poisson_arrivals_s

LIMITS = StepLimits(max_waiting=10**6)
NEAR = LinkSpec(one_way_s=0.0005, bandwidth_bytes_per_s=1.25e9)
FAR = LinkSpec(one_way_s=0.01, bandwidth_bytes_per_s=1.25e8)
GOALS_S = {"replicas": 60.0, "swarm": 300.0}


def replicas(requests: int, seed: int) -> ClusterRun:
    """Llama 3 8B on eight A100s, at about two thirds of what they can do."""
    spec = published_spec("llama-3-8b")
    costs = RooflineCosts(shape=SpanShape(spec, spec.all_blocks, Formats()), device=device_named("a100-40gb"))
    machines = [
        MachineSpec(
            name=f"replica-{number}",
            peer=peer_id_of_name(f"replica-{number}"),
            blocks=spec.all_blocks,
            costs=costs,
            policy=policy_named("paged"),
            limits=LIMITS,
            kv_blocks=8000,
        )
        for number in range(8)
    ]
    prompts, _ = length_mix_named("sharegpt-like").draw(requests, stream(seed, "lengths"))
    arrivals_s = poisson_arrivals_s(requests, 350.0, stream(seed, "arrivals"))
    trace = [
        TraceRequest(arrival_s=at_s, prompt_tokens=prompt, output_tokens=10)
        for at_s, prompt in zip(arrivals_s.tolist(), prompts.tolist(), strict=True)
    ]
    network = NetworkSpec(within=NEAR, between=FAR)
    return ClusterRun(
        machines,
        network,
        model_blocks=len(spec.blocks),
        options=RunOptions(seed=seed, check="end"),
        requests=trace,
    )


def swarm(machine_count: int, sessions: int, output_tokens: int, seed: int) -> ClusterRun:
    """Llama 3 70B in spans of 10 to 26 blocks on machines of four kinds at fifty sites; everybody asks at once."""
    spec = published_spec("llama-3-70b")
    blocks = len(spec.blocks)
    rng = stream(seed, "machines")
    devices = [device_named(name) for name in ("a100-40gb", "rtx4090", "rtx3090", "l4")]
    machines: list[MachineSpec] = []
    covered = 0
    for number in range(machine_count):
        length = int(rng.integers(10, 27))
        start = covered if covered < blocks else int(rng.integers(0, blocks - length + 1))
        span = range(start, min(start + length, blocks))
        covered = max(covered, span.stop)
        device = devices[int(rng.integers(len(devices)))]
        formats = Formats(weights="int4", kv="bf16")
        machines.append(
            MachineSpec(
                name=f"machine-{number}",
                peer=peer_id_of_name(f"machine-{number}"),
                blocks=span,
                costs=RooflineCosts(shape=SpanShape(spec, span, formats), device=device),
                policy=policy_named("paged"),
                limits=LIMITS,
                kv_blocks=4000,
                site=f"site-{number % 50}",
            )
        )
    prompts = stream(seed, "lengths").integers(16, 129, sessions).tolist()
    trace = [
        TraceRequest(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output_tokens) for prompt in prompts
    ]
    return ClusterRun(
        machines,
        NetworkSpec(within=NEAR, between=FAR),
        model_blocks=blocks,
        options=RunOptions(seed=seed, check="end"),
        requests=trace,
    )


def measured(name: str, run: ClusterRun) -> dict[str, Any]:
    """Run it, and say what that took."""
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    run.run()
    cpu_s, wall_s = time.process_time() - cpu_start, time.perf_counter() - wall_start
    tokens = sum(run.outcomes.output_tokens)
    steps = sum(worker.totals.steps for worker in run.workers.values())
    batch = sum(worker.totals.step_sequences for worker in run.workers.values()) / steps
    found = {
        "case": name,
        "cpu_s": round(cpu_s, 1),
        "wall_s": round(wall_s, 1),
        "goal_s": GOALS_S[name],
        "requests": len(run.outcomes),
        "finished": len(run.outcomes.ended("finished")),
        "output_tokens": tokens,
        "events": run.heap.events,
        "steps": steps,
        "mean_batch": round(batch, 2),
        "events_per_cpu_s": round(run.heap.events / cpu_s),
        "output_tokens_per_cpu_s": round(tokens / cpu_s),
        "peak_in_flight": run.peak_in_flight,
        "virtual_s": round(run.heap.now_s, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "mean_e2e_s": round(float(np.mean(run.outcomes.end_s)), 3),
        "digest": run.heap.digest(),
    }
    print(found, flush=True)
    return found


def summarised(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        sample["case"]: {
            key: sample[key]
            for key in ("cpu_s", "wall_s", "goal_s", "requests", "events", "peak_in_flight", "output_tokens")
        }
        | {"within_goal": sample["cpu_s"] <= sample["goal_s"]}
        for sample in samples
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--output-tokens", type=int, default=16, help="of each session of the swarm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    samples = [
        measured("replicas", replicas(options.requests, options.seed)),
        measured("swarm", swarm(options.machines, options.sessions, options.output_tokens, options.seed)),
    ]
    write_result("simulator_speed", settings=vars(options), samples=samples, summary=summarised(samples))


if __name__ == "__main__":
    main()
