"""Messages of membership: signed records, and digests that tell who lacks which."""

from typing import Annotated

from msgspec import Meta

from plait.wire.bounded import Bounded, Count, PeerIdField
from plait.wire.link_messages import Signature

MAX_RECORDS = 64
"""In one message: checking a signature takes about 0.1 ms."""
MAX_RECORD_BYTES = 16 << 10
MAX_DIGEST = 4096


class SignedRecord(Bounded, frozen=True):
    """A `cluster.PeerRecord` as its peer encoded and signed it; passed on byte by byte."""

    body: Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]
    signature: Signature


class RecordVersion(Bounded, frozen=True):
    peer: PeerIdField
    sequence: Count


class Gossip(Bounded, frozen=True, tag="gossip"):
    """Records that the receiver may lack."""

    records: Annotated[tuple[SignedRecord, ...], Meta(max_length=MAX_RECORDS)]


class Digest(Bounded, frozen=True, tag="digest"):
    """All that the sender knows; the receiver answers with what is newer, and with its own digest if asked."""

    versions: Annotated[tuple[RecordVersion, ...], Meta(max_length=MAX_DIGEST)]
    answer: bool


MembershipMessage = Gossip | Digest
