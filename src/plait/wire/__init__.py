"""What travels between machines: frames, messages and hidden states, as bytes and back; no I/O.

frame.py                prefix, header and raw buffers; a reader that takes bytes in any pieces
messages.py             the union of all messages, and its codec
link_messages.py        handshake, liveness, credits, splices
membership_messages.py  signed records and digests
session_messages.py     sessions over a chain
bounded.py              what every message is made of
hidden.py               hidden states in float32, bfloat16 or block-wise int8
"""

from plait.wire.bounded import Bounded, Count, PeerIdField, Reason, SessionIdField
from plait.wire.frame import (
    FRAME_VERSION,
    Buffer,
    Frame,
    FrameLimits,
    FrameReader,
    encode_frame,
    frame_bytes,
)
from plait.wire.hidden import HiddenFormat, decode_hidden, encode_hidden, hidden_bytes
from plait.wire.link_messages import (
    LINK_VERSION,
    NONCE_BYTES,
    Challenge,
    Credit,
    Goodbye,
    HandshakeMessage,
    Hello,
    LinkMessage,
    Ping,
    Pong,
    Probe,
    Proof,
    SpliceAccept,
    SpliceBytes,
    SpliceClose,
    SpliceCredit,
    SpliceMessage,
    SpliceOpen,
    Welcome,
)
from plait.wire.membership_messages import (
    MAX_DIGEST,
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    Digest,
    Gossip,
    MembershipMessage,
    RecordVersion,
    SignedRecord,
)
from plait.wire.messages import Message, decode_message, encode_message
from plait.wire.session_messages import CloseSession, SessionMessage

__all__ = [
    "FRAME_VERSION",
    "LINK_VERSION",
    "MAX_DIGEST",
    "MAX_RECORDS",
    "MAX_RECORD_BYTES",
    "NONCE_BYTES",
    "Bounded",
    "Buffer",
    "Challenge",
    "CloseSession",
    "Count",
    "Credit",
    "Digest",
    "Frame",
    "FrameLimits",
    "FrameReader",
    "Goodbye",
    "Gossip",
    "HandshakeMessage",
    "Hello",
    "HiddenFormat",
    "LinkMessage",
    "MembershipMessage",
    "Message",
    "PeerIdField",
    "Ping",
    "Pong",
    "Probe",
    "Proof",
    "Reason",
    "RecordVersion",
    "SessionIdField",
    "SessionMessage",
    "SignedRecord",
    "SpliceAccept",
    "SpliceBytes",
    "SpliceClose",
    "SpliceCredit",
    "SpliceMessage",
    "SpliceOpen",
    "Welcome",
    "decode_hidden",
    "decode_message",
    "encode_frame",
    "encode_hidden",
    "encode_message",
    "frame_bytes",
    "hidden_bytes",
]
