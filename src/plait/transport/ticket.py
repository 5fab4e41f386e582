"""Who may join: the swarm's secret, and tickets that let somebody in until they expire.

The secret of a swarm is 32 random bytes. From it follow, each by HMAC-SHA256, so that none tells another:

    door          known to members and to holders of any ticket. It makes the certificate authority that both ends of
                  a TLS link demand (tls.py), so whoever has never had a ticket does not get as far as a first frame.
    ticket key    one for each moment of expiry. A ticket carries it; members derive it from the expiry that a newcomer
                  names, and refuse when that has passed. The holder cannot change the expiry, because the key of
                  another one is another key.

A newcomer proves the ticket's key, once; it is then given the swarm's secret, sealed under the ticket's key and that
handshake (handshake.py), and is a member like the others: it can let others in, and come back when its ticket has
expired. There is no way to take a membership back but a new secret.
"""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from plait.errors import BadSetup
from plait.transport.identity import load_or_make_secret
from plait.wire import PeerIdField

KEY_BYTES = 32
PREFIX = "plait1"
_CHECKSUM_BYTES = 4


def derive(key: bytes, label: str, data: bytes = b"") -> bytes:
    """A key for one purpose: 32 bytes."""
    return hmac.digest(key, f"plait {label}\0".encode() + data, "sha256")


@dataclass(frozen=True, slots=True, repr=False)
class TicketSecret:
    """What the holder of a ticket can prove."""

    door: bytes
    key: bytes
    expires_unix_s: int

    @property
    def swarm(self) -> str:
        return _swarm(self.door)

    def __repr__(self) -> str:
        return f"TicketSecret(swarm {self.swarm}, expires {self.expires_unix_s})"


@dataclass(frozen=True, slots=True, repr=False)
class SwarmSecret:
    """What members have; `swarm` names the swarm, and is no secret."""

    key: bytes

    @classmethod
    def make(cls) -> Self:
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load_or_make(cls, file: Path) -> Self:
        """The secret in a file (mode 0600), which is written first if there is none.

        Raises:
            BadSetup: the file cannot be read or written, others may read it, or it holds something else.
        """
        text = load_or_make_secret(file, lambda: secrets.token_hex(KEY_BYTES).encode() + b"\n")
        try:
            key = bytes.fromhex(text.decode())
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise BadSetup(f"{str(file)!r} holds no swarm's secret; move it away, and a new swarm is made")
        return cls(key)

    def save(self, file: Path) -> None:
        """Keep it for the next start; a file that holds another one is replaced.

        Raises:
            BadSetup: the file cannot be written.
        """
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise BadSetup(f"{str(file)!r} cannot be replaced: {error.strerror}") from None
        load_or_make_secret(file, lambda: self.key.hex().encode() + b"\n")

    @property
    def door(self) -> bytes:
        return derive(self.key, "door")

    @property
    def swarm(self) -> str:
        return _swarm(self.door)

    def for_ticket(self, expires_unix_s: int) -> TicketSecret:
        key = derive(self.key, "ticket", expires_unix_s.to_bytes(8, "little"))
        return TicketSecret(self.door, key, expires_unix_s)

    def __repr__(self) -> str:
        return f"SwarmSecret(swarm {self.swarm})"


def _swarm(door: bytes) -> str:
    return hashlib.sha256(b"plait swarm\0" + door).hexdigest()[:32]


class TicketPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A member to ask: where it can be dialled, or through whom it is reached."""

    peer: PeerIdField
    addresses: Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=16)] = ()
    through: Annotated[tuple[PeerIdField, ...], Meta(max_length=16)] = ()


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    door: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    expires_unix_s: Annotated[int, Meta(ge=1, le=2**40)]
    peers: Annotated[tuple[TicketPeer, ...], Meta(min_length=1, max_length=16)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Lets its holder join until it expires; whoever reads it may join, so it is passed on like a password."""

    secret: TicketSecret
    peers: tuple[TicketPeer, ...]

    @classmethod
    def issue(cls, secret: SwarmSecret, peers: Sequence[TicketPeer], *, expires_unix_s: float) -> Self:
        """A ticket of a swarm; at least one of `peers` should have an address that newcomers can dial."""
        return cls(secret=secret.for_ticket(int(expires_unix_s)), peers=tuple(peers))

    @property
    def text(self) -> str:
        """One word, to be copied."""
        secret = self.secret
        written = msgspec.msgpack.encode(_Written(secret.door, secret.key, secret.expires_unix_s, self.peers))
        return PREFIX + _encoded(_checksum(written) + written)

    @classmethod
    def parse(cls, text: str, *, unix_now_s: float) -> Self:
        """A ticket from its text.

        Raises:
            BadSetup: it is not a ticket, was not copied whole, or has expired.
        """
        text = "".join(text.split())
        if not text.startswith(PREFIX):
            raise BadSetup(f"this is not a ticket: a ticket begins with {PREFIX!r}")
        body = text[len(PREFIX) :]
        try:
            decoded = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            checksum, written = decoded[:_CHECKSUM_BYTES], decoded[_CHECKSUM_BYTES:]
            if checksum != _checksum(written) or _encoded(decoded) != body:
                raise ValueError
            fields = msgspec.msgpack.decode(written, type=_Written)
        except ValueError:  # msgspec's errors are ValueErrors too
            raise BadSetup("this ticket was not copied whole; copy the line again") from None
        if fields.expires_unix_s <= unix_now_s:
            ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(fields.expires_unix_s))
            raise BadSetup(f"this ticket expired at {ended}; ask a member of the swarm for a new one")
        return cls(
            secret=TicketSecret(fields.door, fields.key, fields.expires_unix_s),
            peers=fields.peers,
        )


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _checksum(written: bytes) -> bytes:
    return hashlib.sha256(written).digest()[:_CHECKSUM_BYTES]
