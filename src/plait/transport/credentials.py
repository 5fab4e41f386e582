"""What a member proves itself with: its identity, and the secret of its swarm or of a ticket."""

import asyncio
import secrets
from collections.abc import Callable

from plait.errors import PeerLost, ServingError
from plait.ids import PeerId
from plait.transport.handshake import Greeted, Heard, greet, hear, welcome
from plait.transport.identity import Identity
from plait.transport.link import Link
from plait.transport.ticket import SwarmSecret, TicketSecret
from plait.transport.tls import TlsContexts
from plait.wire import NONCE_BYTES


class Credentials:
    """`secret` is a ticket's until the first member that is greeted hands over the swarm's own.

    `incarnation` tells this process from an earlier one of the same identity.
    """

    def __init__(
        self, identity: Identity, secret: SwarmSecret | TicketSecret, unix_now: Callable[[], float]
    ) -> None:
        self.peer = identity.peer
        self.secret = secret
        self.unix_now = unix_now
        self.incarnation = secrets.token_bytes(NONCE_BYTES)
        self._identity = identity
        self._contexts: TlsContexts | None = None

    def tls(self) -> TlsContexts:
        """For streams that other members carry."""
        if self._contexts is None:
            self._contexts = TlsContexts(self._identity, self.secret.door)
        return self._contexts

    async def greet(self, link: Link, peer: PeerId, *, last_link: bytes, timeout_s: float) -> Greeted:
        """The handshake of who dialled; a link on which it fails is closed.

        Raises:
            PeerLost: the other end refuses, is not `peer` or not of this swarm, or says nothing.
        """
        try:
            async with asyncio.timeout(timeout_s):
                greeted, secret = await greet(
                    link,
                    peer,
                    identity=self._identity,
                    secret=self.secret,
                    incarnation=self.incarnation,
                    last_link=last_link,
                )
        except TimeoutError:
            link.abort()
            raise PeerLost(f"{link.name}: no answer to the handshake") from None
        except ServingError as error:
            link.abort()
            raise PeerLost(f"{link.name}: {error.message}") from None
        except asyncio.CancelledError:
            link.abort()
            raise
        if isinstance(self.secret, TicketSecret):
            self.secret = secret
        return greeted

    async def hear(self, link: Link) -> Heard:
        """The handshake of who was dialled, up to the other end's proof.

        Raises:
            PeerLost: the other end is refused, and why; for the own log only.
            BadFrame: what it sends is no part of a handshake.
        """
        return await hear(link, identity=self._identity, secret=self.secret, unix_now_s=self.unix_now())

    def welcome(self, link: Link, heard: Heard) -> Greeted:
        """Let the other end in.

        Raises:
            PeerLost: the link is closed.
        """
        assert isinstance(self.secret, SwarmSecret), "who has only a ticket hears nobody out"
        return welcome(link, heard, identity=self._identity, secret=self.secret, incarnation=self.incarnation)
