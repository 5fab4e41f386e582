"""Facts of the machines and links of a swarm.

peer_record.py   what a peer says of itself: span, rates, load, addresses
swarm_view.py    the swarm as one member sees it at one moment: the input of every decision
description.py   a swarm that somebody describes in a file
synthetic.py     swarms drawn at random
bans.py          which peers are avoided after a failure, and for how long
track_records.py which peers turned out slower than they say
"""

from plait.cluster.bans import Ban, Bans
from plait.cluster.description import swarm_of_description
from plait.cluster.peer_record import (
    PeerLending,
    PeerLoad,
    PeerProgress,
    PeerRates,
    PeerRecord,
    PeerState,
    PeerTerms,
    check_peer_id,
)
from plait.cluster.swarm_view import SwarmView, format_blocks
from plait.cluster.synthetic import peer_id_of_name, random_swarm
from plait.cluster.track_records import TrackRecords

__all__ = [
    "Ban",
    "Bans",
    "PeerLending",
    "PeerLoad",
    "PeerProgress",
    "PeerRates",
    "PeerRecord",
    "PeerState",
    "PeerTerms",
    "SwarmView",
    "TrackRecords",
    "check_peer_id",
    "format_blocks",
    "peer_id_of_name",
    "random_swarm",
    "swarm_of_description",
]
