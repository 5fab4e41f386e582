"""What was computed for one request and its reader has not taken yet."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from plait.errors import ServingError
from plait.session import RequestDelta, merge_deltas


@dataclass(slots=True)
class RequestStream:
    """Deltas on their way to one reader, and the error that ends them, if one does.

    Bounded by the request itself: its deltas hold at most its own tokens.
    """

    items: deque[RequestDelta | ServingError] = field(default_factory=deque[RequestDelta | ServingError])
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: RequestDelta | ServingError) -> None:
        self.items.append(item)
        self.arrived.set()

    async def take(self) -> RequestDelta | ServingError:
        """What has arrived, waiting for something; a reader that fell behind gets its deltas as one."""
        while not self.items:
            self.arrived.clear()
            await self.arrived.wait()
        first = self.items.popleft()
        if not self.items or isinstance(first, ServingError):
            return first
        deltas = [first]
        while self.items and isinstance(following := self.items[0], RequestDelta):
            deltas.append(following)
            self.items.popleft()
        return merge_deltas(deltas)
