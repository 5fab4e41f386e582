"""What operators scrape: every metric of the server, defined and named in one place.

agreement.py   how far two sets of measurements agree
histogram.py   a histogram that costs well under a microsecond to feed
latency.py     what TTFT, TPOT and the like mean, and how sure a statistic of them is
rate.py        tokens per second over the last few seconds
serving.py     the metrics of one server, and what feeds them
swarm.py       those of a swarm's gateway: machines, links, sessions
"""

from plait.metrics.agreement import (
    kendall_tau,
    ks_distance,
    mean_absolute_error,
    mean_absolute_relative_error,
    pick_regret,
    relative_error,
)
from plait.metrics.histogram import Histogram
from plait.metrics.latency import (
    Estimate,
    Objectives,
    mean_estimate,
    normalised_latency_s,
    percentile_estimate,
    tpot_s,
)
from plait.metrics.rate import TokenRate
from plait.metrics.serving import EngineCounts, ObservedRequest, ServingMetrics
from plait.metrics.swarm import MachineFacts, SwarmFacts, SwarmMetrics

__all__ = [
    "EngineCounts",
    "Estimate",
    "Histogram",
    "MachineFacts",
    "Objectives",
    "ObservedRequest",
    "ServingMetrics",
    "SwarmFacts",
    "SwarmMetrics",
    "TokenRate",
    "kendall_tau",
    "ks_distance",
    "mean_absolute_error",
    "mean_absolute_relative_error",
    "mean_estimate",
    "normalised_latency_s",
    "percentile_estimate",
    "pick_regret",
    "relative_error",
    "tpot_s",
]
