"""What every message is made of: fields with bounds, checked while they are decoded."""

from typing import Annotated

import msgspec
from msgspec import Meta

from plait.ids import PeerId, SessionId


class Bounded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Base of all messages: frozen, told apart by a tag, sent as an array; a subclass says `frozen=True` and its tag.

    Every field that may grow has a bound in its type, so that a decoded message is a checked one.
    """


PeerIdField = Annotated[PeerId, Meta(pattern=r"^[0-9a-f]{64}\Z")]
SessionIdField = Annotated[SessionId, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A number of things or bytes, or a sequence number."""
Reason = Annotated[str, Meta(max_length=400)]
"""A sentence for a person: it is logged (`printable`), never interpreted."""


def printable(text: str) -> str:
    """What somebody else wrote, on one line of a log."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
