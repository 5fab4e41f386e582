"""What is asked of a server: when requests arrive, how long they are, and traces of both.

arrivals.py   arrival times: Poisson, gamma bursts, constant, all at once
lengths.py    prompt and output lengths: named mixes and the distributions they are made of
traces.py     a sequence of requests, synthesised or read from JSON lines
"""

from plait.workload.arrivals import (
    all_at_once_s,
    arrival_times_s,
    constant_arrivals_s,
    gamma_arrivals_s,
    poisson_arrivals_s,
)
from plait.workload.lengths import (
    LENGTH_MIXES,
    Equal,
    LengthDistribution,
    LengthMix,
    LogNormal,
    Uniform,
    length_mix_named,
)
from plait.workload.traces import TraceRequest, format_trace, parse_trace, synthesize_trace

__all__ = [
    "LENGTH_MIXES",
    "Equal",
    "LengthDistribution",
    "LengthMix",
    "LogNormal",
    "TraceRequest",
    "Uniform",
    "all_at_once_s",
    "arrival_times_s",
    "constant_arrivals_s",
    "format_trace",
    "gamma_arrivals_s",
    "length_mix_named",
    "parse_trace",
    "poisson_arrivals_s",
    "synthesize_trace",
]
