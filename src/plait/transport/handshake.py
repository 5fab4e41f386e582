"""Two ends of a link prove to each other who they are and that they belong to the swarm.

    dialler    Hello(versions, identity, nonce, incarnation, last link, expiry of its ticket or 0)
    acceptor   Challenge(version, nonce)
    dialler    Proof(mac, signature)
    acceptor   Welcome(incarnation, grant, mac, signature)

Both ends hash the bytes of Hello and Challenge, the acceptor's identity and the swarm's name. The dialler's mac (under
the swarm's secret, or its ticket's key) and signature (of its identity) are over that hash and its role; the
acceptor's are over that hash, Proof and what Welcome says. So each proof holds for these two identities, these two
nonces and this conversation only: recorded, it is worth nothing; passed on to somebody else, it names the wrong
acceptor; and nobody can make the ends agree on an older version. Over TLS the identity must also be the one that the
record layer has proved, which binds the proof to that channel.

Until the dialler has proved that it knows a secret, the acceptor says nothing but a random number and the version of
the protocol; a refusal is silence, except for a version. A ticket's key is derived from the expiry that Hello names
(ticket.py), and refused when that has passed.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from plait.errors import PeerLost
from plait.ids import PeerId
from plait.transport.identity import Identity, verified
from plait.transport.link import Link
from plait.transport.ticket import KEY_BYTES, SwarmSecret, TicketSecret, derive
from plait.wire import (
    LINK_VERSION,
    NONCE_BYTES,
    Challenge,
    Goodbye,
    Hello,
    Message,
    Proof,
    Welcome,
    decode_message,
    encode_message,
    printable,
)

NO_LINK = bytes(NONCE_BYTES)
_Kind = TypeVar("_Kind", bound=Message)
_GRANT_NONCE = bytes(12)  # its key seals one thing only


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeted:
    """What an end knows of the other after the handshake. `link_id` is the same at both ends."""

    peer: PeerId
    incarnation: bytes
    link_id: bytes
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A dialler that has proved itself and waits for Welcome."""

    hello: Hello
    transcript: bytes
    proof: bytes
    secret: SwarmSecret | TicketSecret
    version: int


async def greet(
    link: Link,
    acceptor: PeerId,
    *,
    identity: Identity,
    secret: SwarmSecret | TicketSecret,
    incarnation: bytes,
    last_link: bytes,
) -> tuple[Greeted, SwarmSecret | TicketSecret]:
    """The dialler's part; also returns the secret it has from now on.

    Raises:
        PeerLost: the acceptor refuses, is somebody else, or belongs to another swarm.
        BadFrame: what it sends is no part of a handshake.
    """
    expires_unix_s = secret.expires_unix_s if isinstance(secret, TicketSecret) else 0
    hello = encode_message(
        Hello(
            first_version=LINK_VERSION,
            last_version=LINK_VERSION,
            peer=identity.peer,
            nonce=secrets.token_bytes(NONCE_BYTES),
            incarnation=incarnation,
            last_link=last_link,
            ticket_expires_unix_s=expires_unix_s,
        )
    )
    link.write(hello)
    answer = (await link.recv()).header
    challenge = _expect(decode_message(answer), Challenge)
    if challenge.version != LINK_VERSION:
        raise PeerLost(f"it chose version {challenge.version}, which it was not offered")
    transcript = _transcript(hello, answer, acceptor, secret.swarm)
    proof = encode_message(
        Proof(
            mac=_mac(secret, "dialler", transcript),
            signature=identity.sign(_signed("dialler", transcript)),
        )
    )
    link.write(proof)
    welcome = _expect(decode_message((await link.recv()).header), Welcome)
    answered = _answered(transcript, proof, welcome.incarnation, welcome.grant)
    if not hmac.compare_digest(welcome.mac, _mac(secret, "acceptor", answered)):
        raise PeerLost("it does not know the secret of this swarm")
    if not verified(acceptor, welcome.signature, _signed("acceptor", answered)):
        raise PeerLost("it is not the peer that was to be reached")
    if isinstance(secret, TicketSecret):
        secret = _opened(secret, transcript, welcome.grant)
    greeted = Greeted(
        peer=acceptor,
        incarnation=welcome.incarnation,
        link_id=_link_id(answered),
        version=challenge.version,
    )
    return greeted, secret


async def hear(
    link: Link, *, identity: Identity, secret: SwarmSecret | TicketSecret, unix_now_s: float
) -> Heard:
    """The acceptor's part up to the dialler's proof.

    Raises:
        PeerLost: the dialler is refused; the message is for the own log only.
        BadFrame: what it sends is no part of a handshake.
    """
    received = (await link.recv()).header
    hello = _expect(decode_message(received), Hello)
    if not hello.first_version <= LINK_VERSION <= hello.last_version:
        link.write(encode_message(Goodbye(f"this member speaks version {LINK_VERSION} of the protocol")))
        await link.close()
        raise PeerLost(
            f"it speaks versions {hello.first_version} to {hello.last_version} of the protocol, not {LINK_VERSION}"
        )
    challenge = encode_message(Challenge(LINK_VERSION, secrets.token_bytes(NONCE_BYTES)))
    link.write(challenge)
    transcript = _transcript(received, challenge, identity.peer, secret.swarm)
    received_proof = (await link.recv()).header
    proof = _expect(decode_message(received_proof), Proof)
    if not isinstance(secret, SwarmSecret):
        raise PeerLost("this machine has only a ticket yet, and cannot let anybody in")
    claimed: SwarmSecret | TicketSecret = secret
    if hello.ticket_expires_unix_s:
        claimed = secret.for_ticket(hello.ticket_expires_unix_s)
    if not hmac.compare_digest(proof.mac, _mac(claimed, "dialler", transcript)):
        raise PeerLost("it does not know the secret of this swarm")
    if not verified(hello.peer, proof.signature, _signed("dialler", transcript)):
        raise PeerLost("it is not who it claims to be")
    if link.peer not in (None, hello.peer):
        raise PeerLost(f"it claims to be {hello.peer}, and its link is that of {link.peer}")
    if isinstance(claimed, TicketSecret) and claimed.expires_unix_s <= unix_now_s:
        raise PeerLost("its ticket has expired")
    return Heard(
        hello=hello, transcript=transcript, proof=received_proof, secret=claimed, version=LINK_VERSION
    )


def welcome(
    link: Link, heard: Heard, *, identity: Identity, secret: SwarmSecret, incarnation: bytes
) -> Greeted:
    """Let a dialler in that has proved itself.

    Raises:
        PeerLost: the link is closed.
    """
    newcomer = heard.secret
    grant = _sealed(newcomer, heard.transcript, secret) if isinstance(newcomer, TicketSecret) else b""
    answered = _answered(heard.transcript, heard.proof, incarnation, grant)
    link.write(
        encode_message(
            Welcome(
                incarnation=incarnation,
                mac=_mac(newcomer, "acceptor", answered),
                signature=identity.sign(_signed("acceptor", answered)),
                grant=grant,
            )
        )
    )
    return Greeted(
        peer=heard.hello.peer,
        incarnation=heard.hello.incarnation,
        link_id=_link_id(answered),
        version=heard.version,
    )


def _expect(message: Message, kind: type[_Kind]) -> _Kind:
    if isinstance(message, Goodbye):
        raise PeerLost(printable(message.reason))
    if not isinstance(message, kind):
        raise PeerLost(f"it sent {type(message).__name__} where the handshake has {kind.__name__}")
    return message


def _transcript(hello: bytes, challenge: bytes, acceptor: PeerId, swarm: str) -> bytes:
    """The hash of what both ends know before the first proof; every part has a length of its own."""
    return _hash(b"plait handshake", hello, challenge, acceptor.encode(), swarm.encode())


def _answered(transcript: bytes, proof: bytes, incarnation: bytes, grant: bytes) -> bytes:
    return _hash(transcript, proof, incarnation, grant)


def _hash(*parts: bytes) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(4, "little") + part)
    return whole.digest()


def _link_id(answered: bytes) -> bytes:
    return _hash(b"plait link", answered)


def _mac(secret: SwarmSecret | TicketSecret, role: str, transcript: bytes) -> bytes:
    return derive(secret.key, f"handshake {role}", transcript)


def _signed(role: str, transcript: bytes) -> bytes:
    return f"plait handshake {role}\0".encode() + transcript


def _sealed(ticket: TicketSecret, transcript: bytes, secret: SwarmSecret) -> bytes:
    return ChaCha20Poly1305(derive(ticket.key, "grant", transcript)).encrypt(
        _GRANT_NONCE, secret.key, transcript
    )


def _opened(ticket: TicketSecret, transcript: bytes, grant: bytes) -> SwarmSecret:
    try:
        key = ChaCha20Poly1305(derive(ticket.key, "grant", transcript)).decrypt(
            _GRANT_NONCE, grant, transcript
        )
    except InvalidTag:
        key = b""
    secret = SwarmSecret(key)
    if len(key) != KEY_BYTES or secret.swarm != ticket.swarm:
        raise PeerLost("it did not hand over the secret of this swarm")
    return secret
