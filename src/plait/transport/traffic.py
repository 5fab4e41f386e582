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


NOTHING = LinkTraffic()
