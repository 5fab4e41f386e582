"""Statistics over the requests of a run, printed and recorded as vLLM's benchmark does.

Definitions are those of `plait.metrics` (latency.py), with the gaps between chunks for ITL. Only requests that
succeeded count.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from plait.bench.client import RequestOutcome
from plait.bench.options import METRICS, Metric, ServeBenchmarkOptions
from plait.errors import BadSetup
from plait.metrics import tpot_s

_HEADINGS: dict[Metric, str] = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_WIDTH = 50


@dataclass(frozen=True, kw_only=True)
class ServeBenchmarkResult:
    """A finished run: what was asked, and what came of each request, in order of sending."""

    options: ServeBenchmarkOptions
    model: str
    date: str
    duration_s: float
    outcomes: tuple[RequestOutcome, ...]

    @cached_property
    def succeeded(self) -> tuple[RequestOutcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.succeeded)

    @property
    def completed(self) -> int:
        return len(self.succeeded)

    @property
    def failed(self) -> int:
        return len(self.outcomes) - self.completed

    @property
    def total_input_tokens(self) -> int:
        return sum(outcome.prompt_tokens for outcome in self.succeeded)

    @property
    def total_output_tokens(self) -> int:
        return sum(outcome.output_tokens for outcome in self.succeeded)

    @property
    def good_requests(self) -> int:
        """Requests that met every objective of `options.goodput`."""
        return sum(
            all(_latency_s(outcome, metric) * 1000 <= limit for metric, limit in self.options.goodput.items())
            for outcome in self.succeeded
        )

    @cached_property
    def peak_output_tokens_per_s(self) -> float:
        """Most output tokens in a second of the run; a chunk counts its share of its request's tokens."""
        times_s: list[float] = []
        tokens: list[float] = []
        for outcome in self.succeeded:
            chunks_s = np.cumsum([outcome.start_s + outcome.ttft_s, *outcome.itls_s])
            times_s.extend(chunks_s.tolist())
            tokens.extend([outcome.output_tokens / len(chunks_s)] * len(chunks_s))
        if not times_s:
            return 0.0
        return float(np.bincount(np.floor(times_s).astype(int), weights=tokens).max())

    @cached_property
    def peak_concurrent_requests(self) -> int:
        starts = [(outcome.start_s, 1) for outcome in self.succeeded]
        ends = [(outcome.start_s + outcome.latency_s, -1) for outcome in self.succeeded]
        return int(max(np.cumsum([change for _, change in sorted(starts + ends)]), default=0))

    def samples_s(self, metric: Metric) -> list[float]:
        """Every value of a metric, in seconds."""
        match metric:
            case "itl":
                return [gap_s for outcome in self.succeeded for gap_s in outcome.itls_s]
            case "tpot":
                return [
                    _latency_s(outcome, "tpot") for outcome in self.succeeded if outcome.output_tokens > 1
                ]
            case "ttft" | "e2el":
                return [_latency_s(outcome, metric) for outcome in self.succeeded]

    def statistics_ms(self, metric: Metric) -> dict[str, float]:
        """`mean`, `median`, `std` and the percentiles of a metric, all 0 if it has no value."""
        samples_ms = np.array(self.samples_s(metric) or [0.0]) * 1000
        statistics = {
            "mean": float(samples_ms.mean()),
            "median": float(np.median(samples_ms)),
            "std": float(samples_ms.std()),
        }
        for percentile in self.options.metric_percentiles:
            statistics[f"p{percentile:g}"] = float(np.percentile(samples_ms, percentile))
        return statistics

    def to_json(self) -> dict[str, object]:
        """The record that `--save-result` writes: vLLM's keys, and per request what they were made of."""
        options = self.options
        rate = options.request_rate
        record: dict[str, object] = {
            "date": self.date,
            "endpoint_type": "openai-chat" if options.endpoint == "chat" else "openai",
            "backend": "openai-chat" if options.endpoint == "chat" else "openai",
            "base_url": options.base_url,
            "model_id": self.model,
            "dataset": options.dataset,
            "seed": options.seed,
            "num_prompts": len(self.outcomes),
            "request_rate": rate if math.isfinite(rate) else "inf",
            "burstiness": options.burstiness if math.isfinite(options.burstiness) else "inf",
            "max_concurrency": options.max_concurrency,
            "ignore_eos": options.ignore_eos,
            "duration": self.duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.total_input_tokens,
            "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.completed / self.duration_s,
            "request_goodput": self.good_requests / self.duration_s if options.goodput else None,
            "output_throughput": self.total_output_tokens / self.duration_s,
            "total_token_throughput": (self.total_input_tokens + self.total_output_tokens) / self.duration_s,
            "max_output_tokens_per_s": self.peak_output_tokens_per_s,
            "max_concurrent_requests": self.peak_concurrent_requests,
        }
        for metric in METRICS:
            if metric in options.percentile_metrics:
                statistics = self.statistics_ms(metric)
                record |= {f"{name}_{metric}_ms": value for name, value in statistics.items()}
        return record | {
            "input_lens": [outcome.prompt_tokens for outcome in self.outcomes],
            "output_lens": [outcome.output_tokens for outcome in self.outcomes],
            "ttfts": [outcome.ttft_s for outcome in self.outcomes],
            "itls": [list(outcome.itls_s) for outcome in self.outcomes],
            "latencies": [outcome.latency_s for outcome in self.outcomes],
            "start_times": [outcome.start_s for outcome in self.outcomes],
            "queue_times": [outcome.queue_s for outcome in self.outcomes],
            "errors": [outcome.error for outcome in self.outcomes],
        }


def format_result(result: ServeBenchmarkResult) -> str:
    """The block that people know from `vllm bench serve`, and a last line as llama-bench would put it."""
    options = result.options
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]

    def add(label: str, value: float) -> None:
        lines.append(f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}")

    add("Successful requests:", result.completed)
    add("Failed requests:", result.failed)
    if options.max_concurrency is not None:
        add("Maximum request concurrency:", options.max_concurrency)
    if math.isfinite(options.request_rate):
        add("Request rate configured (RPS):", float(options.request_rate))
    add("Benchmark duration (s):", result.duration_s)
    add("Total input tokens:", result.total_input_tokens)
    add("Total generated tokens:", result.total_output_tokens)
    add("Request throughput (req/s):", result.completed / result.duration_s)
    if options.goodput:
        add("Request goodput (req/s):", result.good_requests / result.duration_s)
    add("Output token throughput (tok/s):", result.total_output_tokens / result.duration_s)
    add("Peak output token throughput (tok/s):", result.peak_output_tokens_per_s)
    add("Peak concurrent requests:", result.peak_concurrent_requests)
    total_tokens = result.total_input_tokens + result.total_output_tokens
    add("Total token throughput (tok/s):", total_tokens / result.duration_s)
    for metric in METRICS:
        if metric not in options.percentile_metrics:
            continue
        lines.append(f"{_HEADINGS[metric]:-^{_WIDTH}}")
        for name, value_ms in result.statistics_ms(metric).items():
            if name != "std":
                add(f"{name.capitalize()} {metric.upper()} (ms):", value_ms)
    lines.append("=" * _WIDTH)
    lines.append(_speed_line(result.succeeded))
    without_usage = sum(not outcome.usage for outcome in result.succeeded)
    if without_usage:
        lines.append(
            f"{without_usage} answers came without usage: their tokens are counted as chunks of the stream."
        )
    lines.extend(_error_lines(result.outcomes))
    return "\n".join(line.rstrip() for line in lines)


def save_result(result: ServeBenchmarkResult, path: Path) -> None:
    """Write the JSON record.

    Raises:
        BadSetup: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadSetup(f"cannot write the result to {path}: {error.strerror or error}") from error


def _latency_s(outcome: RequestOutcome, metric: Metric) -> float:
    match metric:
        case "ttft":
            return outcome.ttft_s
        case "tpot":
            return tpot_s(outcome.ttft_s, outcome.latency_s, outcome.output_tokens) or 0.0
        case "e2el":
            return outcome.latency_s
        case "itl":
            return max(outcome.itls_s, default=0.0)


def _speed_line(outcomes: Sequence[RequestOutcome]) -> str:
    """Tokens per second within a request, mean and standard deviation: those of the prompt until the first
    token (under load with the wait in the server's queue), then the generated ones.
    """

    def speed(
        name: str, tokens: Callable[[RequestOutcome], int], seconds: Callable[[RequestOutcome], float]
    ) -> str:
        timed = [outcome for outcome in outcomes if tokens(outcome) > 0 and seconds(outcome) > 0]
        if not timed:
            return f"{name}: no sample"
        per_s = np.array([tokens(outcome) / seconds(outcome) for outcome in timed])
        mean_tokens = round(np.mean([tokens(outcome) for outcome in timed]))
        return f"{name}{mean_tokens}: {per_s.mean():.2f} ± {per_s.std():.2f} tok/s"

    prompt = speed("pp", lambda outcome: outcome.prompt_tokens, lambda outcome: outcome.ttft_s)
    generation = speed(
        "tg", lambda outcome: outcome.output_tokens - 1, lambda outcome: outcome.latency_s - outcome.ttft_s
    )
    return f"{prompt}   {generation}   (per request)"


def _error_lines(outcomes: Sequence[RequestOutcome]) -> list[str]:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            counts[outcome.error] = counts.get(outcome.error, 0) + 1
    commonest = sorted(counts.items(), key=lambda item: -item[1])
    lines = [f"{count} failed: {error}" for error, count in commonest[:10]]
    if len(commonest) > 10:
        lines.append(f"and {len(commonest) - 10} other errors; --save-result records them all")
    return lines
