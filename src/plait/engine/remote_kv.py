# pyright: standard
"""What the engine asks of whoever knows where borrowed KV blocks are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from plait.engine.partial import Partial


@dataclass(frozen=True, slots=True)
class PartialAsk:
    """What a holder is asked: attend `query` [tokens, heads, dim], whose first row is at `position`, over KV blocks.

    `block` is the model's. `kv_blocks` are numbers of the asker's table; `starts` the positions of their first tokens.
    All their tokens come before the query's.
    """

    block: int
    kv_blocks: tuple[int, ...]
    starts: tuple[int, ...]
    position: int
    query: Tensor


class PendingParts(Protocol):
    """Parts that are on their way."""

    def take(self) -> Sequence[Partial]:
        """Wait for them: one for each holder, in the order of their first blocks.

        Raises:
            BlocksLost: a holder is gone, or has the blocks no more.
        """
        ...


class RemoteKv(Protocol):
    """Where borrowed blocks are."""

    def ask(self, asked: PartialAsk) -> PendingParts:
        """Send a query to the holders of these blocks; returns at once."""
        ...
