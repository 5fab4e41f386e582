import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from other_server import OtherServer, count_tokens

from plait.bench import (
    ServeBenchmarkOptions,
    ServeBenchmarkResult,
    format_result,
    run_serve_benchmark,
    save_result,
)
from plait.errors import BadSetup


def options(server: OtherServer, **chosen: Any) -> ServeBenchmarkOptions:
    short: dict[str, Any] = {
        "dataset": "random",
        "random_input_len": 20,
        "random_output_len": 6,
        "num_prompts": 5,
    }
    return ServeBenchmarkOptions(base_url=server.base_url, **(short | chosen))


def run_with_trace(server: OtherServer, lines: list[dict[str, Any]], **chosen: Any) -> ServeBenchmarkResult:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        return run_serve_benchmark(options(server, dataset="trace", dataset_path=Path(file.name), **chosen))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_every_request_is_answered_counted_and_timed(other_server: OtherServer, endpoint: Any) -> None:
    result = run_serve_benchmark(options(other_server, endpoint=endpoint))
    assert (result.completed, result.failed) == (5, 0)
    assert result.total_output_tokens == 5 * 6
    for outcome in result.outcomes:
        assert 0 < outcome.ttft_s <= outcome.latency_s
        assert len(outcome.itls_s) == 5  # six words; the role and the finish reason are no tokens
        assert outcome.ttft_s + sum(outcome.itls_s) <= outcome.latency_s + 1e-9
    assert result.total_input_tokens == sum(
        count_tokens(body["prompt"] if endpoint == "completions" else body["messages"][0]["content"])
        for body in other_server.bodies[1:]
    )


def test_prompts_are_cut_to_length_by_the_servers_tokenizer_where_it_shows_one(
    other_server: OtherServer,
) -> None:
    other_server.shows_tokenizer = True
    result = run_serve_benchmark(options(other_server, random_input_len=200))
    assert all(196 < outcome.prompt_tokens <= 200 for outcome in result.outcomes)


def test_the_same_options_send_the_same_requests(other_server: OtherServer) -> None:
    run_serve_benchmark(options(other_server, dataset="sharegpt-like"))
    first = other_server.bodies.copy()
    other_server.bodies.clear()
    run_serve_benchmark(options(other_server, dataset="sharegpt-like"))

    def key(body: dict[str, Any]) -> str:
        return json.dumps(body)

    assert sorted(first, key=key) == sorted(other_server.bodies, key=key)


def test_a_base_url_may_end_in_v1(other_server: OtherServer) -> None:
    result = run_serve_benchmark(
        ServeBenchmarkOptions(base_url=other_server.base_url + "/v1/", dataset="equal", num_prompts=1)
    )
    assert result.completed == 1


def test_without_usage_tokens_are_chunks_and_the_report_says_so(other_server: OtherServer) -> None:
    other_server.reports_usage = False
    result = run_serve_benchmark(options(other_server))
    assert result.total_output_tokens == 5 * 6
    assert "5 answers came without usage" in format_result(result)


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("refuse", "HTTP 429: too many requests"),
        ("fail", "out of memory"),
        ("leave", "the stream broke off before the answer ended"),
        ("hang", "no complete answer within 1 s"),
    ],
)
def test_a_request_that_fails_is_counted_apart_with_its_reason(
    other_server: OtherServer, order: str, error: str
) -> None:
    line = {"arrival_s": 0, "prompt_tokens": 2, "output_tokens": 3}
    lines = [line | {"prompt": order}, line | {"prompt": "a good one"}]
    result = run_with_trace(other_server, lines, request_timeout_s=1.0)
    assert (result.completed, result.failed) == (1, 1)
    assert [outcome.error for outcome in result.outcomes] == [error, ""]
    assert result.total_output_tokens == 3


def test_a_trace_is_sent_at_its_own_times_and_lengths(other_server: OtherServer) -> None:
    lines = [
        {"arrival_s": arrival_s, "prompt_tokens": 8, "output_tokens": tokens}
        for arrival_s, tokens in ((0.0, 2), (0.1, 3), (0.15, 4))
    ]
    result = run_with_trace(other_server, lines)
    assert [outcome.output_tokens for outcome in result.outcomes] == [2, 3, 4]
    for outcome, line in zip(result.outcomes, lines, strict=True):
        assert outcome.start_s >= line["arrival_s"]


def test_no_more_requests_run_than_the_concurrency_allows(other_server: OtherServer) -> None:
    result = run_serve_benchmark(options(other_server, max_concurrency=2, num_prompts=12))
    assert result.completed == 12
    assert other_server.most_running <= 2
    assert result.outcomes[-1].queue_s > 0


def test_progress_is_reported_for_every_request(other_server: OtherServer) -> None:
    seen: list[tuple[int, int]] = []
    run_serve_benchmark(options(other_server), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_the_record_is_written_as_json(other_server: OtherServer, tmp_path: Path) -> None:
    result = run_serve_benchmark(options(other_server))
    save_result(result, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["completed"] == 5
    with pytest.raises(BadSetup, match="cannot write the result"):
        save_result(result, tmp_path / "missing" / "result.json")


def test_requests_fit_the_context_that_the_server_tells(other_server: OtherServer) -> None:
    other_server.context_tokens = 100
    run_serve_benchmark(options(other_server, dataset="sharegpt-like", num_prompts=30))
    assert all(body["max_tokens"] < 100 for body in other_server.bodies)
    with pytest.raises(BadSetup, match="dataset 'random' does not fit the model"):
        run_serve_benchmark(options(other_server, random_input_len=101))


def test_ignore_eos_is_sent_only_when_asked_for(other_server: OtherServer) -> None:
    run_serve_benchmark(options(other_server))
    assert not any("ignore_eos" in body for body in other_server.bodies)
    run_serve_benchmark(options(other_server, ignore_eos=True))
    assert other_server.bodies[-1]["ignore_eos"] is True


def test_the_key_is_sent_and_a_wrong_one_is_one_sentence(other_server: OtherServer) -> None:
    other_server.api_key = "secret"
    assert run_serve_benchmark(options(other_server, api_key="secret")).completed == 5
    with pytest.raises(BadSetup, match="answered 401: no such key"):
        run_serve_benchmark(options(other_server))


def test_a_wrong_model_is_one_sentence_before_the_run(other_server: OtherServer) -> None:
    with pytest.raises(BadSetup, match="does not answer requests for 'gpt-9': HTTP 404: The model `gpt-9`"):
        run_serve_benchmark(options(other_server, model="gpt-9"))


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(BadSetup, match=r"no answer from http://127.0.0.1:1 .*is the server running"):
        run_serve_benchmark(ServeBenchmarkOptions(base_url="http://127.0.0.1:1"))


def test_a_missing_trace_is_one_sentence(other_server: OtherServer) -> None:
    missing = Path("/nonexistent/trace.jsonl")
    with pytest.raises(BadSetup, match="cannot read the trace /nonexistent/trace"):
        run_serve_benchmark(options(other_server, dataset="trace", dataset_path=missing))
