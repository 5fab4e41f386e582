"""A link to a peer that has proved itself: liveness, credits, order, estimates.

Every frame but those of the link itself (pings, credits, goodbyes) is charged to the receiver's credit: it says at the
beginning how many bytes may be on their way to it, and gives back what it has taken. A sender waits in one queue, so
messages arrive in the order in which they were sent, and what is in flight is bounded at both ends. Whoever sends more
than it may, or reads so little that answers pile up, is cut off.

Silence is counted in ticks of this end's own clock that really happened, not in seconds: a machine that was frozen or
busy itself reads what has come in the meantime before it judges the others.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plait.errors import BadFrame, PeerLost, ServingError
from plait.ids import PeerId
from plait.transport.estimate import LEAST_RTT_S, LEAST_TRANSFER_S, MEASURED_BYTES, LinkEstimate
from plait.transport.handshake import Greeted
from plait.transport.limits import NetworkLimits
from plait.transport.link import Link
from plait.transport.traffic import LinkTraffic
from plait.wire import (
    Buffer,
    Challenge,
    Credit,
    Frame,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Probe,
    Proof,
    Welcome,
    decode_message,
    encode_message,
    frame_bytes,
    printable,
)

TICKS_PER_HEARTBEAT = 4
_MAX_UNANSWERED_PINGS = 16
_MAX_PILED_BYTES = 1 << 18
"""Beyond the credit: pongs and credits that the other end does not read."""
_MAX_CREDIT_BYTES = 1 << 40


@dataclass(slots=True)
class Outgoing:
    """A message that waits for a link, for credit or for room; `sent` is told when the link has taken it."""

    header: bytes
    buffers: Sequence[Buffer]
    size_bytes: int
    sent: "asyncio.Future[None] | None"

    def fail(self, error: ServingError) -> None:
        if self.sent is not None and not self.sent.done():
            self.sent.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Measured:
    """A long frame in flight: when it was sent, and how many bytes had been sent in all after it."""

    sent_s: float
    size_bytes: int
    end_bytes: int


class Connection:
    """One live link: `greeted` says whose, `dialled` whether this end made it, `middle` who carries it, if anybody.

    `queue` holds what waits to be sent, some of it since before there was a link.
    """

    def __init__(
        self,
        link: Link,
        greeted: Greeted,
        *,
        dialled: bool,
        middle: PeerId | None,
        queue: deque[Outgoing],
        limits: NetworkLimits,
        estimate: LinkEstimate,
    ) -> None:
        self.link = link
        self.greeted = greeted
        self.peer = greeted.peer
        self.dialled = dialled
        self.middle = middle
        self.estimate = estimate
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        # Sending.
        self._credit_bytes = 0
        self._window_bytes = 0  # the most credit there has been: no frame can be longer
        self._queue = queue
        self._sent_bytes = 0
        self._returned_bytes = 0
        self._measured: deque[_Measured] = deque()
        self._measured_until_s = 0.0
        self._all_measured = asyncio.Event()
        # Receiving.
        self._granted_bytes = limits.credit_bytes
        self._taken_bytes = 0
        # Liveness.
        self._ticks = 0
        self._silent_ticks = 0
        self.missed_heartbeats = 0
        """Heartbeats of the other end that were due and did not come."""
        self._seen_bytes = -1
        self._pings: dict[int, float] = {}
        self._least_rtt_s = math.inf
        link.limits = limits.frames
        link.on_writable = self.flush
        link.write(encode_message(Credit(limits.credit_bytes)))
        self._ping()

    # -- sending ---------------------------------------------------------------------------------------------

    def send_now(self, header: bytes, buffers: Sequence[Buffer], size_bytes: int) -> bool:
        """Send if nobody waits and there is room for it; whether it was sent."""
        if self._queue or size_bytes > self._credit_bytes or not self.link.writable or self.link.closed:
            return False
        self._write(header, buffers, size_bytes)
        return True

    def post(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        """The same without waiting: it is sent when it can be. What posts must bound how much it posts."""
        size_bytes = frame_bytes(len(header), [memoryview(buffer).nbytes for buffer in buffers])
        if not self.link.closed:
            self._queue.append(Outgoing(header, buffers, size_bytes, None))
            self.flush()

    @property
    def traffic(self) -> LinkTraffic:
        """What has passed over it."""
        return LinkTraffic(
            sent_bytes=self.link.sent_bytes,
            received_bytes=self.link.received_bytes,
            missed_heartbeats=self.missed_heartbeats,
        )

    @property
    def queued_frames(self) -> int:
        """Frames that wait for credit or for the link."""
        return len(self._queue)

    def goodbye(self, reason: str) -> None:
        """Tell the other end why this one leaves."""
        if not self.link.closed:
            self.link.write(encode_message(Goodbye(reason)))

    def fail(self, error: PeerLost) -> None:
        """Whoever still waits to send learns that it is over."""
        self.link.abort()
        self._all_measured.set()
        while self._queue:
            self._queue.popleft().fail(PeerLost(error.message))

    def _write(self, header: bytes, buffers: Sequence[Buffer], size_bytes: int) -> None:
        self.link.write(header, buffers)
        self._credit_bytes -= size_bytes
        self._sent_bytes += size_bytes
        if size_bytes >= MEASURED_BYTES:
            self._measured.append(_Measured(self._loop.time(), size_bytes, self._sent_bytes))
            self._all_measured.clear()

    def flush(self) -> None:
        """Send what can be sent from the head of the queue; one that the other end will never take fails."""
        while self._queue and not self.link.closed:
            head = self._queue[0]
            if self._window_bytes and head.size_bytes > self._window_bytes:
                self._queue.popleft()
                text = f"a message of {head.size_bytes} bytes; {self.peer[:8]} takes {self._window_bytes} at most"
                head.fail(BadFrame(text))
                continue
            if head.size_bytes > self._credit_bytes or not self.link.writable:
                return
            self._queue.popleft()
            self._write(head.header, head.buffers, head.size_bytes)
            if head.sent is not None and not head.sent.done():
                head.sent.set_result(None)

    # -- receiving -------------------------------------------------------------------------------------------

    async def run(self, deliver: Callable[[Message, tuple[memoryview, ...]], None]) -> None:
        """Hand everything that is not for the link itself to `deliver`, in order, until the link ends.

        Raises:
            PeerLost: the link is closed, or the other end says goodbye.
            BadFrame: the other end broke the protocol.
        """
        while True:
            frame = await self.link.recv()
            message = decode_message(frame.header)
            match message:
                case Ping(number):
                    self._answer(Pong(number, bool(self._measured)))
                case Pong(number, delayed):
                    self._ponged(number, delayed)
                case Credit(size_bytes):
                    self._credited(size_bytes)
                case Goodbye(reason):
                    raise PeerLost(f"it left: {printable(reason)}")
                case Hello() | Challenge() | Proof() | Welcome():
                    raise BadFrame(f"{type(message).__name__} after the handshake")
                case _:
                    self._charge(frame)
                    deliver(message, frame.buffers)
                    self._take(frame)

    def _charge(self, frame: Frame) -> None:
        self._granted_bytes -= frame.size_bytes
        if self._granted_bytes < 0:
            raise BadFrame(f"it sent {-self._granted_bytes} bytes more than it may")

    def _take(self, frame: Frame) -> None:
        """Give credit back: for a long frame at once, since its sender measures the bandwidth by it."""
        self._taken_bytes += frame.size_bytes
        if frame.size_bytes >= MEASURED_BYTES or self._taken_bytes >= self._limits.credit_bytes // 4:
            self._granted_bytes += self._taken_bytes
            returned, self._taken_bytes = self._taken_bytes, 0
            self._answer(Credit(returned))

    def _answer(self, message: Pong | Credit) -> None:
        if self.link.unsent_bytes > self._limits.max_frame_bytes + _MAX_PILED_BYTES:
            raise BadFrame("it does not read what it is sent")
        if not self.link.closed:
            self.link.write(encode_message(message))

    def _credited(self, size_bytes: int) -> None:
        first = self._window_bytes == 0
        self._credit_bytes += size_bytes
        if self._credit_bytes > _MAX_CREDIT_BYTES:
            raise BadFrame(f"it gives credit for {self._credit_bytes} bytes")
        self._window_bytes = max(self._window_bytes, self._credit_bytes)
        if not first:
            self._returned_bytes += size_bytes
            self._measure()
        self.flush()

    # -- liveness and estimates ------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called `TICKS_PER_HEARTBEAT` times a heartbeat.

        Raises:
            PeerLost: the other end has been silent for too long.
        """
        self._ticks += 1
        if self.link.received_bytes != self._seen_bytes:
            self._seen_bytes = self.link.received_bytes
            self._silent_ticks = 0
        else:
            self._silent_ticks += 1
            # One tick late is only jitter: the other end's clock ticks at other moments.
            self.missed_heartbeats += self._silent_ticks % TICKS_PER_HEARTBEAT == 1 and self._silent_ticks > 1
        silent_s = self._silent_ticks * self._limits.heartbeat_s / TICKS_PER_HEARTBEAT
        if silent_s >= self._limits.dead_after_s:
            raise PeerLost(f"it has been silent for {silent_s:g} s")
        if self._ticks % TICKS_PER_HEARTBEAT == 0 or self._ticks < TICKS_PER_HEARTBEAT:
            self._ping()

    async def probe(self, payload_bytes: int) -> LinkEstimate:
        """Send so many bytes to be thrown away, and wait until they are.

        Raises:
            PeerLost: the link is closed.
        """
        self._all_measured.clear()
        self.post(encode_message(Probe()), [bytes(max(payload_bytes, MEASURED_BYTES))])
        await self._all_measured.wait()
        if self.link.closed:
            raise PeerLost(f"peer {self.peer[:8]} was lost during a probe")
        return self.estimate

    def _ping(self) -> None:
        if len(self._pings) < _MAX_UNANSWERED_PINGS and not self.link.closed:
            # One that stands behind a long frame measures the queue and not the way.
            self._pings[self._ticks] = math.nan if self._measured else self._loop.time()
            self.link.write(encode_message(Ping(self._ticks)))

    def _ponged(self, number: int, delayed: bool) -> None:
        sent_s = self._pings.pop(number, None)
        if sent_s is None:
            raise BadFrame("it answers a ping that it was not sent")
        if not delayed and not math.isnan(sent_s):
            rtt_s = max(self._loop.time() - sent_s, LEAST_RTT_S)
            self._least_rtt_s = min(self._least_rtt_s, rtt_s)
            self.estimate = self.estimate.with_rtt(rtt_s)

    def _measure(self) -> None:
        """The long frames whose credit is back: each had the link for itself since it or the one before was done."""
        now_s = self._loop.time()
        while self._measured and self._measured[0].end_bytes <= self._returned_bytes:
            frame = self._measured.popleft()
            whole_s = now_s - frame.sent_s
            # Without the way of the first byte there and of the credit back, unless the one before hides them.
            way_s = 0.0 if math.isinf(self._least_rtt_s) else self._least_rtt_s
            own_s = now_s - max(frame.sent_s + way_s, self._measured_until_s)
            self._measured_until_s = now_s
            taken_s = max(own_s, whole_s / 20, LEAST_TRANSFER_S)
            self.estimate = self.estimate.with_bandwidth(frame.size_bytes / taken_s)
        if not self._measured:
            self._all_measured.set()
