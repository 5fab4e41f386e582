"""What happens to a session at its gateway (events), and what it wants done about it (actions)."""

from dataclasses import dataclass

from plait.errors import NoRoute, ServingError
from plait.ids import PeerId
from plait.wire import (
    ChainHop,
    CloseSession,
    Fault,
    Fence,
    Fenced,
    FinishCode,
    Opened,
    OpenSession,
    Refused,
    Resume,
    Step,
    TokenReport,
    Tokens,
)

# Events.


@dataclass(frozen=True, slots=True)
class Begun:
    """The first event."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A message came from a peer."""

    peer: PeerId
    message: Opened | Refused | Fenced | Tokens | Fault


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer is gone, or cannot be reached."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """A peer is about to leave: the session is to go on without it, as long as it can."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Routed:
    """The answer to `FindRoute`: hops that cover its blocks in order."""

    blocks: range
    hops: tuple[ChainHop, ...]


@dataclass(frozen=True, slots=True)
class Unroutable:
    """The other answer to `FindRoute`."""

    blocks: range
    error: NoRoute


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """Peers have come, gone or changed: there may be a route now. Those that are `back` are not avoided any more."""

    back: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`deadline_s` may be over."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody wants the rest."""


SessionEvent = Begun | Heard | Lost | Leaving | Routed | Unroutable | ViewChanged | TimePassed | Cancelled

# Actions.


@dataclass(frozen=True, slots=True)
class FindRoute:
    """Look for hops through these blocks, without some peers, between two hops (None: the gateway)."""

    blocks: range
    avoiding: frozenset[PeerId]
    after: PeerId | None
    before: PeerId | None


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; a peer that cannot be reached becomes a `Lost`."""

    peer: PeerId
    message: OpenSession | Fence | Resume | Step | CloseSession


@dataclass(frozen=True, slots=True)
class Emit:
    """The next tokens of the answer, their reports if asked for, and whether the answer ends with them."""

    token_ids: tuple[int, ...]
    reports: tuple[TokenReport, ...] | None
    finished: FinishCode


@dataclass(frozen=True, slots=True)
class Ban:
    """A hop failed: avoid it in other sessions too, and cut it off if it `misbehaved`."""

    peer: PeerId
    reason: str
    misbehaved: bool


@dataclass(frozen=True, slots=True)
class Fail:
    """The session ends with this error."""

    error: ServingError


@dataclass(frozen=True, slots=True)
class Ended:
    """The session has ended as it should."""


SessionAction = FindRoute | Send | Emit | Ban | Fail | Ended
