"""A decided step, as the runner executes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plait.ids import RequestId


class ScheduledChunk(NamedTuple):
    """What one sequence computes in a step: `tokens` of its tokens from position `start` on.

    `samples`: its last known token is among them, so a next one is to be sampled. `kv_blocks` is its
    block table, covering all tokens up to `start + tokens`; read it during the step, the scheduler
    extends it afterwards.
    """

    request_id: RequestId
    sequence: int
    start: int
    tokens: int
    samples: bool
    kv_blocks: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """One forward pass and the copies before it.

    The runner does, in this order: `swap_out` (device block to host block), `swap_in` (host block to device
    block), `copies` (device block to device block), then the chunks in one batch.
    """

    chunks: Sequence[ScheduledChunk]
    copies: tuple[tuple[int, int], ...] = ()
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    admitted: tuple[RequestId, ...] = ()
    preempted: tuple[RequestId, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the forward pass computes."""
        return sum(chunk.tokens for chunk in self.chunks)
