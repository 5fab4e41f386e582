"""API keys: high-entropy tokens of which the server knows only hashes."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence

KEY_PREFIX = "sk-plait-"


def new_api_key() -> str:
    """A fresh key with 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_api_key(key: str) -> str:
    """The form in which a key is stored.

    One SHA-256 is enough for keys that nobody can guess; a slow hash protects passwords, which people choose.
    """
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_known_key(key: str, hashes: Sequence[str]) -> bool:
    """Whether a key is one of those stored; the time taken tells nothing about them."""
    given = hash_api_key(key)
    known = False
    for stored in hashes:
        known |= hmac.compare_digest(given, stored)
    return known


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in `Authorization: Bearer` (OpenAI's clients) or `x-api-key` (Anthropic's)."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("utf-8", "surrogateescape").partition(" ")
            if scheme.lower() == "bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and value.strip():
            return value.decode("utf-8", "surrogateescape").strip()
    return None
