"""Answers kept for a while, so that the next request can go on from one by its id."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plait.errors import NotFound

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 2**20
TTL_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """An answer as clients see it, and the conversation up to and including it."""

    response: Mapping[str, Any]
    messages: tuple[dict[str, Any], ...]
    size_bytes: int
    """Of what this answer added: earlier messages are shared with their own entries."""


class ResponseStore:
    """The latest answers in memory, bounded in number, size and age; the oldest leave first."""

    def __init__(
        self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES, ttl_s: float = TTL_S
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[str, tuple[float, StoredResponse]] = OrderedDict()
        self._bytes = 0

    def put(self, stored: StoredResponse, now_s: float) -> None:
        """Keep an answer; one that alone exceeds the bound is not kept."""
        self._forget_old(now_s)
        self._entries[stored.response["id"]] = (now_s, stored)
        self._bytes += stored.size_bytes
        while len(self._entries) > self._max_responses or self._bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def get(self, id: str, now_s: float) -> StoredResponse:
        """Look up an answer.

        Raises:
            NotFound: it was never kept, or has left.
        """
        self._forget_old(now_s)
        if id not in self._entries:
            raise NotFound(
                f"no response {id!r} is stored here; they stay in memory, for {self._ttl_s:.0f} s, and "
                "only if store is not false: send the whole conversation as input",
                param="previous_response_id",
            )
        return self._entries[id][1]

    def delete(self, id: str, now_s: float) -> None:
        """Forget an answer.

        Raises:
            NotFound: it is not here.
        """
        self.get(id, now_s)
        self._remove(id)

    def _forget_old(self, now_s: float) -> None:
        while self._entries:
            id, (kept_s, _) = next(iter(self._entries.items()))
            if kept_s + self._ttl_s > now_s:
                return
            self._remove(id)

    def _remove(self, id: str) -> None:
        _, stored = self._entries.pop(id)
        self._bytes -= stored.size_bytes
