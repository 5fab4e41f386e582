"""Identifiers: each kind has its own type."""

from typing import NewType

RequestId = NewType("RequestId", str)
