"""Links that flows share: latency, then bytes at a fair rate.

A transfer takes `one_way_s + bytes / rate`, where the rate follows from everybody who transfers at the time: max-min
fair over all links of a path (Bertsekas and Gallager 1992, section 6.5.2), the state that long-lived TCP flows of
similar round trips tend to. Rates change only when a flow starts or ends, so between those everything is linear, and
a run is exact at any spacing of its events.

    links = {"home": SharedLink(bandwidth_bytes_per_s=12.5e6, one_way_s=0.01)}
    state = start_flow(FluidState(), links, "a", ("home",), 1e6, now_s=0.0)
    next_end_s(state)                                   # 0.08; its last byte arrives path_delay_s later
    state, ended = advance(state, links, now_s=0.1)     # (("a", 0.08),)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from plait.errors import MissingCost

INITIAL_WINDOW_BYTES = 10 * 1460
"""What TCP sends before the first acknowledgement: ten segments (RFC 6928)."""
SEGMENT_BYTES = 1460


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLink:
    """One direction of a link. `loss_fraction` of its segments is sent again, a round trip later."""

    bandwidth_bytes_per_s: float
    one_way_s: float = 0.0
    loss_fraction: float = 0.0

    def transfer_s(self, payload_bytes: float, flows: int = 1) -> float:
        """Seconds until the last byte has arrived, with so many flows sharing the link all the time."""
        return self.one_way_s + payload_bytes * flows / self.bandwidth_bytes_per_s


Links = Mapping[str, SharedLink]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A transfer that goes on: what is left of it, over which links, and how fast it is now."""

    id: str
    path: tuple[str, ...]
    left_bytes: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FluidState:
    """All transfers at one moment, in the order in which they began."""

    now_s: float = 0.0
    flows: tuple[Flow, ...] = ()


def start_flow(
    state: FluidState, links: Links, id: str, path: tuple[str, ...], payload_bytes: float, now_s: float
) -> FluidState:
    """The state with one more transfer. First `advance` to now: nothing that ends before may be left in the state.

    Raises:
        MissingCost: the path has a link that is not described.
    """
    assert now_s >= state.now_s, "time does not go back"
    assert all(flow.id != id for flow in state.flows), f"a flow {id!r} goes on already"
    new = Flow(id=id, path=path, left_bytes=payload_bytes, bytes_per_s=0.0)
    return _with_fair_rates((*_at(state, now_s).flows, new), links, now_s)


def stop_flow(state: FluidState, links: Links, id: str, now_s: float) -> FluidState:
    """The state without a transfer that was given up; an unknown one is no error."""
    left = tuple(flow for flow in _at(state, now_s).flows if flow.id != id)
    return _with_fair_rates(left, links, now_s)


def change_links(state: FluidState, links: Links, now_s: float) -> FluidState:
    """The state after links got faster, slower or dead (bandwidth 0)."""
    return _with_fair_rates(_at(state, now_s).flows, links, now_s)


def next_end_s(state: FluidState) -> float:
    """When the next transfer has sent its last byte; infinite if none will."""
    return min((_end_s(flow, state.now_s) for flow in state.flows), default=math.inf)


def advance(
    state: FluidState, links: Links, now_s: float
) -> tuple[FluidState, tuple[tuple[str, float], ...]]:
    """The state at `now_s`, and the transfers that ended until then with their times, in order."""
    ended: list[tuple[str, float]] = []
    while (end_s := next_end_s(state)) <= now_s:
        gone = [flow.id for flow in state.flows if _end_s(flow, state.now_s) <= end_s]
        ended.extend((id, end_s) for id in gone)
        left = tuple(flow for flow in _at(state, end_s).flows if flow.id not in gone)
        state = _with_fair_rates(left, links, end_s)
    return _at(state, now_s), tuple(ended)


def fair_rates(paths: Mapping[str, tuple[str, ...]], links: Links) -> dict[str, float]:
    """Bytes per second of every flow: the tightest link is divided evenly, its flows are settled, and so on.

    A flow over no link at all (between two parts of one machine) is infinitely fast.

    Raises:
        MissingCost: a path has a link that is not described.
    """
    for id, path in paths.items():
        for name in path:
            if name not in links:
                raise MissingCost(
                    f"flow {id!r} crosses link {name!r}, which is not among the links described"
                )
    left = {name: links[name].bandwidth_bytes_per_s for path in paths.values() for name in path}
    rates = {id: math.inf for id, path in paths.items() if not path}
    open_paths = {id: path for id, path in paths.items() if path}
    while open_paths:
        users: dict[str, int] = {}
        for path in open_paths.values():
            for name in dict.fromkeys(path):
                users[name] = users.get(name, 0) + 1
        tightest = min(users, key=lambda name: left[name] / users[name])
        share = left[tightest] / users[tightest]
        for id, path in list(open_paths.items()):
            if tightest in path:
                rates[id] = share
                del open_paths[id]
                for name in dict.fromkeys(path):
                    left[name] = max(0.0, left[name] - share)
    return rates


def path_delay_s(links: Links, path: tuple[str, ...]) -> float:
    """Seconds that a byte spends on the way, however fast the links are."""
    return sum(links[name].one_way_s for name in path)


def retransmit_s(links: Links, path: tuple[str, ...], payload_bytes: float) -> float:
    """Expected delay by loss: a transfer waits a round trip for each round in which a segment of it was lost.

    Of n segments, the largest of n geometric numbers of rounds is waited for; the sum is over rounds that still have
    a segment to send.
    """
    kept = math.prod(1.0 - links[name].loss_fraction for name in path)
    lost = 1.0 - kept
    if lost <= 0.0 or payload_bytes <= 0:
        return 0.0
    if lost >= 1.0:
        return math.inf
    segments = math.ceil(payload_bytes / SEGMENT_BYTES)
    rounds, still = 0.0, lost
    while (some := -math.expm1(segments * math.log1p(-still))) > 1e-9:
        rounds += some
        still *= lost
    return rounds * 2 * path_delay_s(links, path)


def ramp_s(links: Links, path: tuple[str, ...], payload_bytes: float) -> float:
    """Extra delay of a fresh TCP connection, whose window doubles every round trip until it fills the path.

    Without loss; a connection that is kept open has its window already.
    """
    if not path:
        return 0.0
    round_s = 2 * path_delay_s(links, path)
    bandwidth = min(links[name].bandwidth_bytes_per_s for name in path)
    window, left_bytes, waited_s = float(INITIAL_WINDOW_BYTES), payload_bytes, 0.0
    while left_bytes > window and window < bandwidth * round_s:
        waited_s += round_s - window / bandwidth
        left_bytes -= window
        window *= 2
    return waited_s


def _at(state: FluidState, now_s: float) -> FluidState:
    passed_s = now_s - state.now_s
    flows = tuple(
        replace(flow, left_bytes=max(0.0, flow.left_bytes - flow.bytes_per_s * passed_s))
        if flow.bytes_per_s < math.inf
        else flow
        for flow in state.flows
    )
    return FluidState(now_s=now_s, flows=flows)


def _with_fair_rates(flows: tuple[Flow, ...], links: Links, now_s: float) -> FluidState:
    rates = fair_rates({flow.id: flow.path for flow in flows}, links)
    return FluidState(now_s=now_s, flows=tuple(replace(flow, bytes_per_s=rates[flow.id]) for flow in flows))


def _end_s(flow: Flow, now_s: float) -> float:
    if flow.left_bytes <= 0 or flow.bytes_per_s == math.inf:
        return now_s
    return now_s + flow.left_bytes / flow.bytes_per_s if flow.bytes_per_s > 0 else math.inf
