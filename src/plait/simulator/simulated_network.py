"""How long a message takes between two machines, and what can befall the way between them.

A link has a delay, and a bandwidth that messages in one direction take turns at; none overtakes another, as on one TCP
connection. While a way is down nothing arrives; what is sent waits for it to come back, unless that takes so long that
both ends give each other up (`silence_s`): then it is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from plait.simulator.event_heap import NS_PER_S, ns_of

GATEWAY = "gateway"
"""The endpoint where clients' requests come in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One way between two endpoints, the same in both directions."""

    one_way_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Links by the sites of their two ends: `pairs` (names of the sites, sorted) where given, else `within` one site or
    `between` two."""

    within: LinkSpec
    between: LinkSpec
    pairs: Mapping[tuple[str, str], LinkSpec] = field(default_factory=dict[tuple[str, str], LinkSpec])
    gateway_site: str = ""

    def link(self, site: str, other: str) -> LinkSpec:
        """The link between two endpoints at these sites."""
        pair = self.pairs.get((min(site, other), max(site, other)))
        return pair or (self.within if site == other else self.between)


@dataclass(slots=True)
class _Direction:
    delay_ns: int
    ns_per_byte: float
    free_ns: int = 0
    last_arrival_ns: int = 0


class SimulatedNetwork:
    """Every way between endpoints, made when it is first used."""

    def __init__(self, spec: NetworkSpec, sites: Mapping[str, str], *, silence_s: float) -> None:
        self.spec = spec
        self._sites = {GATEWAY: spec.gateway_site, **sites}
        self._silence_ns = ns_of(silence_s)
        self._ways: dict[tuple[str, str], _Direction] = {}
        self._slowed_ns: dict[str, int] = {}
        self._narrowed: dict[str, float] = {}
        self._cuts: list[tuple[frozenset[str], int, int]] = []

    def one_way_s(self, sender: str, receiver: str) -> float:
        """Delay of the smallest message without faults; 0 to itself."""
        if sender == receiver:
            return 0.0
        return self.spec.link(self._sites[sender], self._sites[receiver]).one_way_s

    def send(self, sender: str, receiver: str, size_bytes: int, now_ns: int) -> int | None:
        """When a message that is sent now arrives; None: never."""
        if sender == receiver:
            return now_ns
        way = self._ways.get((sender, receiver))
        if way is None:
            link = self.spec.link(self._sites[sender], self._sites[receiver])
            way = self._ways[sender, receiver] = _Direction(
                delay_ns=ns_of(link.one_way_s), ns_per_byte=NS_PER_S / link.bandwidth_bytes_per_s
            )
        begin_ns = max(now_ns, way.free_ns)
        if self._cuts:
            back_ns = self._down_until_ns(sender, receiver, now_ns)
            if back_ns is None:
                return None
            begin_ns = max(begin_ns, back_ns)
        ns_per_byte = way.ns_per_byte
        if self._narrowed:
            ns_per_byte *= max(self._narrowed.get(sender, 1.0), self._narrowed.get(receiver, 1.0))
        way.free_ns = begin_ns + round(size_bytes * ns_per_byte)
        arrival_ns = way.free_ns + way.delay_ns
        if self._slowed_ns:
            arrival_ns += self._slowed_ns.get(sender, 0) + self._slowed_ns.get(receiver, 0)
        way.last_arrival_ns = max(arrival_ns, way.last_arrival_ns)
        return way.last_arrival_ns

    def delay_ns(self, sender: str, receiver: str) -> int:
        """Delay of the smallest message as things are now, on an open and idle way."""
        slowed_ns = self._slowed_ns.get(sender, 0) + self._slowed_ns.get(receiver, 0)
        return ns_of(self.one_way_s(sender, receiver)) + slowed_ns

    @property
    def faulty(self) -> bool:
        """Whether anything is, or was, the matter with it."""
        return bool(self._cuts or self._slowed_ns)

    def cut(self, endpoints: frozenset[str], from_ns: int, until_ns: int) -> None:
        """Separate these endpoints from all others from now on for a while; they still reach each other."""
        self._cuts.append((endpoints, from_ns, until_ns))

    def slow(self, endpoint: str, more_ns: int) -> None:
        """Everything to and from an endpoint takes so much longer; negative takes that back."""
        total_ns = self._slowed_ns.get(endpoint, 0) + more_ns
        if total_ns:
            self._slowed_ns[endpoint] = total_ns
        else:
            del self._slowed_ns[endpoint]

    def narrow(self, endpoint: str, factor: float) -> None:
        """Everything to and from an endpoint takes so many times as long to send; the inverse takes that back."""
        self._narrowed[endpoint] = self._narrowed.get(endpoint, 1.0) * factor

    def given_up_ns(self, endpoint: str, other: str, now_ns: int) -> int | None:
        """When two ends that are separated now give each other up; None: they are not, or not for so long."""
        noticed = [
            from_ns + self._silence_ns
            for side, from_ns, until_ns in self._cuts
            if self._parts(side, endpoint, other)
            and from_ns <= now_ns < until_ns
            and until_ns - from_ns > self._silence_ns
        ]
        return max(min(noticed), now_ns) if noticed else None

    def _down_until_ns(self, sender: str, receiver: str, now_ns: int) -> int | None:
        """When the way is open again (now, if it is); None if both ends give up before."""
        back_ns = now_ns
        self._cuts = [cut for cut in self._cuts if cut[2] > now_ns]
        for side, from_ns, until_ns in self._cuts:
            if self._parts(side, sender, receiver):
                if until_ns - from_ns > self._silence_ns:
                    return None
                back_ns = max(back_ns, until_ns)
        return back_ns

    @staticmethod
    def _parts(side: frozenset[str], endpoint: str, other: str) -> bool:
        return (endpoint in side) != (other in side)
