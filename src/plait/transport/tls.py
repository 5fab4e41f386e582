"""TLS 1.3 with both sides pinned to their ed25519 identities, over any asyncio transport.

Python's ssl can ask a client for a certificate only if it has an authority to check it against, and cannot be given a
check of its own. So every member signs its own certificate with the key of a "door" authority, which each derives from
what members and ticket holders share (ticket.py). OpenSSL then demands and verifies such a certificate on both sides,
and that its holder has the identity's private key; the key in the certificate then *is* the peer's id: the dialler
compares it with the one it meant to reach, the acceptor reports it. Nobody outside the swarm gets as far as a frame,
and nobody inside can be another member. Certificates have no end of validity, since machines' clocks differ: tickets
expire elsewhere (handshake.py).

No sessions are resumed, so every link proves everything anew. The record layer works on memory (ssl.MemoryBIO) and not
on a socket, because a spliced stream is secured in the same way: the member in the middle sees what a router sees.
Received tensors are decrypted straight into their buffers.
"""

import asyncio
import datetime
import os
import secrets
import ssl
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

from plait.errors import PeerLost
from plait.ids import PeerId
from plait.transport.identity import Identity, peer_of
from plait.transport.link import Link
from plait.transport.ticket import derive

_CIPHER_BYTES = 1 << 16  # one read: four records
_SLICE_BYTES = 1 << 18  # encrypted at a time, so that a long tensor is never there twice
_ALWAYS = (datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59))
_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plait")])


class TlsContexts:
    """One machine's side of every TLS link of one swarm."""

    def __init__(self, identity: Identity, door: bytes) -> None:
        authority = Ed25519PrivateKey.from_private_bytes(derive(door, "tls authority"))
        certificate = _certificate(authority.public_key(), authority, is_authority=True)
        own = _certificate(identity.key.public_key(), authority, is_authority=False)
        self._dialling = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, own, identity.key)
        self._accepting = _context(ssl.PROTOCOL_TLS_SERVER, certificate, own, identity.key)
        self._accepting.num_tickets = 0

    def dial(self, link: Link, peer: PeerId) -> "TlsTransport":
        """The protocol to be put on a transport that leads to `peer`; it opens the link when that is proved."""
        return TlsTransport(link, self._dialling, peer)

    def accept(self, link: Link) -> "TlsTransport":
        """The same for whoever dialled; the link then says who it is."""
        return TlsTransport(link, self._accepting, None)


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """Below, the protocol of a transport that carries ciphertext; above, the transport of a link."""

    def __init__(self, link: Link, context: ssl.SSLContext, expected: PeerId | None) -> None:
        super().__init__()
        self._link = link
        self._expected = expected
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_side=expected is None)
        self._cipher = memoryview(bytearray(_CIPHER_BYTES))
        self._lower: asyncio.Transport | None = None
        self._open = False
        self._reading_paused = False
        self._closing = False

    # -- the protocol of the transport below ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._lower = cast(asyncio.Transport, transport)  # uvloop's are not subclasses
        self._link.attach(self)
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._cipher

    def buffer_updated(self, nbytes: int) -> None:
        self._received.write(self._cipher[:nbytes])
        self._advance()

    def eof_received(self) -> None:
        self._link.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._link.connection_lost(exc)

    def pause_writing(self) -> None:
        self._link.pause_writing()

    def resume_writing(self) -> None:
        self._link.resume_writing()

    # -- the transport of the link above -------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        view = memoryview(data)
        try:
            for start in range(0, len(view), _SLICE_BYTES):
                part = view[start : start + _SLICE_BYTES]
                while part:
                    part = part[self._tls.write(part) :]
                self._flush()
        except ssl.SSLError as error:
            self._broken(error)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def get_write_buffer_size(self) -> int:
        return 0 if self._lower is None else self._lower.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reading_paused = True
        assert self._lower is not None
        self._lower.pause_reading()

    def resume_reading(self) -> None:
        self._reading_paused = False
        assert self._lower is not None
        self._lower.resume_reading()
        asyncio.get_running_loop().call_soon(self._advance)

    def close(self) -> None:
        if self._closing or self._lower is None:
            return
        self._closing = True
        with suppress(
            ssl.SSLError
        ):  # it waits for the other side's goodbye, or is not open yet: ours is enough
            self._tls.unwrap()
        self._flush()
        self._lower.close()

    def abort(self) -> None:
        self._closing = True
        if self._lower is not None:
            self._lower.abort()

    # -- the record layer ------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Go on with the handshake, or hand on what can be decrypted."""
        if self._closing:
            return
        try:
            if not self._open:
                self._tls.do_handshake()
                self._check_peer()
                self._open = True
                self._flush()
                self._link.connection_made(self)
            while not self._reading_paused and not self._closing:
                buffer = self._link.get_buffer(-1)
                count = cast(int, self._tls.read(len(buffer), buffer))  # with a buffer it returns a count
                if count == 0:
                    self._end()
                    return
                self._link.buffer_updated(count)
                if not self._received.pending and not self._tls.pending():
                    self._flush()
                    return  # nothing is left: to be told so by an exception takes longer than a record
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLZeroReturnError:
            self._end()
        except (ssl.SSLError, PeerLost) as error:
            self._broken(error)

    def _check_peer(self) -> None:
        encoded = self._tls.getpeercert(binary_form=True)
        assert encoded is not None, "both contexts demand a certificate"
        try:
            key = x509.load_der_x509_certificate(encoded).public_key()
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise PeerLost("its certificate has no ed25519 key")
        peer = peer_of(key)
        if self._expected is not None and peer != self._expected:
            raise PeerLost(f"another peer answers there: {peer}")
        self._link.peer = peer

    def _flush(self) -> None:
        if self._to_send.pending and self._lower is not None:
            self._lower.write(self._to_send.read())

    def _end(self) -> None:
        self._link.eof_received()
        self.close()

    def _broken(self, error: ssl.SSLError | PeerLost) -> None:
        self._flush()  # the alert
        self._closing = True
        reason = f"TLS: {error.reason or error}" if isinstance(error, ssl.SSLError) else error.message
        self._link.connection_lost(PeerLost(reason))
        if self._lower is not None:
            self._lower.close()


def _certificate(
    key: Ed25519PublicKey, authority: Ed25519PrivateKey, *, is_authority: bool
) -> x509.Certificate:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    uses = x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        **dict.fromkeys(
            (
                *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
                *("crl_sign", "encipher_only", "decipher_only"),
            ),
            False,
        ),
    )
    return (
        x509.CertificateBuilder()
        .subject_name(_NAME if is_authority else x509.Name([]))
        .issuer_name(_NAME)
        .public_key(key)
        .serial_number(1 if is_authority else x509.random_serial_number())
        .not_valid_before(_ALWAYS[0])
        .not_valid_after(_ALWAYS[1])
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), True)
        .add_extension(uses, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(identifier, False)
        .sign(authority, None)
    )


def _context(
    protocol: int, authority: x509.Certificate, own: x509.Certificate, key: Ed25519PrivateKey
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is compared, not a name
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=authority.public_bytes(Encoding.DER))
    # Python reads a private key from a file only: one of mode 0600, under a password of this moment, gone at once.
    password = secrets.token_hex(32)
    encryption = BestAvailableEncryption(password.encode())
    pem = own.public_bytes(Encoding.PEM) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    descriptor, file = tempfile.mkstemp(suffix=".pem")
    try:
        with open(descriptor, "wb") as writing:
            writing.write(pem)
        context.load_cert_chain(file, password=password)
    finally:
        os.unlink(file)
    return context
