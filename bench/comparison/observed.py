"""What has to be seen while a run goes on: what KV memory is held for, and which requests made up a batch.

Memory that a request holds is useful where keys and values are, reserved where they will be, and wasted inside where
they never will (its reservation was too long, or its last block is not full): Kwon et al. 2023, section 3. Nothing is
wasted between reservations, because plait's pool hands out blocks that need not be neighbours. The systems of that
section kept a request in one piece, which a buddy allocator rounds up to a power of two: what would then be held is
counted, too.
"""

from dataclasses import dataclass

from plait.ids import RequestId
from plait.scheduling import ScheduledStep
from plait.simulator import SimulatedWorker, Timeline
from plait.simulator.flight import Flight

_EVERY_STEPS = 16


@dataclass
class KvTokens:
    """Sums over samples, in tokens."""

    useful: int = 0
    reserved: int = 0
    inside: int = 0
    in_one_piece: int = 0

    @property
    def held(self) -> int:
        return self.useful + self.reserved + self.inside


class Observer(Timeline):
    """Sees every step. Give it the run's flights once it is built."""

    def __init__(self, *, reserves: bool) -> None:
        super().__init__()
        self.flights: dict[RequestId, Flight] = {}
        self.kv = KvTokens()
        self.batches: list[list[int]] = []
        """Numbers of the requests that were admitted together."""
        self._reserves = reserves
        self._steps = 0

    def step(self, worker: SimulatedWorker, step: ScheduledStep, began_ns: int, ended_ns: int) -> None:
        if step.admitted and self._reserves:
            self.batches.append([_number(request_id) for request_id in step.admitted])
        self._steps += 1
        if self._steps % _EVERY_STEPS == 0:
            self._sample(worker, step)

    def request(self, flight: Flight, ending: str) -> None:
        """Nothing is kept of requests."""

    def _sample(self, worker: SimulatedWorker, step: ScheduledStep) -> None:
        block_tokens = worker.pool.block_tokens
        for chunk in step.chunks:
            flight = self.flights.get(chunk.request_id)
            if flight is None:
                continue
            filled = chunk.start + chunk.tokens
            held = len(chunk.kv_blocks) * block_tokens
            if self._reserves:
                held = worker.pool.blocks_for(flight.max_tokens) * block_tokens
            used_at_last = min(held, len(flight.prompt) + flight.output_tokens)
            self.kv.useful += filled
            self.kv.reserved += max(0, used_at_last - filled)
            self.kv.inside += held - max(used_at_last, filled)
            self.kv.in_one_piece += 1 << (held - 1).bit_length()


def _number(request_id: RequestId) -> int:
    return int(request_id.removeprefix("r").partition(".")[0])
