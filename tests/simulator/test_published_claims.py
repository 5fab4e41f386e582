"""Signs of published claims about batching and memory, on one trace at their papers' scale (bench/comparison.py)."""

from pathlib import Path

import pytest

from plait.simulator import latency_samples, parse_scenario, run_of_scenario

SCENARIO = """
model: opt-13b
machines:
  - {{name: server, device: a100-40gb, host_s: 0.002, scheduling: {scheduling}}}
workload: {{requests: 80, lengths: {lengths}, rate_per_s: {rate}, asks: {asks}}}
run: {{check: end, patience_s: 1.0e+9}}
"""


def served(
    scheduling: str, asks: str, lengths: str = "sharegpt-like", rate: float = 1.5
) -> tuple[float, float, float]:
    """Mean normalised latency, mean batch, and the useful fraction of the memory held."""
    text = SCENARIO.format(scheduling=scheduling, asks=asks, lengths=lengths, rate=rate)
    run = run_of_scenario(parse_scenario(text, "claims"), Path("."))
    run.run()
    totals = next(iter(run.workers.values())).totals
    return (
        float(latency_samples(run.outcomes)["normalised"].mean()),
        totals.step_sequences / totals.steps,
        totals.useful_kv_fraction_sum / totals.usage_samples,
    )


@pytest.fixture(scope="module")
def conversations() -> dict[str, tuple[float, float, float]]:
    return {
        "static": served("static", "answer"),
        "orca, oracle": served("orca", "answer"),
        "orca, max": served("orca", "context"),
        "paged": served("paged", "answer"),
    }


def test_iterations_beat_batches_of_requests(conversations: dict[str, tuple[float, float, float]]) -> None:
    """Yu et al. 2022, section 6: on the same trace ORCA's latency is a fraction of request-level batching's."""
    assert conversations["orca, oracle"][0] < 0.5 * conversations["static"][0]


def test_of_a_reservation_of_the_maximum_little_is_useful(
    conversations: dict[str, tuple[float, float, float]],
) -> None:
    """Kwon et al. 2023, section 1: 20 to 38 % of the memory held useful tokens; with pages 96 %."""
    assert 0.15 < conversations["orca, max"][2] < 0.4
    assert conversations["paged"][2] > 0.95
    assert conversations["orca, max"][2] < conversations["orca, oracle"][2] < conversations["paged"][2]


def test_pages_make_batches_larger_and_latency_lower(
    conversations: dict[str, tuple[float, float, float]],
) -> None:
    """Kwon et al. 2023, section 6.2: paged before ORCA with oracle before ORCA with the maximum."""
    latency = {policy: found[0] for policy, found in conversations.items()}
    assert latency["paged"] < latency["orca, oracle"] < latency["orca, max"]
    assert conversations["paged"][1] > 1.5 * conversations["orca, max"][1]


def test_where_all_lengths_are_equal_batches_of_requests_lose_less() -> None:
    """Yu et al. 2022, section 6: the gap comes from unequal lengths."""
    unequal = served("static", "answer", "uniform", 4.0)[0] / served("orca", "answer", "uniform", 4.0)[0]
    equal = served("static", "answer", "equal", 4.0)[0] / served("orca", "answer", "equal", 4.0)[0]
    assert unequal > equal
