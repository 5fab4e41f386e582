"""How much a step may do, and what happens when blocks run out."""

from dataclasses import dataclass
from typing import Literal

from plait.errors import BadSetup

Preemption = Literal["recompute", "swap", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """Bounds on a step and on the queues.

    `step_tokens`: tokens computed in one step.
    `max_running_sequences`: sequences admitted at once; a request counts with its full fan-out from the
    start.
    `max_waiting`: requests queued before further ones are refused.
    `long_prefill_tokens`: the most that one prompt takes of a step, so that several advance together
    (None: all).
    `watermark_fraction`: part of the pool that admission leaves free, so that those running can grow a while.
    `preemption`: how blocks are taken back. `recompute` drops them, `swap` copies them to host memory,
    `auto` recomputes single sequences (never much dearer than copying) and swaps groups: Kwon et al.
    2023, section 4.5.
    `borrowable_blocks`: KV blocks that other machines may lend, so that requests larger than the pool can run.
    """

    step_tokens: int = 2048
    max_running_sequences: int = 256
    max_waiting: int = 1024
    long_prefill_tokens: int | None = None
    watermark_fraction: float = 0.01
    preemption: Preemption = "auto"
    borrowable_blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("step_tokens", "max_running_sequences", "max_waiting", "long_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadSetup(f"{name} must be at least 1, not {value}")
        if self.borrowable_blocks < 0:
            raise BadSetup(f"borrowable_blocks must be at least 0, not {self.borrowable_blocks}")
        if not 0 <= self.watermark_fraction < 1:
            raise BadSetup(
                f"watermark_fraction must be at least 0 and below 1, not {self.watermark_fraction}"
            )
        if self.preemption not in ("recompute", "swap", "auto"):
            raise BadSetup(f"preemption must be 'recompute', 'swap' or 'auto', not {self.preemption!r}")

    @property
    def admissible_sequences(self) -> int:
        """Sequences that may be admitted at once.

        Never more than a step has tokens: then every decoding sequence fits in every step, and none has to
        take turns.
        """
        return min(self.max_running_sequences, self.step_tokens)
