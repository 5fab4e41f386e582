"""All messages, to bytes and back: msgpack by msgspec, which checks every type and bound while it decodes."""

import msgspec

from plait.errors import BadFrame
from plait.wire.control_messages import ControlMessage
from plait.wire.link_messages import LinkMessage
from plait.wire.loan_messages import LoanMessage
from plait.wire.membership_messages import MembershipMessage
from plait.wire.session_messages import SessionMessage
from plait.wire.weight_messages import WeightMessage

Message = LinkMessage | MembershipMessage | SessionMessage | WeightMessage | LoanMessage | ControlMessage

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode_message(header: bytes) -> Message:
    """The message of a frame's header.

    Raises:
        BadFrame: it is none, or a field is not what its type and bounds allow.
    """
    try:
        return _DECODER.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"what came is not a message: {error}") from None
