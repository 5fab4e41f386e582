"""A request between its arrival and its end, as the simulator keeps it."""

from dataclasses import dataclass, field

from plait.ids import PeerId, RequestId
from plait.routing import Chain
from plait.simulator.event_heap import NS_PER_S
from plait.simulator.simulated_worker import SimulatedWorker


@dataclass(slots=True)
class HopProgress:
    """How far a request is at one hop of its chain, in positions counted from its first token.

    `computed`: have run here. `sent`: their outputs went on to the next hop. `known`: were fed here. `early`: start and
    count of a token that the last hop sent here before all that comes before it was fed.
    """

    worker: SimulatedWorker
    known: int = 0
    computed: int = 0
    sent: int = 0
    opened: bool = False
    early: tuple[int, int] | None = None


@dataclass(slots=True, eq=False)
class Flight:
    """One request in flight. Its epoch grows with every change of its chain; what an older one still sends is dropped.

    While `fenced`, its chain is being mended and nothing that comes out of a machine goes anywhere. `id` is its name on
    the machines, another one for each attempt. `prompt`: its token ids; equal beginnings share their KV blocks.
    `produced`: tokens that the client has, of `output_tokens`; `max_tokens` is what it asked room for, prompt included.
    `refused_by`: who had no room for it, in this attempt.
    """

    id: RequestId
    number: int
    arrival_ns: int
    prompt: list[int]
    output_tokens: int
    max_tokens: int
    namespace: bytes = b""
    chain: Chain = ()
    hops: list[HopProgress] = field(default_factory=list[HopProgress])
    epoch: int = 0
    fenced: bool = False
    produced: int = 0
    first_ns: int = 0
    last_ns: int = 0
    widest_gap_ns: int = 0
    retries: int = 0
    waits_since_ns: int | None = None
    refused_by: frozenset[PeerId] = frozenset()

    @property
    def tokens(self) -> int:
        """Tokens known of it, prompt included."""
        return len(self.prompt) + self.produced

    @property
    def peers(self) -> list[PeerId]:
        """The machines of its chain."""
        return [hop.peer for hop in self.chain]

    def standing(self) -> str:
        """Where it is, for a person."""
        if not self.chain:
            return f"{self.id} ({self.produced} of {self.output_tokens} tokens) waits at the gateway"
        hops = ", ".join(
            f"{hop.worker.name}: {hop.computed} of {hop.known} positions computed" for hop in self.hops
        )
        return f"{self.id} ({self.produced} of {self.output_tokens} tokens) is on {hops}"

    def take_token(self, now_ns: int) -> int:
        """Note a token that the client gets at that time; returns the gap to the one before, 0 for the first."""
        self.produced += 1
        if self.first_ns == 0:
            self.first_ns = self.last_ns = now_ns
            return 0
        gap_ns = max(now_ns - self.last_ns, 0)
        self.last_ns = max(now_ns, self.last_ns)
        if gap_ns > self.widest_gap_ns:
            self.widest_gap_ns = gap_ns
        return gap_ns

    def since_arrival_s(self, time_ns: int) -> float:
        """Seconds from its arrival."""
        return (time_ns - self.arrival_ns) / NS_PER_S
