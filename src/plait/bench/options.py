"""What `plait bench serve` measures: one frozen value, checked when it is made."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from plait.errors import BadSetup
from plait.workload import LENGTH_MIXES

Endpoint = Literal["chat", "completions"]
Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: tuple[Metric, ...] = get_args(Metric)

# vLLM's benchmark accepts objectives for these; a gap between tokens belongs to no single request.
_GOODPUT_METRICS = ("ttft", "tpot", "e2el")
_OTHER_DATASETS = ("random", "trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchmarkOptions:
    """A benchmark of one server; names follow `vllm bench serve`.

    `base_url` may end in `/v1`. `model` None takes the first that the server lists. `request_rate` is in
    requests per second, infinite for all at once; `burstiness` is the shape of the gamma-distributed gaps (1:
    Poisson). `dataset` names a mix of `plait.workload`, or is `random` (lengths drawn uniformly from
    `random_input_len` and `random_output_len`, plus and minus `random_range_ratio` of each), or `trace`: the
    first `num_prompts` requests of the file `dataset_path`, at its own times unless `request_rate` is finite.
    `ignore_eos` sends a field that OpenAI does not define, so that answers reach their full length on servers
    that know it. `goodput` maps metrics to the milliseconds that a good request stays within.

    Raises:
        BadSetup: a value out of its range.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    endpoint: Endpoint = "completions"
    api_key: str | None = None
    num_prompts: int = 100
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    dataset: str = "sharegpt-like"
    dataset_path: Path | None = None
    random_input_len: int = 512
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int = 0
    request_timeout_s: float = 600.0
    goodput: Mapping[Metric, float] = field(default_factory=dict[Metric, float])
    percentile_metrics: tuple[Metric, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (99.0,)

    def __post_init__(self) -> None:
        _check(
            self.base_url.startswith(("http://", "https://")), "base-url", "must be a http URL", self.base_url
        )
        _check(self.endpoint in get_args(Endpoint), "endpoint", "must be chat or completions", self.endpoint)
        _check(self.num_prompts >= 1, "num-prompts", "must be at least 1", self.num_prompts)
        _check(self.request_rate > 0, "request-rate", "must be positive", self.request_rate)
        _check(self.burstiness > 0, "burstiness", "must be positive", self.burstiness)
        if self.max_concurrency is not None:
            _check(self.max_concurrency >= 1, "max-concurrency", "must be at least 1", self.max_concurrency)
        known = (*sorted(LENGTH_MIXES), *_OTHER_DATASETS)
        _check(self.dataset in known, "dataset", f"must be one of {', '.join(known)}", self.dataset)
        if (self.dataset == "trace") != (self.dataset_path is not None):
            raise BadSetup(
                "a trace file goes with the dataset 'trace', and only with it: give both or neither"
            )
        _check(self.random_input_len >= 1, "random-input-len", "must be at least 1", self.random_input_len)
        _check(self.random_output_len >= 1, "random-output-len", "must be at least 1", self.random_output_len)
        ratio = self.random_range_ratio
        _check(0 <= ratio < 1, "random-range-ratio", "must be from 0 to below 1", ratio)
        _check(self.request_timeout_s > 0, "request-timeout", "must be positive", self.request_timeout_s)
        for percentile in self.metric_percentiles:
            _check(0 <= percentile <= 100, "metric-percentiles", "must be between 0 and 100", percentile)


def parse_goodput(pairs: Iterable[str]) -> dict[Metric, float]:
    """Read objectives such as `ttft:500 tpot:50`, in milliseconds.

    Raises:
        BadSetup: not such a pair, or a metric that has no objective.
    """
    goodput: dict[Metric, float] = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = math.nan
        if name not in _GOODPUT_METRICS or not limit_ms >= 0:
            known = ", ".join(_GOODPUT_METRICS)
            raise BadSetup(f"{pair!r} is no objective; write METRIC:MILLISECONDS with one of {known}")
        goodput[name] = limit_ms
    return goodput


def parse_metrics(text: str) -> tuple[Metric, ...]:
    """Read a comma-separated list of metrics.

    Raises:
        BadSetup: an unknown metric.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise BadSetup(f"{unknown[0]!r} is no metric; known are {', '.join(METRICS)}")
    return tuple(metric for metric in METRICS if metric in names)


def _check(good: bool, name: str, rule: str, value: object) -> None:
    if not good:
        raise BadSetup(f"--{name} {rule}, not {value!r}")
