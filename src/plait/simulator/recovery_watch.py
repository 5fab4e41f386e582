"""How long a session that was disturbed took to go on, seen from outside: by what its gateway sends and hears."""

from collections.abc import Callable
from dataclasses import dataclass

from plait.ids import SessionId
from plait.simulator.fault_schedule import FaultKind
from plait.simulator.trial_report import Recovery
from plait.wire import Fence, Message, OpenSession, Resume, Tokens

_RECENT_S = 10.0
"""A fault that struck so long before a session began another epoch is taken for its cause, or one of them."""


@dataclass(slots=True)
class _Flow:
    """A session: the epoch and time of its latest tokens, and how far the next epoch is."""

    epoch: int
    token_s: float
    began_s: float | None = None
    gathered_s: float = 0.0


class RecoveryWatch:
    """Tells `on_recovery` of every session whose tokens go on in a later epoch, and when that epoch began."""

    def __init__(self, now_s: Callable[[], float], on_recovery: Callable[[Recovery, float], None]) -> None:
        self._now_s = now_s
        self._on_recovery = on_recovery
        self._struck: list[tuple[float, FaultKind]] = []
        self._flows: dict[SessionId, _Flow] = {}

    def struck(self, kind: FaultKind) -> None:
        """A fault has struck somebody."""
        self._struck.append((self._now_s(), kind))

    def sent(self, message: Message) -> None:
        """The gateway sends a message."""
        match message:
            case OpenSession() | Fence():
                flow = self._flows.setdefault(message.session, _Flow(message.epoch, self._now_s()))
                if message.epoch > flow.epoch and flow.began_s is None:
                    flow.began_s = self._now_s()
            case Resume():
                self._flows[message.session].gathered_s = self._now_s()
            case _:
                pass

    def heard(self, tokens: Tokens) -> None:
        """Tokens have reached the gateway."""
        now_s = self._now_s()
        flow = self._flows[tokens.session]
        if tokens.epoch > flow.epoch and flow.began_s is not None:
            began_s, flow.began_s = flow.began_s, None
            recent = [fault for fault in self._struck if flow.token_s - _RECENT_S <= fault[0] <= began_s]
            recovery = Recovery(
                after=tuple(kind for _, kind in recent),
                noticed_s=began_s - max((struck_s for struck_s, _ in recent), default=began_s),
                gathered_s=flow.gathered_s - began_s,
                stalled_s=now_s - flow.token_s,
            )
            self._on_recovery(recovery, began_s)
        if tokens.epoch >= flow.epoch:
            flow.epoch, flow.token_s = tokens.epoch, now_s
