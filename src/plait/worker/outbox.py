"""Sending without waiting: a queue for each peer, emptied in order by a task of its own."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from plait.errors import ServingError
from plait.ids import PeerId
from plait.transport import Network
from plait.wire import Buffer, Message

log = logging.getLogger(__name__)


class Outbox:
    """Messages on their way to `network`; what fails is told once to `on_failed`, and the rest for that peer dropped.

    Its users bound what they post: sessions by their windows, everything else by being one message for one received.
    """

    def __init__(self, network: Network, on_failed: Callable[[PeerId, str], None]) -> None:
        self._network = network
        self._on_failed = on_failed
        self._queues: dict[PeerId, deque[tuple[Message, Sequence[Buffer]]]] = {}
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}

    def post(self, peer: PeerId, message: Message, tensors: Sequence[Buffer] = ()) -> None:
        """Send a message after those posted before for this peer; the tensors must not change any more."""
        if peer not in self._queues and self._tried(peer, message, tensors):
            return
        self._queues.setdefault(peer, deque()).append((message, tensors))
        if peer not in self._tasks:
            self._tasks[peer] = asyncio.get_running_loop().create_task(self._send_all(peer))

    def _tried(self, peer: PeerId, message: Message, tensors: Sequence[Buffer]) -> bool:
        try:
            return self._network.try_send(peer, message, tensors)
        except ServingError:
            return False  # told when its turn comes

    async def close(self, flush_s: float = 1.0) -> None:
        """Drop what is not sent after a moment."""
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=flush_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, peer: PeerId) -> None:
        queue = self._queues[peer]
        try:
            while queue:
                message, tensors = queue.popleft()
                await self._network.send(peer, message, tensors)
        except ServingError as error:
            queue.clear()
            self._on_failed(peer, error.message)
        finally:
            del self._tasks[peer]
            if queue:  # posted by `on_failed`
                self._tasks[peer] = asyncio.get_running_loop().create_task(self._send_all(peer))
            else:
                del self._queues[peer]
