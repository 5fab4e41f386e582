"""What the network waits for, and how much it takes."""

from dataclasses import dataclass

from plait.errors import BadSetup
from plait.wire import FrameLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLimits:
    """Times of a live link, and bounds on what others can make this machine keep.

    A peer pings every `heartbeat_s` and is lost after `dead_after_s` without a byte from it. `dial_timeout_s` is for
    one address, `stagger_s` how long the next one waits for the one before; `handshake_timeout_s` for the proofs.
    After a dial that failed, the next one waits `backoff_s`, doubled each time up to `longest_backoff_s`. A peer that
    was cut off is refused for `ban_s`.

    `credit_bytes` is what a peer may have in flight to here, and so the largest frame (`max_frame_bytes` at most, which
    must not be more). `splice_window_bytes` is in flight in one direction of a spliced stream, `max_splices` the
    streams that one link carries. `max_strangers` have not proved themselves yet, at most `max_strangers_per_host` of
    them from one address.
    """

    heartbeat_s: float = 1.0
    dead_after_s: float = 3.0
    dial_timeout_s: float = 3.0
    stagger_s: float = 0.25
    handshake_timeout_s: float = 5.0
    send_timeout_s: float = 10.0
    backoff_s: float = 0.2
    longest_backoff_s: float = 15.0
    ban_s: float = 60.0
    credit_bytes: int = 64 << 20
    max_header_bytes: int = 1 << 20
    max_buffers: int = 64
    max_frame_bytes: int = 32 << 20
    splice_window_bytes: int = 1 << 20
    max_splices: int = 64
    max_strangers: int = 256
    max_strangers_per_host: int = 64

    def __post_init__(self) -> None:
        if self.max_frame_bytes > self.credit_bytes:
            raise BadSetup(
                f"max_frame_bytes is {self.max_frame_bytes}, more than the credit of {self.credit_bytes} bytes"
            )

    @property
    def frames(self) -> FrameLimits:
        return FrameLimits(
            max_header_bytes=self.max_header_bytes,
            max_buffers=self.max_buffers,
            max_bytes=self.max_frame_bytes,
        )
