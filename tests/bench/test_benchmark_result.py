import json
from dataclasses import replace

import pytest

from plait.bench import RequestOutcome, ServeBenchmarkOptions, ServeBenchmarkResult, format_result

FAST = RequestOutcome(
    start_s=0.0, queue_s=0.0, prompt_tokens=100, output_tokens=5, ttft_s=0.1, latency_s=0.5, itls_s=(0.1,) * 4
)
SLOW = RequestOutcome(
    start_s=0.25, queue_s=0.0, prompt_tokens=60, output_tokens=3, ttft_s=0.3, latency_s=1.3, itls_s=(0.4, 0.6)
)
ONE_TOKEN = RequestOutcome(
    start_s=2.0, queue_s=0.5, prompt_tokens=40, output_tokens=1, ttft_s=0.2, latency_s=0.2
)
FAILED = RequestOutcome(start_s=0.0, queue_s=0.0, prompt_tokens=99, error="HTTP 429: too many requests")

RESULT = ServeBenchmarkResult(
    options=ServeBenchmarkOptions(
        goodput={"ttft": 250.0, "tpot": 150.0}, max_concurrency=4, request_rate=2.0
    ),
    model="m",
    date="20260101-000000",
    duration_s=2.5,
    outcomes=(FAST, SLOW, ONE_TOKEN, FAILED),
)

BLOCK = """\
============ Serving Benchmark Result ============
Successful requests:                     3
Failed requests:                         1
Maximum request concurrency:             4
Request rate configured (RPS):           2.00
Benchmark duration (s):                  2.50
Total input tokens:                      200
Total generated tokens:                  9
Request throughput (req/s):              1.20
Request goodput (req/s):                 0.80
Output token throughput (tok/s):         3.60
Peak output token throughput (tok/s):    7.00
Peak concurrent requests:                2
Total token throughput (tok/s):          83.60
---------------Time to First Token----------------
Mean TTFT (ms):                          200.00
Median TTFT (ms):                        200.00
P99 TTFT (ms):                           298.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          300.00
Median TPOT (ms):                        300.00
P99 TPOT (ms):                           496.00
---------------Inter-token Latency----------------
Mean ITL (ms):                           233.33
Median ITL (ms):                         100.00
P99 ITL (ms):                            590.00
----------------End-to-end Latency----------------
Mean E2EL (ms):                          666.67
Median E2EL (ms):                        500.00
P99 E2EL (ms):                           1284.00
==================================================
pp67: 466.67 ± 377.12 tok/s   tg3: 6.00 ± 4.00 tok/s   (per request)
1 failed: HTTP 429: too many requests"""


def test_the_block_is_that_of_vllm_and_its_numbers_are_right() -> None:
    assert format_result(RESULT) == BLOCK


def test_the_record_has_the_keys_of_vllm() -> None:
    record = json.loads(json.dumps(RESULT.to_json(), allow_nan=False))
    keys = {
        *(
            "duration",
            "completed",
            "failed",
            "total_input_tokens",
            "total_output_tokens",
            "request_throughput",
        ),
        *("request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
        *("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "max_concurrent_requests"),
        *("date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency"),
    }
    statistics = {
        f"{name}_{metric}_ms"
        for name in ("mean", "median", "std", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    }
    assert keys | statistics <= record.keys()
    assert record["errors"] == ["", "", "", "HTTP 429: too many requests"]
    assert record["request_goodput"] == pytest.approx(2 / 2.5)
    assert record["std_ttft_ms"] == pytest.approx(81.65, abs=0.01)


def test_infinite_rates_and_missing_goodput_are_valid_json() -> None:
    record = replace(RESULT, options=ServeBenchmarkOptions(burstiness=float("inf"))).to_json()
    assert (record["request_rate"], record["burstiness"], record["request_goodput"]) == ("inf", "inf", None)
    json.dumps(record, allow_nan=False)


def test_only_the_chosen_metrics_and_percentiles_are_reported() -> None:
    options = ServeBenchmarkOptions(percentile_metrics=("itl",), metric_percentiles=(50.0, 99.9))
    result = replace(RESULT, options=options)
    assert "P99.9 ITL (ms):" in format_result(result)
    assert "TTFT" not in format_result(result)
    assert "p99.9_itl_ms" in result.to_json()
    assert "mean_ttft_ms" not in result.to_json()


def test_a_run_in_which_all_failed_has_a_result_too() -> None:
    result = replace(RESULT, outcomes=(FAILED, FAILED))
    assert "2 failed: HTTP 429" in format_result(result)
    assert (result.completed, result.failed) == (0, 2)
    json.dumps(result.to_json(), allow_nan=False)
