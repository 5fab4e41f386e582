"""Messages of sessions: between a gateway and the workers of a chain."""

from plait.wire.bounded import Bounded, SessionIdField


class CloseSession(Bounded, frozen=True, tag="close_session"):
    """The session has ended or moved: free what it holds; one that is not known is fine."""

    session: SessionIdField


SessionMessage = CloseSession
