"""Measurements of servers: `plait bench serve`, a plain OpenAI client that needs nothing of plait.

options.py   what to measure
serve.py     the run: send the requests when they are due, collect what came of them
client.py    one server: its models, its tokenizer if it shows one, one streamed request
sse.py       server-sent events out of bytes
prompts.py   text of a wanted length (prose.txt)
result.py    statistics, the printed block and the JSON record
"""

from plait.bench.client import RequestOutcome
from plait.bench.options import Endpoint, Metric, ServeBenchmarkOptions, parse_goodput, parse_metrics
from plait.bench.result import ServeBenchmarkResult, format_result, save_result
from plait.bench.serve import run_serve_benchmark, serve_benchmark

__all__ = [
    "Endpoint",
    "Metric",
    "RequestOutcome",
    "ServeBenchmarkOptions",
    "ServeBenchmarkResult",
    "format_result",
    "parse_goodput",
    "parse_metrics",
    "run_serve_benchmark",
    "save_result",
    "serve_benchmark",
]
