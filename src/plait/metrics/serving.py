"""The metrics of one server.

Every metric has one storage and two names: ours under `plait_`, and vLLM's under `vllm:`, so that existing
dashboards, autoscalers and request routers work unchanged (names and buckets: vllm/v1/metrics/loggers.py).
Counts that the engine keeps are read from its status when somebody scrapes; what only the gateway sees (times
between tokens, how requests ended) is observed as it happens, by the event loop's thread alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from plait.metrics.histogram import Histogram
from plait.metrics.rate import TokenRate
from plait.session import GenerationRequest, RequestDelta

PREFIXES = ("plait_", "vllm:")


class EngineCounts(Protocol):
    """What is read from an engine; totals are since its start."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def swapped(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def kv_blocks_cached(self) -> int: ...
    @property
    def steps_total(self) -> int: ...
    @property
    def step_tokens_total(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def generated_tokens_total(self) -> int: ...
    @property
    def preemptions_total(self) -> int: ...
    @property
    def prefix_query_tokens_total(self) -> int: ...
    @property
    def prefix_hit_tokens_total(self) -> int: ...


_GAUGES: tuple[tuple[str, str, Callable[[EngineCounts], float]], ...] = (
    ("num_requests_running", "Requests in the running batch.", lambda c: c.running),
    ("num_requests_waiting", "Requests waiting to be admitted.", lambda c: c.waiting),
    ("num_requests_swapped", "Requests preempted to host memory.", lambda c: c.swapped),
    (
        "kv_cache_usage_perc",
        "KV blocks in use, as a fraction from 0 to 1 (the name is vLLM's).",
        lambda c: c.kv_blocks_used / c.kv_blocks_total if c.kv_blocks_total else 0.0,
    ),
    ("kv_cached_blocks", "KV blocks free to take that hold a reusable prefix.", lambda c: c.kv_blocks_cached),
)

_COUNTERS: tuple[tuple[str, str, Callable[[EngineCounts], float]], ...] = (
    ("num_preemptions", "Requests that had to give up their KV blocks.", lambda c: c.preemptions_total),
    ("prefix_cache_queries", "Prompt tokens looked up in the cache.", lambda c: c.prefix_query_tokens_total),
    ("prefix_cache_hits", "Prompt tokens found in the cache.", lambda c: c.prefix_hit_tokens_total),
    ("prompt_tokens", "Prompt tokens of admitted requests.", lambda c: c.prompt_tokens_total),
    ("generation_tokens", "Tokens generated.", lambda c: c.generated_tokens_total),
)

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_HISTOGRAMS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between two tokens of a stream.", _TOKEN_S),
    "time_per_output_token_seconds": ("The older name of inter_token_latency_seconds.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean time between the tokens of a request.", _TOKEN_S),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", _REQUEST_S),
    "request_queue_time_seconds": ("From a request's arrival to its admission.", _REQUEST_S),
    "request_prefill_time_seconds": ("From a request's admission to its first token.", _REQUEST_S),
    "request_decode_time_seconds": ("From a request's first token to its last.", _REQUEST_S),
    "request_inference_time_seconds": ("From a request's admission to its last token.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a finished request.", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a finished request.", _TOKENS),
    "request_params_max_tokens": ("The max_tokens that requests asked for.", _TOKENS),
    "request_params_n": ("The n that requests asked for.", (1, 2, 5, 10, 20)),
    "iteration_tokens_total": ("Tokens computed in one engine step.", _STEP_TOKENS),
}

# Every reason is there from the start: a rate over a series that appears late misses its first event.
_FINISH_REASONS: tuple[str, ...] = ("stop", "length", "abort", "error")


class ServingMetrics(Collector):
    """Everything measured about one server; it registers itself in a registry of its own."""

    def __init__(self, counts: Callable[[], EngineCounts], *, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.token_rate = TokenRate()
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.finished = dict.fromkeys(_FINISH_REASONS, 0)
        self.http_responses: dict[tuple[str, str], int] = {}
        self._counts = counts
        self._labels = {"model_name": model_name, "engine": "0"}
        self._seen_steps = 0
        self._seen_step_tokens = 0
        self.registry.register(self)

    def observe(self, request: GenerationRequest, now_s: float) -> "ObservedRequest":
        """Begin to watch a request that has arrived."""
        if request.sampling.max_tokens is not None:
            self.histograms["request_params_max_tokens"].observe(request.sampling.max_tokens)
        self.histograms["request_params_n"].observe(request.sampling.n)
        return ObservedRequest(self, now_s)

    def http_response(self, path: str, status: int) -> None:
        """Count an answer; `path` is that of a known route, or a word for all others."""
        key = (path, str(status))
        self.http_responses[key] = self.http_responses.get(key, 0) + 1

    def observe_steps(self) -> None:
        """Count the engine's steps since the last look; several at once count with their mean."""
        counts = self._counts()
        steps = counts.steps_total - self._seen_steps
        if steps > 0:
            tokens = counts.step_tokens_total - self._seen_step_tokens
            self.histograms["iteration_tokens_total"].observe(tokens / steps, steps)
            self._seen_steps, self._seen_step_tokens = counts.steps_total, counts.step_tokens_total

    def collect(self) -> Iterator[Metric]:
        """Every metric under both prefixes, as prometheus-client's collectors do."""
        self.observe_steps()
        counts = self._counts()
        for prefix in PREFIXES:
            yield from self._engine_metrics(prefix, counts)
            for name, histogram in self.histograms.items():
                family = HistogramMetricFamily(prefix + name, _HISTOGRAMS[name][0], labels=list(self._labels))
                family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.total)
                yield family
            finished = _counter(prefix + "request_success", "Requests by how they ended.")
            for reason, requests in self.finished.items():
                finished.add_sample(
                    f"{prefix}request_success_total", {**self._labels, "finished_reason": reason}, requests
                )
            yield finished
        responses = _counter("plait_http_responses", "HTTP answers by route and status.")
        for (path, status), answers in sorted(self.http_responses.items()):
            responses.add_sample("plait_http_responses_total", {"path": path, "status": status}, answers)
        yield responses

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known to be distinct, and counting them would read the engine."""
        return ()

    def _engine_metrics(self, prefix: str, counts: EngineCounts) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            yield _gauge(prefix + name, text, self._labels, read(counts))
        for name, text, read in _COUNTERS:
            counter = _counter(prefix + name, text)
            counter.add_sample(f"{prefix}{name}_total", self._labels, read(counts))
            yield counter
        cache = {
            **self._labels,
            "num_gpu_blocks": str(counts.kv_blocks_total),
            "block_size": str(counts.block_tokens),
        }
        yield _gauge(prefix + "cache_config_info", "How the KV cache is laid out.", cache, 1)
        adapters = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        yield _gauge(prefix + "lora_requests_info", "Adapters in use (none are served).", adapters, 0)


class ObservedRequest:
    """One request on its way through the engine, as its reader sees it."""

    __slots__ = ("_arrived_s", "_ended", "_first_s", "_last_s", "_metrics", "_tokens")

    def __init__(self, metrics: ServingMetrics, now_s: float) -> None:
        self._metrics = metrics
        self._arrived_s = now_s
        self._first_s = 0.0
        self._last_s = 0.0
        self._tokens = 0
        self._ended = False

    def delta(self, delta: RequestDelta, now_s: float) -> None:
        """Count what arrived; of several tokens in one delta each waited its share."""
        metrics = self._metrics
        tokens = longest = 0
        for sequence in delta.sequences:
            gained = len(sequence.token_ids)
            tokens += gained
            longest = max(longest, gained)
        if tokens:
            self._tokens += tokens
            metrics.token_rate.add(tokens, now_s)
            if self._first_s:
                gap_s = (now_s - self._last_s) / longest
                metrics.histograms["inter_token_latency_seconds"].observe(gap_s, longest)
                metrics.histograms["time_per_output_token_seconds"].observe(gap_s, longest)
            else:
                self._first_s = now_s
                metrics.histograms["time_to_first_token_seconds"].observe(now_s - self._arrived_s)
            self._last_s = now_s
        metrics.observe_steps()
        if delta.finished:
            self._finish(delta, now_s)

    def failed(self) -> None:
        """The engine answered with an error."""
        self._end("error")

    def close(self) -> None:
        """Nobody reads on: a request that has not ended by now was aborted."""
        self._end("abort")

    def _finish(self, delta: RequestDelta, now_s: float) -> None:
        self._end(next((s.finish_reason for s in delta.sequences if s.finish_reason), "stop"))
        histograms = self._metrics.histograms
        histograms["e2e_request_latency_seconds"].observe(now_s - self._arrived_s)
        histograms["request_prompt_tokens"].observe(delta.prompt_tokens)
        histograms["request_generation_tokens"].observe(self._tokens)
        if self._tokens > 1:
            per_token_s = (now_s - self._first_s) / (self._tokens - 1)
            histograms["request_time_per_output_token_seconds"].observe(per_token_s)
        timing = delta.timing
        if timing is not None:
            histograms["request_queue_time_seconds"].observe(timing.scheduled_s - timing.arrived_s)
            histograms["request_prefill_time_seconds"].observe(timing.first_token_s - timing.scheduled_s)
            histograms["request_decode_time_seconds"].observe(timing.finished_s - timing.first_token_s)
            histograms["request_inference_time_seconds"].observe(timing.finished_s - timing.scheduled_s)

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._metrics.finished[reason] += 1


def _gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=list(labels))
    gauge.add_metric(list(labels.values()), value)
    return gauge


def _counter(name: str, text: str) -> Metric:
    return CounterMetricFamily(name, text, labels=())
