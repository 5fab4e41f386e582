"""Links that others make: strangers until they have proved themselves, refused without a word if they cannot."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from plait.errors import ServingError
from plait.ids import PeerId
from plait.transport.credentials import Credentials
from plait.transport.handshake import Greeted, Heard
from plait.transport.limits import NetworkLimits
from plait.transport.link import Link, LinkClosed
from plait.transport.splice import SpliceTransport

log = logging.getLogger(__name__)

_MAX_TOLD = 1024
"""Refusals that are remembered, so that each is logged once."""


class Doorkeeper:
    """`decide` refuses who has proved itself and is not to be linked even so; `admit` gets the others.

    Both may raise PeerLost, which refuses.
    """

    def __init__(
        self,
        credentials: Credentials,
        limits: NetworkLimits,
        *,
        decide: Callable[[Heard], Awaitable[None]],
        admit: Callable[[Link, Greeted, PeerId | None], None],
    ) -> None:
        self.strangers: set[Link] = set()
        self._credentials = credentials
        self._limits = limits
        self._decide = decide
        self._admit = admit
        self._told: dict[tuple[str, str], None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, link: Link) -> None:
        """A link that somebody has made."""
        place = _place(link)
        crowd = sum(_place(other) == place for other in self.strangers)
        if len(self.strangers) >= self._limits.max_strangers or crowd >= self._limits.max_strangers_per_host:
            self._refuse(link, "too many links that have not proved themselves")
        else:
            self._hear(link, None)

    def accept_splice(self, claimed: PeerId, middle: PeerId, stream: SpliceTransport) -> None:
        """A stream that `middle` carries for somebody; how many there are is bounded by what a link carries."""
        link = Link(f"splice://{middle}/{claimed}")
        self._hear(link, middle)
        stream.start(self._credentials.tls().accept(link))

    async def close(self) -> None:
        """Turn all strangers away."""
        for link in list(self.strangers):
            link.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _hear(self, link: Link, middle: PeerId | None) -> None:
        self.strangers.add(link)
        task = asyncio.get_running_loop().create_task(self._hear_out(link, middle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hear_out(self, link: Link, middle: PeerId | None) -> None:
        try:
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                await link.opened()
                heard = await self._credentials.hear(link)
                await self._decide(heard)
                greeted = self._credentials.welcome(link, heard)
            self._admit(link, greeted, middle)
        except TimeoutError:
            self._refuse(link, "it did not prove itself in time")
        except LinkClosed as error:
            log.debug("a link from %s: %s", link.name, error.message)
            link.abort()
        except ServingError as error:
            self._refuse(link, error.message)
        except Exception:
            log.exception("a link from %s could not be heard out", link.name)
            link.abort()
        finally:
            self.strangers.discard(link)

    def _refuse(self, link: Link, reason: str) -> None:
        """Close a link without a word; logged once for each place and reason."""
        link.abort()
        place = _place(link)
        if (place, reason) not in self._told:
            if len(self._told) >= _MAX_TOLD:
                del self._told[next(iter(self._told))]
            self._told[place, reason] = None
            log.warning("refused a link from %s: %s", place, reason)


def _place(link: Link) -> str:
    """Where a link comes from, without its port: one that is refused comes back from another."""
    name, _, port = link.name.rpartition(":")
    return name if port.isdigit() else link.name
