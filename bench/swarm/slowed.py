"""`plait` on a machine that is further away and slower than this one.

    python slowed.py CONDITIONS join TICKET ...         what follows the file is a command line of plait

Three things are put in the place of others, nothing else is changed: the carrier of `tls` links, whose bytes leave
after the one-way time to the machine at the other end, in order, and no faster than the link's rate if it has one; a
span's decoder, whose passes wait, without computing, until they have taken as long as they should; and attending over
lent KV blocks, which waits likewise. So the machine measures and announces rates and round trips, and its sessions
flow, as they would where links are that long and processors that slow.
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import plait.transport
from plait.cli import main
from plait.engine import SequenceChunk, SpanDecoder
from plait.engine.kv_loans import KvLoans
from plait.ids import PeerId
from plait.transport import Link, TlsCarrier
from plait.worker import span_source

sys.path.insert(0, str(Path(__file__).parent.parent))

from swarm.conditions import Conditions

REPORT_S = 2.0


class LongCarrier(TlsCarrier):
    """TLS over TCP, of which each end delays what it sends."""

    conditions: Conditions

    def _accepting(self, accept: Callable[[Link], None]) -> asyncio.BaseProtocol:
        def accepted(link: Link) -> None:
            longer.peer_of = lambda: link.peer  # known once TLS has proved it
            accept(link)

        longer = _Longer(super()._accepting(accepted), self.conditions)
        return longer

    def _dialling(self, link: Link, peer: PeerId) -> asyncio.BaseProtocol:
        longer = _Longer(super()._dialling(link, peer), self.conditions)
        longer.peer_of = lambda: peer
        return longer


class _Longer(asyncio.BufferedProtocol):
    """Gives way to the link's own protocol as soon as there is a transport, which it puts a delay line on."""

    def __init__(self, protocol: asyncio.BaseProtocol, conditions: Conditions) -> None:
        self._protocol = protocol
        self._conditions = conditions
        self.peer_of: Callable[[], PeerId | None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        transport.set_protocol(self._protocol)
        self._protocol.connection_made(DelayLine(transport, self._way))

    def _way(self) -> tuple[float, float | None]:
        peer, given = self.peer_of(), self._conditions
        if peer is None or peer not in given.one_way_s:
            return 0.0, None
        return given.one_way_s[peer], given.bytes_per_s


class DelayLine(asyncio.Transport):
    """A transport on which what is written leaves later, in order; what comes in goes past it.

    `way` says how long bytes take, and how many pass in a second (None: any number).
    """

    def __init__(self, lower: Any, way: Callable[[], tuple[float, float | None]]) -> None:
        super().__init__()
        self._lower = lower
        self._way = way
        self._sent_s = 0.0  # when the last byte so far has been put on the way
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        one_way_s, bytes_per_s = self._way()
        if not one_way_s and bytes_per_s is None and not self._waiting:
            self._lower.write(data)
            return
        self._sent_s = max(self._sent_s, self._loop.time())
        self._sent_s += len(data) / bytes_per_s if bytes_per_s is not None else 0.0
        self._waiting.append((self._sent_s + one_way_s, bytes(data)))
        self._set_timer()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self._closing = True
        if not self._waiting:
            self._lower.close()

    def abort(self) -> None:
        self._closing = True
        self._waiting.clear()
        self._lower.abort()

    def is_closing(self) -> bool:
        return self._closing or self._lower.is_closing()

    def get_write_buffer_size(self) -> int:
        return self._lower.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._lower.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._lower.set_protocol(protocol)

    def pause_reading(self) -> None:
        self._lower.pause_reading()

    def resume_reading(self) -> None:
        self._lower.resume_reading()

    def _set_timer(self) -> None:
        if self._timer is None and self._waiting:
            self._timer = self._loop.call_at(self._waiting[0][0], self._leave)

    def _leave(self) -> None:
        self._timer = None
        # A timer may be a clock tick early.
        due_s = self._loop.time() + 0.0005
        while self._waiting and self._waiting[0][0] <= due_s:
            self._lower.write(self._waiting.popleft()[1])
        self._set_timer()
        if self._closing and not self._waiting:
            self._lower.close()


class SlowDecoder:
    """A decoder whose passes take as long as a slower machine's would; waiting costs no processor time."""

    def __init__(self, decoder: SpanDecoder, conditions: Conditions) -> None:
        self._decoder = decoder
        self._conditions = conditions
        self.spec = decoder.spec
        self.blocks = decoder.blocks
        self.finds_best = decoder.finds_best
        self._passes = 0
        self._late: list[float] = []  # how much longer than they should the passes since the last report took
        self._reported_s = time.monotonic()

    @property
    def best(self) -> Sequence[Sequence[tuple[int, float]]]:
        return self._decoder.best

    def non_finite(self) -> str:
        return self._decoder.non_finite()

    def forward(
        self,
        chunks: Sequence[SequenceChunk],
        store: Any,
        hidden: Tensor | None = None,
        *,
        blocks: range | None = None,
    ) -> Tensor:
        began_s = time.perf_counter()
        result = self._decoder.forward(chunks, store, hidden, blocks=blocks)
        rows = sum(len(chunk.token_ids) for chunk in chunks)
        given = self._conditions
        should_s = len(self.blocks if blocks is None else blocks) * (given.pass_s + given.row_s * rows)
        left_s = began_s + should_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        self._late.append((time.perf_counter() - began_s) / should_s - 1)
        self._report()
        return result

    def _report(self) -> None:
        if time.monotonic() - self._reported_s < REPORT_S:
            return
        self._reported_s = time.monotonic()
        self._passes += len(self._late)
        late = sorted(self._late)
        self._late.clear()
        report = {
            "passes": self._passes,
            "late_fraction_median": late[len(late) // 2],
            "late_fraction_p95": late[int(0.95 * len(late))],
        }
        with Path(self._conditions.passes).open("a") as file:
            file.write(json.dumps(report) + "\n")


def slow_attending(times: float) -> None:
    """Attending over lent blocks takes so many times as long; waiting costs no processor time."""
    attend = KvLoans.attend

    def slowed(self: KvLoans, *arguments: Any, **options: Any) -> Any:
        began_s = time.perf_counter()
        part = attend(self, *arguments, **options)
        time.sleep((times - 1) * (time.perf_counter() - began_s))
        return part

    KvLoans.attend = slowed


def slowed_main() -> None:
    conditions = Conditions.read(Path(sys.argv.pop(1)))
    LongCarrier.conditions = conditions
    plait.transport.TlsCarrier = LongCarrier
    if conditions.attend_times > 1:
        slow_attending(conditions.attend_times)
    load = span_source.load_span_engine

    def load_slowed(*arguments: Any, **options: Any) -> Any:
        engine = load(*arguments, **options)
        if conditions.pass_s or conditions.row_s:
            engine._decoder = SlowDecoder(engine.decoder, conditions)
        return engine

    span_source.load_span_engine = load_slowed
    main()


if __name__ == "__main__":
    slowed_main()
