from pathlib import Path
from typing import Any

import pytest

from plait.bench import ServeBenchmarkOptions, parse_goodput, parse_metrics
from plait.errors import BadSetup


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base_url": "localhost:8000"}, "--base-url must be a http URL"),
        ({"endpoint": "responses"}, "--endpoint must be chat or completions"),
        ({"num_prompts": 0}, "--num-prompts"),
        ({"request_rate": 0.0}, "--request-rate must be positive"),
        ({"burstiness": -1.0}, "--burstiness must be positive"),
        ({"max_concurrency": 0}, "--max-concurrency"),
        ({"dataset": "sonnet"}, "equal, .*sharegpt-like, .*trace"),
        ({"dataset": "trace"}, "give both or neither"),
        ({"dataset_path": Path("t.jsonl")}, "give both or neither"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio"),
        ({"metric_percentiles": (101.0,)}, "--metric-percentiles"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_flag(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        ServeBenchmarkOptions(**wrong)


def test_objectives_are_read_as_metric_and_milliseconds() -> None:
    assert parse_goodput(["ttft:500", "tpot:50.5"]) == {"ttft": 500.0, "tpot": 50.5}


@pytest.mark.parametrize("pair", ["ttft", "ttft:", "itl:5", "ttft:fast", "ttft:-1", "ttft:nan"])
def test_anything_else_is_no_objective(pair: str) -> None:
    with pytest.raises(BadSetup, match="METRIC:MILLISECONDS"):
        parse_goodput([pair])


def test_metrics_are_read_in_the_order_of_the_report() -> None:
    assert parse_metrics("e2el, ttft") == ("ttft", "e2el")
    with pytest.raises(BadSetup, match="'latency' is no metric"):
        parse_metrics("ttft,latency")
