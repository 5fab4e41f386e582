"""`plait bench serve` against plait: the two ends count the same tokens."""

from typing import Any

import httpx
import pytest

from plait.bench import ServeBenchmarkOptions, run_serve_benchmark


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_every_request_runs_to_its_length_with_a_prompt_of_its_length(
    origin: str, http: httpx.Client, endpoint: Any
) -> None:
    before = http.get("/status").json()
    result = run_serve_benchmark(
        ServeBenchmarkOptions(
            base_url=origin,
            endpoint=endpoint,
            dataset="random",
            random_input_len=60,
            random_output_len=8,
            num_prompts=6,
            request_rate=50.0,
            ignore_eos=True,
        )
    )
    after = http.get("/status").json()
    assert (result.model, result.completed, result.failed) == ("tiny", 6, 0)
    assert all(outcome.usage for outcome in result.outcomes)
    assert result.total_output_tokens == 6 * 8
    # A word of the prose is at most ten tokens of this vocabulary.
    assert all(50 < outcome.prompt_tokens <= 60 for outcome in result.outcomes)
    trial_tokens = after["generated_tokens_total"] - before["generated_tokens_total"] - 6 * 8
    assert 0 < trial_tokens <= 4


def test_lengths_are_drawn_to_fit_the_models_context(origin: str) -> None:
    result = run_serve_benchmark(ServeBenchmarkOptions(base_url=origin, dataset="long-tail", num_prompts=3))
    assert (result.completed, result.failed) == (3, 0)
