"""How requests flow over machines: prompts in, outputs from hop to hop, tokens back.

On one machine that holds the whole model, a request is submitted to its scheduler with its prompt, as `plait.engine`
does, under any policy. Over several, every hop has a fed request (`Scheduler.extend`), as `SpanEngine` has: outputs go
to the next hop slice by slice, the last hop hands each token to the gateway and to the first hop at once. After a
loss, `plait.session.plan_resume` says from where each hop computes again, and survivors send again what they kept.
"""

from collections.abc import Callable
from typing import Protocol

from plait.errors import BadRequest, NoCapacity
from plait.ids import PeerId, RequestId
from plait.scheduling import NewRequest, Round, ScheduledChunk, ScheduledStep
from plait.session import plan_resume
from plait.simulator.buggify import Buggify
from plait.simulator.event_heap import EventHeap, EventKind
from plait.simulator.flight import Flight, HopProgress
from plait.simulator.simulated_network import GATEWAY, SimulatedNetwork
from plait.simulator.simulated_worker import SimulatedWorker

TOKEN_BYTES = 64
"""A small message: its frame is most of it."""
_ID_BYTES = 4


class FlightOwner(Protocol):
    """Who decides what becomes of requests that end, or cannot go on where they are."""

    def took_token(self, flight: Flight, gap_ns: int) -> None:
        """The client gets a token, so long after the one before."""
        ...

    def finished(self, flight: Flight) -> None:
        """It has all its tokens, and holds nothing any more."""
        ...

    def refused(self, flight: Flight, peer: PeerId) -> None:
        """A machine of its chain has no room for it; it holds nothing any more."""
        ...

    def impossible(self, flight: Flight, reason: str) -> None:
        """It can never run on its chain; it holds nothing any more."""
        ...

    def lost(self, flight: Flight, peer: PeerId) -> None:
        """A machine of its chain is not there."""
        ...


class DataPath:
    """Moves requests along their chains, by events."""

    def __init__(
        self, heap: EventHeap, network: SimulatedNetwork, owner: FlightOwner, buggify: Buggify
    ) -> None:
        self._heap = heap
        self._network = network
        self._owner = owner
        self._buggify = buggify
        self.flights: dict[RequestId, Flight] = {}

    # Begin, go on, end.

    def start(self, flight: Flight, workers: list[SimulatedWorker]) -> None:
        """Open a request on all machines of its chain and send it off, with the tokens that it has already."""
        flight.epoch += 1
        if flight.epoch > 1:
            # A machine that had it may still run a step of it: under another name that is nobody's.
            del self.flights[flight.id]
            flight.id = RequestId(f"r{flight.number}.{flight.epoch}")
            self.flights[flight.id] = flight
        flight.fenced = False
        flight.hops = [HopProgress(worker) for worker in workers]
        for worker in workers:
            worker.sessions += 1
        if len(workers) == 1:
            self._send(
                GATEWAY,
                workers[0].name,
                _ID_BYTES * flight.tokens,
                self._submit,
                (flight, flight.epoch),
                flight,
            )
        else:
            self._after_round_trip(workers, flight, self._opened)

    def mend(self, flight: Flight, hops: list[HopProgress]) -> None:
        """Go on over a changed chain: `hops` are those that stayed, with their progress, and new ones."""
        flight.epoch += 1
        for hop in hops:
            if not hop.opened:
                hop.worker.sessions += 1
        flight.hops = hops
        flight.fenced = True
        self._after_round_trip([hop.worker for hop in hops], flight, self._resume)

    def close(self, flight: Flight, but: list[HopProgress] | None = None) -> None:
        """Free what a request holds, on all its machines or all `but` some; what is on its way to them is void."""
        flight.epoch += 1
        for hop in flight.hops:
            if but is None or hop not in but:
                self._leave(flight, hop)
        flight.hops = but or []

    def _leave(self, flight: Flight, hop: HopProgress) -> None:
        worker = hop.worker
        worker.sessions -= 1
        if worker.up:
            if hop.opened:
                worker.queued_tokens = max(0, worker.queued_tokens - (hop.known - hop.computed))
            worker.forget(flight.id)

    # A request on one machine.

    def _submit(self, what: tuple[Flight, int]) -> None:
        flight, epoch = what
        if epoch != flight.epoch:
            return
        hop = flight.hops[0]
        worker = hop.worker
        if not worker.up:
            self._owner.lost(flight, worker.peer)
            return
        try:
            self._perhaps_full(worker)
            worker.submit(
                NewRequest(
                    id=flight.id,
                    token_ids=flight.prompt + [0] * flight.produced if flight.produced else flight.prompt,
                    max_sequence_tokens=flight.max_tokens,
                    namespace=flight.namespace,
                ),
                Round(chain=flight.chain),
            )
        except NoCapacity:
            self.close(flight)
            self._owner.refused(flight, worker.peer)
            return
        except BadRequest as error:
            self.close(flight)
            self._owner.impossible(flight, error.message)
            return
        hop.opened = True
        hop.known = flight.tokens
        worker.queued_tokens += flight.tokens

    def _perhaps_full(self, worker: SimulatedWorker) -> None:
        if self._buggify.strikes:
            raise NoCapacity(f"{worker.name} is taken to be full")

    def on_step(self, worker: SimulatedWorker, step: ScheduledStep) -> None:
        """A machine has run a step: tokens and outputs come out."""
        flights = self.flights
        now_ns = self._heap.now_ns
        for chunk in step.chunks:
            flight = flights.get(chunk.request_id)
            if flight is None:
                continue
            if len(flight.hops) > 1:
                self._came_out(flight, worker, chunk)
            elif flight.hops and chunk.samples:
                end = chunk.start + chunk.tokens
                assert end == flight.tokens, (
                    f"{worker.name} sampled what follows position {end} of {flight.id}, which has {flight.tokens}"
                )
                self._sampled(flight, worker, now_ns)

    def _sampled(self, flight: Flight, worker: SimulatedWorker, now_ns: int) -> None:
        hop = flight.hops[0]
        if hop.computed != hop.known:
            worker.queued_tokens = max(0, worker.queued_tokens - hop.known)
            hop.computed = hop.known
        arrival_ns = self._network.send(worker.name, GATEWAY, TOKEN_BYTES, now_ns)
        if arrival_ns is None:
            return  # The gateway will give this machine up, and the request goes on elsewhere.
        self._owner.took_token(flight, flight.take_token(arrival_ns))
        if flight.produced == flight.output_tokens:
            worker.finish(flight.id)
            worker.sessions -= 1
            flight.hops = []
            self._owner.finished(flight)
        else:
            worker.scheduler.append(flight.id, 0, 0)

    # A request over several machines.

    def _opened(self, what: tuple[Flight, int]) -> None:
        flight, epoch = what
        if epoch == flight.epoch and self._open_all(flight):
            self._feed_first(flight, 0)

    def _open_all(self, flight: Flight) -> bool:
        """Open the request at those hops that do not have it; False if one is gone or has no room."""
        for place, hop in enumerate(flight.hops):
            worker = hop.worker
            if not worker.up:
                self._owner.lost(flight, worker.peer)
                return False
            if hop.opened:
                continue
            try:
                self._perhaps_full(worker)
                worker.submit(
                    NewRequest(
                        id=flight.id,
                        token_ids=(),
                        max_sequence_tokens=flight.max_tokens,
                        priority=flight.number,
                        fed=True,
                    ),
                    Round(chain=flight.chain, first=place == 0),
                )
            except NoCapacity:
                self.close(flight)
                self._owner.refused(flight, worker.peer)
                return False
            except BadRequest as error:
                self.close(flight)
                self._owner.impossible(flight, error.message)
                return False
            hop.opened = True
        return True

    def _resume(self, what: tuple[Flight, int]) -> None:
        flight, epoch = what
        if epoch != flight.epoch or not self._open_all(flight):
            return
        flight.fenced = False
        hops = flight.hops
        planned = plan_resume([hop.computed for hop in hops], [0] * len(hops), flight.tokens)
        for place, hop in enumerate(hops):
            kept, goes_on = hop.computed, planned[place]
            hop.computed = goes_on
            hop.worker.queued_tokens = max(0, hop.worker.queued_tokens - max(0, hop.known - kept))
            hop.known, hop.early = goes_on, None
            hop.worker.between_steps(self._rewind, (flight, flight.epoch, hop, goes_on))
            if place + 1 < len(hops):
                hop.sent = planned[place + 1]
                if kept > hop.sent:  # It kept these outputs, and need not compute them again.
                    self._send_on(flight, place, kept)
        self._feed_first(flight, planned[0])

    def _rewind(self, what: tuple[Flight, int, HopProgress, int]) -> None:
        flight, epoch, hop, start = what
        if epoch == flight.epoch:
            hop.worker.scheduler.extend(flight.id, start, ())

    def _feed_first(self, flight: Flight, start: int) -> None:
        count = flight.tokens - start
        if count:
            self._send_rows(flight, GATEWAY, 0, start, count, _ID_BYTES * count)

    def _came_out(self, flight: Flight, worker: SimulatedWorker, chunk: ScheduledChunk) -> None:
        end = chunk.start + chunk.tokens
        place = next((place for place, hop in enumerate(flight.hops) if hop.worker is worker), None)
        if place is None:
            return  # It left this machine while the step ran.
        hop = flight.hops[place]
        if end > hop.known:
            return  # Of before a rewind.
        if end > hop.computed:
            worker.queued_tokens = max(0, worker.queued_tokens - (end - hop.computed))
            hop.computed = end
        if flight.fenced:
            return
        worker.rounds[flight.id].leave(self._heap.now_s)
        if place + 1 < len(flight.hops):
            if end > hop.sent:
                self._send_on(flight, place, end)
        elif end == flight.tokens:
            self._last_hop_sampled(flight, hop)

    def _send_on(self, flight: Flight, place: int, end: int) -> None:
        """Send the outputs up to a position to the next hop."""
        hop = flight.hops[place]
        start, hop.sent = hop.sent, end
        row_bytes = hop.worker.spec.costs.hidden_bytes_per_token
        self._send_rows(flight, hop.worker.name, place + 1, start, end - start, (end - start) * row_bytes)

    def _send_rows(
        self, flight: Flight, sender: str, place: int, start: int, count: int, size_bytes: int
    ) -> None:
        receiver = flight.hops[place].worker.name
        what = (flight, flight.epoch, place, start, count)
        self._send(sender, receiver, size_bytes, self._delivered, what, flight)

    def _delivered(self, what: tuple[Flight, int, int, int, int]) -> None:
        flight, epoch, place, _, count = what
        if epoch != flight.epoch or not flight.hops[place].worker.up:
            return
        worker = flight.hops[place].worker
        worker.queued_tokens += count
        worker.rounds[flight.id].come_back(self._heap.now_s)
        worker.between_steps(self._feed, what)

    def _feed(self, what: tuple[Flight, int, int, int, int]) -> None:
        flight, epoch, place, start, count = what
        if epoch == flight.epoch:
            hop = flight.hops[place]
            if start > hop.known:
                # Hops behind a replaced one sample the next token while this one still waits for the gateway's message.
                hop.early = start, count
                return
            hop.worker.scheduler.extend(flight.id, start, [0] * count)
            hop.known = start + count
            if hop.early is not None and hop.early[0] == hop.known:
                (start, count), hop.early = hop.early, None
                self._feed((flight, epoch, place, start, count))

    def _last_hop_sampled(self, flight: Flight, hop: HopProgress) -> None:
        now_ns, name = self._heap.now_ns, hop.worker.name
        arrival_ns = self._network.send(name, GATEWAY, TOKEN_BYTES, now_ns)
        if arrival_ns is None:
            return
        self._owner.took_token(flight, flight.take_token(arrival_ns))
        if flight.produced == flight.output_tokens:
            what = (flight, flight.epoch)
            self._heap.at(arrival_ns, EventKind.DELIVERED, f"{flight.id}>end", self._ended, what)
        else:
            self._send_rows(flight, name, 0, flight.tokens - 1, 1, TOKEN_BYTES)

    def _ended(self, what: tuple[Flight, int]) -> None:
        flight, epoch = what
        del epoch  # Whatever happened to the chain since, the client has it all.
        if flight.id in self.flights:
            self.close(flight)
            self._owner.finished(flight)

    # Messages.

    def _after_round_trip(
        self,
        workers: list[SimulatedWorker],
        flight: Flight,
        action: Callable[[tuple[Flight, int]], None],
    ) -> None:
        """Do something when all machines of a chain have been asked and have answered."""
        farthest_s = max(self._network.one_way_s(GATEWAY, worker.name) for worker in workers)
        what = (flight, flight.epoch)
        self._heap.after(2 * farthest_s, EventKind.DELIVERED, f"{flight.id}>open", action, what)

    def _send(
        self,
        sender: str,
        receiver: str,
        size_bytes: int,
        action: Callable[..., None],
        what: tuple[object, ...],
        flight: Flight,
    ) -> None:
        arrival_ns = self._network.send(sender, receiver, size_bytes, self._heap.now_ns)
        if arrival_ns is not None:
            self._heap.at(arrival_ns, EventKind.DELIVERED, f"{flight.id}>{receiver}", action, what)
