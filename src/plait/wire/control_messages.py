"""Messages by which the owner of a swarm directs its members."""

from plait.wire.bounded import Bounded


class LeaveAsk(Bounded, frozen=True, tag="leave_ask"):
    """The receiver is to leave the swarm as if its own user had told it to."""


ControlMessage = LeaveAsk
