"""Round trip and bandwidth of the way to a peer, as exponential averages of what passes anyway."""

from dataclasses import dataclass

RTT_WEIGHT = 0.2
BANDWIDTH_WEIGHT = 0.3
"""Of the newest sample."""
MEASURED_BYTES = 1 << 16
"""Shorter frames say nothing about bandwidth, and do not hold up a ping."""
LEAST_RTT_S = 1e-4
LEAST_TRANSFER_S = 1e-3
"""uvloop's clock counts milliseconds, so that a round trip in a LAN may seem to take none: means of many are right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEstimate:
    """0 is unknown. Both include what the other machine's event loop adds."""

    rtt_s: float = 0.0
    bandwidth_bytes_per_s: float = 0.0

    def with_rtt(self, sample_s: float) -> "LinkEstimate":
        return LinkEstimate(
            rtt_s=_average(self.rtt_s, sample_s, RTT_WEIGHT),
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
        )

    def with_bandwidth(self, sample_bytes_per_s: float) -> "LinkEstimate":
        return LinkEstimate(
            rtt_s=self.rtt_s,
            bandwidth_bytes_per_s=_average(self.bandwidth_bytes_per_s, sample_bytes_per_s, BANDWIDTH_WEIGHT),
        )


def _average(old: float, sample: float, weight: float) -> float:
    return sample if old == 0 else (1 - weight) * old + weight * sample
