"""What has passed over the links to a peer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTraffic:
    """What has passed between this member and a peer, over all links that they have had.

    Bytes are those of frames, before encryption. `missed_heartbeats` were due from the peer and did not come;
    `losses` are links that ended without this side closing them.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    missed_heartbeats: int = 0
    losses: int = 0

    def __add__(self, other: "LinkTraffic") -> "LinkTraffic":
        return LinkTraffic(
            sent_bytes=self.sent_bytes + other.sent_bytes,
            received_bytes=self.received_bytes + other.received_bytes,
            missed_heartbeats=self.missed_heartbeats + other.missed_heartbeats,
            losses=self.losses + other.losses,
        )


NOTHING = LinkTraffic()
