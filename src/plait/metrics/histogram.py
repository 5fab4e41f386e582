"""Counts of observations in fixed buckets.

prometheus-client's own histogram takes a lock and walks its buckets, which is felt when every token of every
stream is observed; this one is owned by one thread and is rendered by the collector that holds it.
"""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Observations by upper bound, which belongs to its bucket, as Prometheus counts them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) for every bucket, `+Inf` last."""
        buckets: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(seen)))
        return buckets
