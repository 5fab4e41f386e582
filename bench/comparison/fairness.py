"""Who waits for whom: clients that ask different things, and how evenly they are served.

Every request belongs to one of eight clients: four ask the shorter half of all requests, four the longer; within each
half a few ask most (Zipf). What a client gets is the mean speed of its requests: the time that each would take alone on
the fastest machine, over the time that it took. Jain's index of these speeds (Jain, Chiu and Hawe 1984) is 1 where all
clients are slowed down alike, and 1/8 where one gets everything.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from plait.costs import CostModel, StepWork
from plait.workload import zipf_weights

CLIENTS = 8


def clients_of(total_tokens: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The client of each request, by its length."""
    rng = np.random.default_rng([seed, 8])
    half = CLIENTS // 2
    asks_long = total_tokens > np.median(total_tokens)
    return rng.choice(half, size=len(total_tokens), p=zipf_weights(half, 1.0)) + half * asks_long


def alone_s(costs: CostModel, prompt_tokens: int, output_tokens: int, step_tokens: int) -> float:
    """What a request takes on an idle machine: its prompt in chunks, then a token a step at its mean context."""
    total_s, start = 0.0, 0
    while start < prompt_tokens:
        tokens = min(step_tokens, prompt_tokens - start)
        work = StepWork.of([(tokens, start)], sampled=1)
        total_s += costs.step_s(work) + costs.host_s(work)
        start += tokens
    work = StepWork.of([(1, prompt_tokens + output_tokens // 2)], sampled=1)
    return total_s + (output_tokens - 1) * (costs.step_s(work) + costs.host_s(work))


def jain_index(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2)."""
    values = np.asarray(shares)
    return float(values.sum() ** 2 / (len(values) * (values**2).sum()))
