"""A network whose owner does not send what it should: twice, late, never, old things, or nonsense.

Streams lose, repeat and reorder nothing; programs do. What sessions promise ("executed once") they promise for these.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np

from plait.errors import PeerLost
from plait.ids import PeerId
from plait.transport import Network
from plait.wire import Buffer, Message, Step, Tokens

Mischief = Literal["duplicate", "replay", "reorder", "lose", "lie"]
_FREQUENCY: dict[Mischief, float] = {
    "duplicate": 0.5,
    "replay": 0.3,
    "reorder": 0.15,
    "lose": 0.1,
    "lie": 0.5,
}
_OLD_MESSAGES = 64
_LATE_S = 0.3

Sent = tuple[PeerId, Message, Sequence[Buffer]]


class FaultyNetwork(Network):
    """A `Network` that does what it should while `mischief` is empty; `rng` draws which messages suffer.

    `on_send` sees what its owner sends, `on_drop` whom its owner cuts off.
    """

    rng: np.random.Generator
    on_send: Callable[[PeerId, Message], None]
    on_drop: Callable[[PeerId, str], None]
    mischief: frozenset[Mischief] = frozenset()

    def attend(
        self,
        rng: np.random.Generator,
        on_send: Callable[[PeerId, Message], None],
        on_drop: Callable[[PeerId, str], None],
    ) -> None:
        """Before it is entered."""
        self.rng, self.on_send, self.on_drop = rng, on_send, on_drop
        self._old: deque[Sent] = deque(maxlen=_OLD_MESSAGES)
        self._late: set[asyncio.Task[None]] = set()

    async def send(
        self,
        peer: PeerId,
        message: Message,
        tensors: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
    ) -> None:
        self.on_send(peer, message)
        if not self.mischief:
            await super().send(peer, message, tensors, timeout_s=timeout_s)
            return
        for spoilt in self._spoilt((peer, message, tensors)):
            await super().send(*spoilt, timeout_s=timeout_s)

    def try_send(self, peer: PeerId, message: Message, tensors: Sequence[Buffer] = ()) -> bool:
        if self.mischief:
            return False
        if not super().try_send(peer, message, tensors):
            return False
        self.on_send(peer, message)
        return True

    async def drop(self, peer: PeerId, reason: str) -> None:
        self.on_drop(peer, reason)
        await super().drop(peer, reason)

    async def __aexit__(self, *error: object) -> None:
        for task in self._late:
            task.cancel()
        await super().__aexit__(None, None, None)

    def _spoilt(self, sent: Sent) -> list[Sent]:
        """What is sent instead, in order."""
        self._old.append(sent)
        out = [sent]
        if self._strikes("duplicate"):
            out = out * 2
        if self._strikes("replay"):
            out = [self._old[int(self.rng.integers(len(self._old)))], *out]
        if self._strikes("lie"):
            out = [self._lied(each) for each in out]
        if self._strikes("lose"):
            return []
        if self._strikes("reorder"):
            late = asyncio.get_running_loop().create_task(self._send_late(out))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
            return []
        return out

    def _strikes(self, mischief: Mischief) -> bool:
        return mischief in self.mischief and bool(self.rng.random() < _FREQUENCY[mischief])

    async def _send_late(self, messages: Sequence[Sent]) -> None:
        await asyncio.sleep(float(self.rng.uniform(0, _LATE_S)))
        for sent in messages:
            try:
                await super().send(*sent)
            except PeerLost:
                return

    def _lied(self, sent: Sent) -> Sent:
        """Something of the message is what cannot be."""
        peer, message, tensors = sent
        replace = msgspec.structs.replace
        match message:
            case Step():
                rows = np.frombuffer(b"".join(tensors), np.float32).copy() if tensors else None
                match int(self.rng.integers(5)), rows:
                    case 0, np.ndarray():
                        rows[int(self.rng.integers(len(rows)))] = np.nan
                        return peer, message, (rows.tobytes(),)
                    case 1, np.ndarray():
                        rows[-1] = np.inf
                        return peer, message, (rows.tobytes(),)
                    case 2, np.ndarray():
                        return peer, message, (rows[:-1].tobytes(),)
                    case 3, _:
                        return peer, replace(message, start=message.start + 10**4), tensors
                    case _:
                        return peer, replace(message, token_ids=(10**6, *message.token_ids[1:])), tensors
            case Tokens():
                match int(self.rng.integers(3)):
                    case 0:
                        return peer, replace(message, position=message.position + 10**4), tensors
                    case 1:
                        return peer, replace(message, token_ids=(10**6, *message.token_ids[1:])), tensors
                    case _:
                        return peer, replace(message, finished="" if message.finished else "stop"), tensors
            case _:
                return sent
