"""Messages of links: who is there, is it alive, how much may be sent, and bytes carried for others.

The handshake is four messages (transport/handshake.py says what they prove):

    dialler   → Hello          versions, identity, nonce, kind of secret
    acceptor  → Challenge      chosen version, nonce; nothing that tells who answers
    dialler   → Proof          of the secret and of the identity
    acceptor  → Welcome        of the same, and the swarm's key for a newcomer with a ticket
"""

from typing import Annotated

from msgspec import Meta

from plait.wire.bounded import Bounded, Count, PeerIdField, Reason

LINK_VERSION = 1
"""Version of the messages spoken after the handshake; the layout of frames has its own."""
NONCE_BYTES = 32

Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Mac = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Version = Annotated[int, Meta(ge=1, le=255)]
SpliceId = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class Hello(Bounded, frozen=True, tag="hello"):
    """Opens a handshake.

    `incarnation` is drawn when a process starts. `last_link` names the link that the dialler last had with the
    acceptor (zeros: none): the acceptor tells by it a redial from two dials that crossed. `ticket_expires_unix_s` says
    whose secret is to be proved: 0 for the swarm's own, otherwise that of the ticket that expires then.
    """

    first_version: Version
    last_version: Version
    peer: PeerIdField
    nonce: Nonce
    incarnation: Nonce
    last_link: Nonce
    ticket_expires_unix_s: Count


class Challenge(Bounded, frozen=True, tag="challenge"):
    version: Version
    nonce: Nonce


class Proof(Bounded, frozen=True, tag="proof"):
    mac: Mac
    signature: Signature


class Welcome(Bounded, frozen=True, tag="welcome"):
    """`grant` is the swarm's key, sealed under the ticket's; empty for a dialler that has it."""

    incarnation: Nonce
    mac: Mac
    signature: Signature
    grant: Annotated[bytes, Meta(max_length=128)]


class Ping(Bounded, frozen=True, tag="ping"):
    number: Count


class Pong(Bounded, frozen=True, tag="pong"):
    """`delayed`: it stands behind a long frame, so that its time says nothing of the way."""

    number: Count
    delayed: bool


class Credit(Bounded, frozen=True, tag="credit"):
    """The receiver may be sent so many bytes more."""

    size_bytes: Count


class Goodbye(Bounded, frozen=True, tag="goodbye"):
    """The sender closes this link, and why."""

    reason: Reason


class Probe(Bounded, frozen=True, tag="probe"):
    """Brings one buffer to be thrown away: how soon its credit comes back is the bandwidth."""


class SpliceOpen(Bounded, frozen=True, tag="splice_open"):
    """To the member in the middle: carry bytes between the sender and `peer`."""

    splice: SpliceId
    peer: PeerIdField


class SpliceOffer(Bounded, frozen=True, tag="splice_offer"):
    """From the member in the middle: `peer`, as far as that member knows, wants to exchange bytes."""

    splice: SpliceId
    peer: PeerIdField


class SpliceAccept(Bounded, frozen=True, tag="splice_accept"):
    splice: SpliceId


class SpliceBytes(Bounded, frozen=True, tag="splice_bytes"):
    """One buffer: the next bytes of the stream."""

    splice: SpliceId


class SpliceCredit(Bounded, frozen=True, tag="splice_credit"):
    """The other end has read so many bytes."""

    splice: SpliceId
    size_bytes: Count


class SpliceClose(Bounded, frozen=True, tag="splice_close"):
    splice: SpliceId
    reason: Reason


HandshakeMessage = Hello | Challenge | Proof | Welcome
SpliceMessage = SpliceOpen | SpliceOffer | SpliceAccept | SpliceBytes | SpliceCredit | SpliceClose
LinkMessage = HandshakeMessage | Ping | Pong | Credit | Goodbye | Probe | SpliceMessage
