"""What the gateway of a swarm can be told and asked about it, beside requests for generation."""

from collections.abc import Mapping
from typing import Any, Protocol

from plait.metrics import SwarmFacts
from plait.session import RouteAsk


class SwarmDesk(Protocol):
    """The swarm as its gateway sees it; mappings are ready for JSON."""

    def missing_blocks(self) -> tuple[int, ...]:
        """Blocks of the model that no machine serves now.

        Raises:
            NotReady: the model is not known yet.
        """
        ...

    def status(self, *, max_links: int | None = None) -> Mapping[str, Any]:
        """Machines, spans, links, sessions; of each machine at most `max_links` links, the shortest.

        Raises:
            NotReady: the model is not known yet.
        """
        ...

    async def advice(self) -> Mapping[str, Any]:
        """Which machines to use, when fewer are faster, and why each serves what it serves, in sentences.

        Raises:
            NotReady: the model is not known yet.
        """
        ...

    def facts(self) -> SwarmFacts | None:
        """What Prometheus is told; None while the model is not known yet."""
        ...

    def ticket(self) -> str:
        """A ticket that lets machines join from now on until it expires."""
        ...

    async def route(
        self, ask: RouteAsk, need_tokens: int, *, beside_front: bool = False
    ) -> Mapping[str, Any]:
        """The chain that a request with such a wish would get now, and the front it is chosen from.

        With `beside_front`, the front is that of the wish's objectives whatever the mode, and `values` are the
        chain's in them.

        Raises:
            BadRequest: the wish makes no sense.
            NoRoute: nobody serves some blocks.
        """
        ...

    async def ask_to_leave(self, peer: str) -> str:
        """Tell a machine, by name or id, to leave; returns its id.

        Raises:
            BadRequest: there is no such machine.
            PeerLost: it cannot be told.
        """
        ...
