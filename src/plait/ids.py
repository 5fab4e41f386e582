"""Identifiers: each kind has its own type."""

from typing import NewType

RequestId = NewType("RequestId", str)
PeerId = NewType("PeerId", str)
"""A machine's identity in a swarm: its ed25519 public key in lower-case hex, 64 characters."""
SessionId = NewType("SessionId", str)
"""One sequence being generated over a chain of workers: 32 hex characters."""
