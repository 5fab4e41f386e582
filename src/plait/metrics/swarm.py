"""The metrics of a swarm, as its gateway sees it: the machines, the links to them, the sessions over them.

Machines say of themselves how long their steps take, how much waits there and how much they sent and received in all;
bytes, round trips and heartbeats besides are those of the gateway's own links. Machines come and go, so at most
`MAX_MACHINES` have series of their own; what can be added up of the others is in the series of a machine `other`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MAX_MACHINES = 64
SHOWN_ID_DIGITS = 12
_LONGEST_NAME = 64
_OTHER = ("other", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """One machine; totals are since the gateway first knew it. `None` is not known."""

    peer: str
    name: str
    state: str
    linked: bool
    rtt_s: float | None
    step_s: float | None
    sessions: int
    queued_tokens: int
    kv_used_tokens: int
    kv_total_tokens: int
    generated_tokens_total: int
    all_sent_bytes_total: int
    all_received_bytes_total: int
    sent_bytes_total: int
    received_bytes_total: int
    heartbeats_missed_total: int
    links_lost_total: int
    kv_lent_blocks: int = 0
    kv_borrowed_blocks: int = 0
    kv_moved_out_total: int = 0
    kv_moved_home_total: int = 0
    kv_recalled_total: int = 0
    kv_lost_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmFacts:
    """All that is read at a scrape."""

    machines: tuple[MachineFacts, ...]
    missing_blocks: int
    sessions_by_state: Mapping[str, int]
    sessions_total: int
    failovers_total: int
    replayed_tokens_total: int
    hop_failures_total: int


@dataclass(frozen=True, slots=True)
class _Series:
    """A metric with a value for each machine; `adds_up` if that of several machines is the sum of theirs."""

    name: str
    text: str
    read: Callable[[MachineFacts], float | None]
    kind: Literal["gauge", "counter"] = "gauge"
    adds_up: bool = True


_BY_MACHINE: tuple[_Series, ...] = (
    _Series("step_seconds", "A forward pass there, smoothed.", lambda m: m.step_s, adds_up=False),
    _Series("rtt_seconds", "Round trip from the gateway.", lambda m: m.rtt_s, adds_up=False),
    _Series("linked", "1 if the gateway has a link to it.", lambda m: m.linked),
    _Series("queued_tokens", "Tokens that wait there to be computed.", lambda m: m.queued_tokens),
    _Series("hop_sessions", "Sessions that cross it, of all gateways.", lambda m: m.sessions),
    _Series("kv_used_tokens", "Context in its cache.", lambda m: m.kv_used_tokens),
    _Series("kv_total_tokens", "Context that fits in its cache.", lambda m: m.kv_total_tokens),
    _Series(
        "hop_tokens", "Tokens of answers that went through it.", lambda m: m.generated_tokens_total, "counter"
    ),
    _Series(
        "machine_sent_bytes",
        "Bytes that it sent over all its links.",
        lambda m: m.all_sent_bytes_total,
        "counter",
    ),
    _Series(
        "machine_received_bytes",
        "Bytes that it received over all its links.",
        lambda m: m.all_received_bytes_total,
        "counter",
    ),
    _Series("sent_bytes", "Bytes that the gateway sent to it.", lambda m: m.sent_bytes_total, "counter"),
    _Series(
        "received_bytes",
        "Bytes that the gateway received from it.",
        lambda m: m.received_bytes_total,
        "counter",
    ),
    _Series(
        "heartbeats_missed",
        "Heartbeats of it that were due and did not come.",
        lambda m: m.heartbeats_missed_total,
        "counter",
    ),
    _Series("links_lost", "Links to it that broke.", lambda m: m.links_lost_total, "counter"),
    _Series("kv_lent_blocks", "KV blocks that it has lent to others.", lambda m: m.kv_lent_blocks),
    _Series("kv_borrowed_blocks", "KV blocks that others have lent to it.", lambda m: m.kv_borrowed_blocks),
    _Series("kv_moved_out", "KV blocks that it moved to others.", lambda m: m.kv_moved_out_total, "counter"),
    _Series("kv_moved_home", "KV blocks that it took home.", lambda m: m.kv_moved_home_total, "counter"),
    _Series("kv_recalled", "KV blocks that it called back.", lambda m: m.kv_recalled_total, "counter"),
    _Series("kv_lost", "Borrowed KV blocks that it lost or gave up.", lambda m: m.kv_lost_total, "counter"),
)

_COUNTERS: tuple[tuple[str, str, Callable[[SwarmFacts], int]], ...] = (
    ("sessions_started", "Sessions over the swarm.", lambda f: f.sessions_total),
    ("failovers", "Chains repaired or resumed under way.", lambda f: f.failovers_total),
    (
        "replayed_tokens",
        "Positions computed again for that, over all hops.",
        lambda f: f.replayed_tokens_total,
    ),
    ("hop_failures", "Hops that failed in a session.", lambda f: f.hop_failures_total),
)

# There from the start, whether or not anything is in them.
_STATES = ("joining", "online", "draining")
_SESSION_STATES = ("opening", "flowing", "recovering")


class SwarmMetrics(Collector):
    """Collects `plait_swarm_...` from the facts of a swarm, or nothing while there are none (`None`)."""

    def __init__(self, facts: Callable[[], SwarmFacts | None]) -> None:
        self._facts = facts
        self._labels: dict[str, tuple[str, str]] = {}
        self._seen: dict[
            str, MachineFacts
        ] = {}  # machines without series of their own, as of the last scrape
        self._other_totals = {series.name: 0.0 for series in _BY_MACHINE if series.kind == "counter"}

    def collect(self) -> Iterator[Metric]:
        """All metrics of the swarm, as prometheus-client's collectors do."""
        facts = self._facts()
        if facts is None:
            return
        yield _by_state("machines", "Machines of the swarm.", _STATES, _count_states(facts.machines))
        yield _by_state("sessions", "Sessions of this gateway.", _SESSION_STATES, facts.sessions_by_state)
        missing = GaugeMetricFamily("plait_swarm_missing_blocks", "Blocks of the model that nobody serves.")
        missing.add_metric([], facts.missing_blocks)
        yield missing
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"plait_swarm_{name}", text)
            counter.add_metric([], read(facts))
            yield counter
        own, others = self._split(facts.machines)
        for series in _BY_MACHINE:
            family = _family(series)
            for machine in own:
                value = series.read(machine)
                if value is not None:
                    family.add_metric(self._labels[machine.peer], value)
            if others and series.adds_up:
                total = sum(series.read(machine) or 0 for machine in others)
                family.add_metric(_OTHER, self._other_totals.get(series.name, total))
            yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known to be distinct."""
        return ()

    def _split(self, machines: Iterable[MachineFacts]) -> tuple[list[MachineFacts], list[MachineFacts]]:
        """Those with series of their own, which they keep as long as they are there, and the others."""
        present = {machine.peer: machine for machine in machines}
        for peer in self._labels.keys() - present.keys():
            del self._labels[peer]
        for machine in present.values():
            if machine.peer not in self._labels and len(self._labels) < MAX_MACHINES:
                self._labels[machine.peer] = (machine.name[:_LONGEST_NAME], machine.peer[:SHOWN_ID_DIGITS])
        others = [machine for peer, machine in present.items() if peer not in self._labels]
        self._add_to_totals(others)
        return [machine for peer, machine in present.items() if peer in self._labels], others

    def _add_to_totals(self, others: list[MachineFacts]) -> None:
        """Their sum would fall when one of them leaves, and a counter never falls: what came is added up instead."""
        for series in _BY_MACHINE:
            if series.kind != "counter":
                continue
            for machine in others:
                before = self._seen.get(machine.peer)
                value, old = series.read(machine) or 0, 0 if before is None else series.read(before) or 0
                self._other_totals[series.name] += max(0, value - old)
        self._seen = {machine.peer: machine for machine in others}


def _family(series: _Series) -> GaugeMetricFamily | CounterMetricFamily:
    kind = GaugeMetricFamily if series.kind == "gauge" else CounterMetricFamily
    return kind(f"plait_swarm_{series.name}", series.text, labels=("machine", "peer"))


def _by_state(name: str, text: str, states: Iterable[str], counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"plait_swarm_{name}", text, labels=("state",))
    for state in states:
        family.add_metric([state], counts.get(state, 0))
    return family


def _count_states(machines: Iterable[MachineFacts]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for machine in machines:
        counts[machine.state] = counts.get(machine.state, 0) + 1
    return counts
