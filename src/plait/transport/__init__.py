"""Bytes between machines: links, identities, and the network that everything above sends through.

network.py      all links of one member: send, receive, who is there, who is lost
known_peer.py   what is known of the way to a peer; dialler.py: links that this member makes; doorkeeper.py: those
                that others make
connection.py   one live link: heartbeats, credits, estimates
handshake.py    two ends prove who they are and that they belong to the swarm; credentials.py: with what
splice.py       streams that a member carries between two others
link.py         frames over any asyncio transport; what a carrier is
sockets.py      carriers: TCP, TLS over TCP, unix sockets
iroh.py         carrier: QUIC by an optional library, through address translation; iroh_binding.py: that library
tls.py          TLS 1.3 with both sides pinned, over any transport
memory.py       carrier: nodes in one process, with delays and faults from a seed
identity.py     a machine's ed25519 key
ticket.py       the swarm's secret, and tickets to join it
limits.py       times and bounds
estimate.py     round trip and bandwidth; traffic.py: what has passed
"""

from plait.transport.estimate import LinkEstimate
from plait.transport.identity import Identity, verified
from plait.transport.iroh import IrohCarrier
from plait.transport.limits import NetworkLimits
from plait.transport.link import Carrier, Link, Listener
from plait.transport.memory import Fault, FaultKind, MemoryCarrier, MemoryNet, Wire, draw_faults
from plait.transport.network import Network, OnLost, OnMessage
from plait.transport.sockets import TcpCarrier, TlsCarrier, UnixCarrier
from plait.transport.ticket import SwarmSecret, Ticket, TicketPeer, TicketSecret
from plait.transport.traffic import LinkTraffic

__all__ = [
    "Carrier",
    "Fault",
    "FaultKind",
    "Identity",
    "IrohCarrier",
    "Link",
    "LinkEstimate",
    "LinkTraffic",
    "Listener",
    "MemoryCarrier",
    "MemoryNet",
    "Network",
    "NetworkLimits",
    "OnLost",
    "OnMessage",
    "SwarmSecret",
    "TcpCarrier",
    "Ticket",
    "TicketPeer",
    "TicketSecret",
    "TlsCarrier",
    "UnixCarrier",
    "Wire",
    "draw_faults",
    "verified",
]
