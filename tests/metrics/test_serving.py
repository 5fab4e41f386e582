"""What is measured, and under which names."""

from dataclasses import dataclass, replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from plait.ids import RequestId
from plait.metrics import ServingMetrics
from plait.session import GenerationRequest, RequestDelta, RequestTiming, SamplingParams, SequenceDelta


@dataclass(frozen=True)
class Counts:
    running: int = 2
    waiting: int = 3
    swapped: int = 0
    kv_blocks_used: int = 25
    kv_blocks_total: int = 100
    kv_blocks_cached: int = 5
    block_tokens: int = 16
    steps_total: int = 0
    step_tokens_total: int = 0
    prompt_tokens_total: int = 70
    generated_tokens_total: int = 80
    preemptions_total: int = 1
    prefix_query_tokens_total: int = 60
    prefix_hit_tokens_total: int = 40


class Board:
    """Metrics over counts that the test sets."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.metrics = ServingMetrics(lambda: self.counts, model_name="tiny")

    def value(self, name: str, **labels: str) -> float | None:
        labels = {"model_name": "tiny", "engine": "0", **labels}
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def board() -> Board:
    return Board()


REQUEST = GenerationRequest(
    id=RequestId("r"), prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4)
)


def delta(*tokens: int, finished: bool = False, timing: RequestTiming | None = None) -> RequestDelta:
    reason = "length" if finished else None
    sequence = SequenceDelta(0, tuple(tokens), "x", finish_reason=reason)
    return RequestDelta(REQUEST.id, (sequence,), finished, 3, 0, timing=timing)


# The names that dashboards, autoscalers and request routers look for.
SAMPLES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
)


@pytest.mark.parametrize("prefix", ["plait_", "vllm:"])
def test_every_known_name_is_there_from_the_start(board: Board, prefix: str):
    for name in SAMPLES:
        assert board.value(prefix + name) is not None, name
    for name in HISTOGRAMS:
        assert board.value(f"{prefix}{name}_count") == 0, name
        assert board.value(f"{prefix}{name}_bucket", le="+Inf") == 0, name
    for reason in ("stop", "length", "abort", "error"):
        assert board.value(f"{prefix}request_success_total", finished_reason=reason) == 0
    text = generate_latest(board.metrics.registry).decode()
    assert f"{prefix}cache_config_info" in text
    assert f"{prefix}lora_requests_info" in text


def test_both_names_of_a_metric_have_one_value(board: Board):
    observed = board.metrics.observe(REQUEST, now_s=1.0)
    observed.delta(delta(1), now_s=1.5)
    board.counts = replace(board.counts, steps_total=3, step_tokens_total=12)
    ours, vllm = {}, {}
    for family in text_string_to_metric_families(generate_latest(board.metrics.registry).decode()):
        for sample in family.samples:
            key = frozenset(sample.labels.items())
            if sample.name.startswith("plait_") and "http" not in sample.name:
                ours[sample.name.removeprefix("plait_"), key] = sample.value
            elif sample.name.startswith("vllm:"):
                vllm[sample.name.removeprefix("vllm:"), key] = sample.value
    assert ours == vllm


def test_counts_of_the_engine_are_read_when_scraped(board: Board):
    assert board.value("vllm:num_requests_running") == 2
    assert board.value("plait_kv_cache_usage_perc") == 0.25
    board.counts = replace(board.counts, running=7, kv_blocks_total=0)
    assert board.value("vllm:num_requests_running") == 7
    assert board.value("plait_kv_cache_usage_perc") == 0


def test_times_of_a_request_are_observed_as_its_reader_sees_them(board: Board):
    observed = board.metrics.observe(REQUEST, now_s=10.0)
    observed.delta(delta(1), now_s=10.5)
    observed.delta(delta(2, 3), now_s=10.7)
    timing = RequestTiming(arrived_s=1.0, scheduled_s=1.1, first_token_s=1.4, finished_s=2.0)
    observed.delta(delta(4, finished=True, timing=timing), now_s=10.8)
    observed.close()
    expected = {
        "time_to_first_token_seconds": (1, 0.5),
        "inter_token_latency_seconds": (3, 0.3),
        "e2e_request_latency_seconds": (1, 0.8),
        "request_time_per_output_token_seconds": (1, 0.1),
        "request_queue_time_seconds": (1, 0.1),
        "request_prefill_time_seconds": (1, 0.3),
        "request_decode_time_seconds": (1, 0.6),
        "request_inference_time_seconds": (1, 0.9),
        "request_prompt_tokens": (1, 3),
        "request_generation_tokens": (1, 4),
    }
    for name, (count, total) in expected.items():
        assert board.value(f"plait_{name}_count") == count, name
        assert board.value(f"plait_{name}_sum") == pytest.approx(total), name
    assert board.value("plait_request_success_total", finished_reason="length") == 1
    assert board.value("plait_request_success_total", finished_reason="abort") == 0


def test_a_request_ends_once_by_the_first_reason(board: Board):
    board.metrics.observe(REQUEST, now_s=1.0).close()
    failed = board.metrics.observe(REQUEST, now_s=1.0)
    failed.failed()
    failed.close()
    assert board.value("vllm:request_success_total", finished_reason="abort") == 1
    assert board.value("vllm:request_success_total", finished_reason="error") == 1


def test_steps_between_two_looks_count_with_their_mean(board: Board):
    board.counts = replace(board.counts, steps_total=4, step_tokens_total=40)
    board.metrics.observe_steps()
    board.metrics.observe_steps()
    board.counts = replace(board.counts, steps_total=5, step_tokens_total=140)
    assert board.value("vllm:iteration_tokens_total_count") == 5
    assert board.value("vllm:iteration_tokens_total_sum") == 140
    assert board.value("vllm:iteration_tokens_total_bucket", le="16.0") == 4


def test_answers_are_counted_by_route_and_status(board: Board):
    for status in (200, 200, 404):
        board.metrics.http_response("/v1/models", status)
    labels = {"path": "/v1/models", "status": "200"}
    assert board.metrics.registry.get_sample_value("plait_http_responses_total", labels) == 2
