"""What operators scrape: every metric of the server, defined and named in one place.

histogram.py   a histogram that costs well under a microsecond to feed
rate.py        tokens per second over the last few seconds
serving.py     the metrics of one server, and what feeds them
"""

from plait.metrics.histogram import Histogram
from plait.metrics.rate import TokenRate
from plait.metrics.serving import EngineCounts, ObservedRequest, ServingMetrics

__all__ = ["EngineCounts", "Histogram", "ObservedRequest", "ServingMetrics", "TokenRate"]
