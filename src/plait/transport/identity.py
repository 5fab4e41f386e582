"""Who a machine is in a swarm: an ed25519 key pair, kept in a file that only its owner reads."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from plait.errors import BadSetup
from plait.ids import PeerId


class Identity:
    """A private key; `peer` is its public half."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.key = key
        self.peer = peer_of(key.public_key())

    def __repr__(self) -> str:
        return f"Identity({self.peer})"

    @classmethod
    def make(cls) -> Self:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The same identity for the same 32 bytes: for simulations."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_make(cls, file: Path) -> Self:
        """The identity in a file (PEM, PKCS 8, mode 0600), which is written first if there is none.

        Raises:
            BadSetup: the file cannot be read or written, others may read it, or it holds something else.
        """
        pem = load_or_make_secret(file, lambda: _pem(Ed25519PrivateKey.generate()))
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise BadSetup(f"{str(file)!r} holds no ed25519 key; move it away, and a new one is made")
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data)


def peer_of(key: Ed25519PublicKey) -> PeerId:
    return PeerId(key.public_bytes_raw().hex())


def verified(peer: PeerId, signature: bytes, data: bytes) -> bool:
    """Whether `peer` signed these bytes."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(peer)).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_or_make_secret(file: Path, make: Callable[[], bytes]) -> bytes:
    """What a file of mode 0600 holds; written first, whole or not at all, if it is not there.

    Raises:
        BadSetup: it cannot be read or written, or others may read it.
    """
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(descriptor, "wb") as writing:
                    writing.write(make())
                # Of two processes that both found nothing, one makes the file and the other reads it.
                with suppress(FileExistsError):
                    file.hardlink_to(draft)
            finally:
                draft.unlink()
        if os.name == "posix" and file.stat().st_mode & 0o077:
            raise BadSetup(f"{str(file)!r} can be read by others; chmod 600 it")
        return file.read_bytes()
    except OSError as error:
        raise BadSetup(f"{str(file)!r} cannot be read or written: {error.strerror}") from None


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
