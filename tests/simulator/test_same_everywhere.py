"""One seed is one run: in every process, whatever numpy may use, and on every machine (the digest below is theirs).

Time is a whole number of nanoseconds. Floating point enters where a cost model says seconds, a link divides bytes by
bandwidth, and the router compares expected seconds; the first two are rounded to nanoseconds at once, and sums and
products of float64 are the same on every machine. Exponentials and logarithms may differ in their last bit: they decide
which arrival times are drawn and by how much the router prefers one chain to another, so this run takes its times from
whole numbers, and a last bit would have to tip the router's scales.
"""

import os
import subprocess
import sys
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from clusters import LinearCosts, machine, run_of, swarm

from plait.simulator import ClusterRun, RunFault
from plait.workload import TraceRequest

GOLDEN = "5f11ad83ea06b0e59ee8580468f61335"
"""Of `golden_run`. It changes when a decision of scheduler, pool or router does, or what an event is called; say so in
the commit that changes it."""


def golden_run(seed: int = 7) -> ClusterRun:
    """Unequal machines at two sites, some of which crash, pause and lose links, and 40 requests."""
    rng = np.random.default_rng(seed)
    arrivals_ms = np.sort(rng.integers(0, 8_000, 40)).tolist()
    lengths = rng.integers(1, 300, 40).tolist(), rng.integers(1, 30, 40).tolist()
    requests = [
        TraceRequest(arrival_s=at_ms / 1000, prompt_tokens=prompt, output_tokens=output)
        for at_ms, prompt, output in zip(arrivals_ms, *lengths, strict=True)
    ]
    faults = [
        RunFault(kind="crash", at_s=2.0, duration_s=3.0, machines=("m1",)),
        RunFault(kind="pause", at_s=3.5, duration_s=4.0, machines=("m4",)),
        RunFault(kind="cut", at_s=5.0, duration_s=6.0, machines=("m2",)),
        RunFault(kind="slow_link", at_s=6.0, duration_s=2.0, machines=("m3",), strength=0.25),
    ]
    machines = [*swarm(3, kv_blocks=60), machine("whole", costs=LinearCosts(0.03125, 0.0001220703125))]
    return run_of(machines, requests, seed=seed, faults=faults)


def digest_of(run: ClusterRun) -> str:
    run.run()
    assert sum(run.outcomes.retries) > 0
    return run.heap.digest()


def test_a_run_is_what_it_was_on_the_machine_that_wrote_this() -> None:
    assert digest_of(golden_run()) == GOLDEN


def test_another_seed_is_another_run() -> None:
    assert digest_of(golden_run(8)) != GOLDEN


def dispatched_features() -> str:
    """What numpy would use of this processor and can do without, as another machine has to."""
    umath: Any = import_module("numpy._core._multiarray_umath")
    names: list[str] = umath.__cpu_dispatch__
    return " ".join(name for name in names if umath.__cpu_features__[name])


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        {
            "PYTHONHASHSEED": "4711",
            "OPENBLAS_NUM_THREADS": "3",
            "NPY_DISABLE_CPU_FEATURES": dispatched_features(),
        },
    ],
    ids=["one thread", "another processor"],
)
def test_a_run_is_the_same_in_a_fresh_interpreter(environment: dict[str, str]) -> None:
    program = "from test_same_everywhere import digest_of, golden_run; print(digest_of(golden_run()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert done.stdout.strip() == GOLDEN
