"""Queues with a known mean wait (M/M/1, M/D/1, M/M/4), simulated: how far the event heap is from theory.

The servers are the live scheduler and router on the event heap; the queues are those of tests/simulator/queues.py.
Little's law is asserted in each run. All seconds are virtual.

    python bench/queueing.py                       a million arrivals each, about 8 minutes of one core
    python bench/queueing.py --arrivals 100000     under a minute
"""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from results import write_result

TESTS = Path(__file__).parent.parent / "tests" / "simulator"
WITHIN = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrivals", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    queues: Any = import_module("queues")
    samples: list[dict[str, Any]] = []
    for name, (service, servers, rate_per_s, expected_s, _) in queues.QUEUES.items():
        for seed in range(3, 3 + options.seeds):
            began_s = time.process_time()
            found_s = queues.mean_wait_s(service(seed), servers, rate_per_s, options.arrivals, seed=seed)
            samples.append(
                {
                    "queue": name,
                    "seed": seed,
                    "load_fraction": rate_per_s / servers,
                    "expected_wait_s": round(expected_s, 6),
                    "mean_wait_s": round(found_s, 6),
                    "relative_error": round(found_s / expected_s - 1, 6),
                    "cpu_s": round(time.process_time() - began_s, 1),
                }
            )
            print(samples[-1], flush=True)
    worst = max(abs(sample["relative_error"]) for sample in samples)
    summary = {"worst_relative_error": worst, "within_one_in_a_hundred": worst <= WITHIN}
    write_result("queueing", settings=vars(options), samples=samples, summary=summary)


if __name__ == "__main__":
    main()
