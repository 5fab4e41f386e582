"""What is told of a swarm, under which names, and that a swarm of any size makes a bounded number of series."""

from dataclasses import replace

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from plait.metrics import MachineFacts, SwarmFacts, SwarmMetrics
from plait.metrics.swarm import MAX_MACHINES

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def machine(number: int, **changes: object) -> MachineFacts:
    facts = MachineFacts(
        peer=f"{number:064x}"[::-1],
        name=f"m{number}",
        state="online",
        linked=True,
        rtt_s=0.002,
        step_s=0.001,
        sessions=1,
        queued_tokens=2,
        kv_used_tokens=30,
        kv_total_tokens=100,
        generated_tokens_total=10,
        all_sent_bytes_total=5000,
        all_received_bytes_total=6000,
        sent_bytes_total=1000,
        received_bytes_total=2000,
        heartbeats_missed_total=3,
        links_lost_total=1,
    )
    return replace(facts, **changes)


class Board:
    """Metrics over facts that the test sets."""

    def __init__(self, *machines: MachineFacts) -> None:
        self.facts: SwarmFacts | None = SwarmFacts(
            machines=machines,
            missing_blocks=4,
            sessions_by_state={"flowing": 5},
            sessions_total=6,
            failovers_total=7,
            replayed_tokens_total=8,
            hop_failures_total=9,
        )
        self._registry = CollectorRegistry()
        self._registry.register(SwarmMetrics(lambda: self.facts))

    def show(self, *machines: MachineFacts) -> None:
        assert self.facts is not None
        self.facts = replace(self.facts, machines=machines)

    def samples(self) -> Samples:
        text = generate_latest(self._registry).decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples()[f"plait_swarm_{name}", tuple(sorted(labels.items()))]


def test_machines_sessions_and_what_went_wrong_are_told() -> None:
    board = Board(machine(1), machine(2, state="joining", step_s=None, rtt_s=None))
    one = {"machine": "m1", "peer": machine(1).peer[:12]}
    assert board.value("step_seconds", **one) == 0.001
    assert board.value("rtt_seconds", **one) == 0.002
    assert board.value("sent_bytes_total", **one) == 1000
    assert board.value("machine_received_bytes_total", **one) == 6000
    assert board.value("heartbeats_missed_total", **one) == 3
    assert board.value("machines", state="online") == board.value("machines", state="joining") == 1
    assert board.value("machines", state="draining") == 0
    assert board.value("sessions", state="flowing") == 5
    assert board.value("sessions", state="recovering") == 0
    assert board.value("failovers_total") == 7
    assert board.value("replayed_tokens_total") == 8
    assert board.value("missing_blocks") == 4
    steps = [labels for (name, labels) in board.samples() if name == "plait_swarm_step_seconds"]
    assert len(steps) == 1, "what is not known has no value"


def test_a_swarm_that_is_not_known_yet_has_no_series() -> None:
    board = Board()
    board.facts = None
    assert board.samples() == {}


def test_however_many_machines_there_are_the_series_are_few() -> None:
    few = len(Board(*map(machine, range(MAX_MACHINES))).samples())
    many = Board(*map(machine, range(20 * MAX_MACHINES)))
    assert len(many.samples()) <= few + 20
    assert many.value("queued_tokens", machine="other", peer="") == 2 * 19 * MAX_MACHINES
    named = {dict(labels).get("machine") for _, labels in many.samples()}
    assert len(named - {None, "other"}) == MAX_MACHINES
    assert ("plait_swarm_step_seconds", (("machine", "other"), ("peer", ""))) not in many.samples()


def test_series_stay_with_their_machines_and_new_ones_take_what_is_left() -> None:
    first = [machine(number) for number in range(MAX_MACHINES)]
    late = machine(MAX_MACHINES)
    board = Board(*first, late)
    assert board.value("hop_tokens_total", machine="other", peer="") == 10
    board.show(late, *first[1:])
    assert board.value("hop_tokens_total", machine="m64", peer=late.peer[:12]) == 10
    assert not any(dict(labels).get("machine") in ("m0", "other") for _, labels in board.samples())


def test_the_counters_of_the_others_never_fall() -> None:
    own = [machine(number) for number in range(MAX_MACHINES)]
    others = [machine(number) for number in range(MAX_MACHINES, MAX_MACHINES + 3)]
    board = Board(*own, *others)
    seen = [board.value("sent_bytes_total", machine="other", peer="")]
    for shown in (others[:1], [replace(others[0], sent_bytes_total=1500)], others[:2], others):
        board.show(*own, *shown)
        seen.append(board.value("sent_bytes_total", machine="other", peer=""))
    assert seen == sorted(seen) and seen[0] == 3000 and seen[2] == 3500


def test_names_are_cut_and_quoted() -> None:
    board = Board(machine(1, name='"\n' * 100))
    assert board.value("linked", machine=('"\n' * 100)[:64], peer=machine(1).peer[:12]) == 1
