"""What scheduling costs per step: `schedule` and `complete`, without a model.

Every sequence decodes; each step is timed, those that publish a full block or allocate one included. The
target is below 1 ms at 256 running requests. CPU time of the thread is what counts, since a busy neighbour on the
machine is not the scheduler's cost; wall time is recorded beside it. `groups` are 4 samples of one prompt each.

    python bench/scheduler_cost.py              under a minute on one core
"""

import argparse
import statistics
import time

from results import Figure, write_result

from plait.ids import RequestId
from plait.kvcache import KvBlockPool
from plait.scheduling import POLICY_NAMES, NewRequest, Scheduler, StepLimits, policy_named

BLOCK_TOKENS = 16
GROUP = 4


def step_costs(
    policy: str, sequences: int, fan_out: int, prompt_tokens: int, steps: int
) -> dict[str, list[float]]:
    """Microseconds of each decode step of so many sequences; their last blocks fill up at different steps."""
    longest = prompt_tokens + BLOCK_TOKENS + steps + 8
    pool = KvBlockPool(sequences * -(-longest // BLOCK_TOKENS), BLOCK_TOKENS)
    limits = StepLimits(
        step_tokens=sequences * (prompt_tokens + BLOCK_TOKENS),
        max_running_sequences=sequences,
        max_waiting=sequences,
    )
    scheduler = Scheduler(policy_named(policy), pool, None, limits)
    requests = [RequestId(f"r{number}") for number in range(sequences // fan_out)]
    for number, request_id in enumerate(requests):
        prompt = [(number * 31 + place) % 5000 for place in range(prompt_tokens + number % BLOCK_TOKENS)]
        scheduler.submit(
            NewRequest(id=request_id, token_ids=prompt, max_sequence_tokens=longest, fan_out=fan_out)
        )
    wall_us: list[float] = []
    cpu_us: list[float] = []
    for number in range(steps):
        wall_start, cpu_start = time.perf_counter(), time.thread_time()
        step = scheduler.schedule()
        scheduler.complete(step)
        cpu_s, wall_s = time.thread_time() - cpu_start, time.perf_counter() - wall_start
        if len(step.chunks) == sequences and step.tokens == sequences:
            wall_us.append(round(wall_s * 1e6, 1))
            cpu_us.append(round(cpu_s * 1e6, 1))
        elif fan_out > 1:
            for request_id in requests:
                scheduler.fork(request_id, (0,) * fan_out)
        for request_id in requests:
            for sequence in range(fan_out):
                scheduler.append(request_id, sequence, number)
    scheduler.check()
    return {"wall_us": wall_us, "cpu_us": cpu_us}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 16, 64, 256, 512])
    options = parser.parse_args()
    cases = [(policy, 1) for policy in POLICY_NAMES] + [("paged", GROUP)]
    samples: dict[str, dict[int, dict[str, list[float]]]] = {}
    summary: dict[str, dict[str, float]] = {}
    figure = Figure("schedule + complete, all decoding", "running sequences", "median CPU time per step (us)")
    figure.log_x = figure.log_y = True
    for policy, fan_out in cases:
        name = policy if fan_out == 1 else f"{policy}, groups of {fan_out}"
        samples[name] = {
            sequences: step_costs(policy, sequences, fan_out, options.prompt_tokens, options.steps)
            for sequences in options.sequences
        }
        medians = [statistics.median(costs["cpu_us"]) for costs in samples[name].values()]
        figure.add_line(name, options.sequences, medians)
        for sequences, costs in samples[name].items():
            summary[f"{name}: {sequences} sequences"] = {
                "median_cpu_us": round(statistics.median(costs["cpu_us"]), 1),
                "p99_cpu_us": round(statistics.quantiles(costs["cpu_us"], n=100)[98], 1),
                "median_wall_us": round(statistics.median(costs["wall_us"]), 1),
            }
    write_result("scheduler_cost", settings=vars(options), samples=samples, summary=summary, figures=[figure])


if __name__ == "__main__":
    main()
