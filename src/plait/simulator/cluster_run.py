"""A cluster on a heap of events: requests arrive, the live router and schedulers decide, cost models say how long.

`ClusterRun` owns nothing that decides: chains come from `plait.routing` (simulated_gateway.py), steps from
`plait.scheduling` (simulated_worker.py). It brings the requests in, keeps those that nobody has room for, carries out
faults, moves requests off machines that are gone, and asserts after every event that the books agree.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from plait.errors import NoRoute
from plait.ids import PeerId, RequestId
from plait.routing import Chain, RouteWish
from plait.scheduling import ScheduledStep
from plait.simulator.buggify import Buggify
from plait.simulator.cluster_faults import FaultInjector
from plait.simulator.data_path import DataPath
from plait.simulator.event_heap import EventHeap, EventKind, ns_of
from plait.simulator.faults_of_run import RunFault
from plait.simulator.flight import Flight, HopProgress
from plait.simulator.outcomes import Ending, Outcomes
from plait.simulator.random_streams import stream
from plait.simulator.simulated_gateway import SimulatedGateway
from plait.simulator.simulated_lending import SimulatedLending
from plait.simulator.simulated_network import NetworkSpec, SimulatedNetwork
from plait.simulator.simulated_worker import MachineSpec, SimulatedWorker
from plait.simulator.timeline import Timeline
from plait.simulator.virtual_loop import Deadlock
from plait.workload import PROMPT_BLOCK_TOKENS, TraceRequest

RETRY_S = 1.0
"""As sessions do (`SessionTimes.retry_s`)."""
Asks = Literal["answer", "power-of-two", "context"]
_NAMED = 12
_PROGRESS_EVENTS = 4096
_GROUPS = 10
_OWN_PROMPT = 2**31  # above all numbers of blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run goes.

    `sessions_per_machine`: the gateway gives no machine more at once (None: as many as it takes); who finds no room
    waits at the gateway in order of arrival, for at most `patience_s`. `announce_s`: how often a machine says what it
    has to do. `max_model_tokens`: longer requests are refused at once. `asks`: what clients ask room for, who may know
    how long their answers will be (`answer`), to the next power of two (`power-of-two`), or not at all, and ask for
    `max_model_tokens` (`context`): Kwon et al. 2023, section 6.1. `silence_s`: a machine that is not heard of for so
    long is given up. `loan_wait_s`: a request that lacks memory, and to which nobody lends any for so long, fails.
    `buggify_fraction`: how often rare branches are taken all the same (buggify.py). `check`: walk all books after every
    event, after every `check_every`-th, or at the end only.
    """

    seed: int = 0
    wish: RouteWish = field(default_factory=RouteWish)
    sessions_per_machine: int | None = None
    max_model_tokens: int | None = None
    asks: Asks = "answer"
    patience_s: float = 120.0
    announce_s: float = 5.0
    silence_s: float = 3.0
    loan_wait_s: float = 60.0
    buggify_fraction: float = 0.0
    check: Literal["event", "some", "end"] = "some"
    check_every: int = 100_000


class ClusterRun:
    """One run over one cluster; `run` it to its end, or to an event."""

    def __init__(
        self,
        machines: Sequence[MachineSpec],
        network: NetworkSpec,
        *,
        model_blocks: int,
        options: RunOptions,
        requests: Iterable[TraceRequest],
        faults: Sequence[RunFault] = (),
        timeline: Timeline | None = None,
    ) -> None:
        self.options = options
        self.heap = EventHeap(options.seed)
        self.outcomes = Outcomes()
        self.timeline = timeline
        self.network = SimulatedNetwork(
            network, {machine.name: machine.site for machine in machines}, silence_s=options.silence_s
        )
        self._buggify = Buggify(options.seed, options.buggify_fraction)
        self.path = DataPath(self.heap, self.network, self, self._buggify)
        self.workers: dict[PeerId, SimulatedWorker] = {
            spec.peer: SimulatedWorker(spec, self.heap, self._on_step) for spec in machines
        }
        self.gateway = SimulatedGateway(
            self.workers,
            self.network,
            model_blocks=model_blocks,
            wish=options.wish,
            rng=stream(options.seed, "routing"),
        )
        self.lending: SimulatedLending | None = None
        if any(spec.lending is not None for spec in machines):
            self.lending = SimulatedLending(
                self.heap,
                self.network,
                self.workers.values(),
                wait_s=options.loan_wait_s,
                give_up=self._give_up,
            )
        self.blocks = range(model_blocks)
        self.offered = 0
        self.in_flight_ns = 0
        """Sum over time of the requests in flight: Little's law is checked with it."""
        self.peak_in_flight = 0
        self._counted_until_ns = 0
        self._late_ns = (
            0  # of last tokens, which were on their way to the client when their request was over here
        )
        self._requests: Iterator[tuple[int, TraceRequest]] = enumerate(requests)
        self._arriving = True
        self._waiting: list[Flight] = []
        self._retrying = False
        self._injector = FaultInjector(
            faults,
            heap=self.heap,
            network=self.network,
            gateway=self.gateway,
            workers=self.workers.values(),
            flights=self.path.flights,
            survivor=self,
            silence_s=options.silence_s,
            lending=self.lending,
        )
        self._stagger()
        self._await_next()

    # The run.

    def run(self, *, until_event: int | None = None, on_progress: Callable[[], None] | None = None) -> None:
        """Let events happen until every request is over, or until so many have happened; `on_progress` is called now
        and then.

        Raises:
            Deadlock: requests are left and nothing will ever happen to them.
            EventFailed, Livelock: see `EventHeap.step`.
        """
        heap, options = self.heap, self.options
        while self._arriving or self.path.flights or self._waiting:
            if until_event is not None and heap.events >= until_event:
                return
            if heap.idle and not (self.lending is not None and self.lending.hopes):
                raise Deadlock(self._deadlock())
            heap.step()
            if on_progress is not None and heap.events % _PROGRESS_EVENTS == 0:
                on_progress()
            if options.check == "event":
                heap.blame(self._check_touched)
            elif options.check == "some" and heap.events % options.check_every == 0:
                heap.blame(self.check)
        if self.lending is not None:
            self.lending.drain()
        self._finish()

    def settle(self) -> None:
        """Count what machines have done so far, in a run that somebody ended: for a report of it."""
        self._count_in_flight()
        for worker in self.workers.values():
            worker.note_counts()

    def check(self, *, touched_only: bool = False, empty: bool = False) -> None:
        """Assert the invariants of all books: schedulers, pools, sessions, requests. With `touched_only`, schedulers
        and pools only of those machines that something happened to since the last time."""
        crossing: dict[PeerId, int] = dict.fromkeys(self.workers, 0)
        for flight in self.path.flights.values():
            for hop in flight.hops:
                crossing[hop.worker.peer] += 1
                assert 0 <= hop.computed <= hop.known <= flight.max_tokens
            assert flight.produced <= flight.output_tokens
        for peer, worker in self.workers.items():
            assert worker.sessions == crossing[peer], (
                f"{worker.name} counts {worker.sessions} sessions, {crossing[peer]} cross it"
            )
            if worker.touched or not touched_only:
                worker.touched = False
                worker.check(empty=empty)
        if self.lending is not None:
            self.lending.check(touched_only=touched_only, empty=empty)
        assert len(self.path.flights) + len(self.outcomes) == self.offered, (
            "a request was lost or counted twice"
        )

    def _check_touched(self) -> None:
        self.check(touched_only=True)

    def _check_chain(self, chain: Chain, blocks: range, without: frozenset[PeerId]) -> None:
        """Assert that what the router answers is a chain of these blocks over machines that may be in it."""
        end = blocks.start
        for hop in chain:
            name = self.workers[hop.peer].name
            assert self.gateway.knows(hop.peer), f"the router chose {name}, which is known to be gone"
            assert hop.peer not in without, f"the router chose {name}, which was to be left out"
            assert hop.span.start == end < hop.span.stop, (
                f"the chain has a gap, or an overlap, at block {end}"
            )
            end = hop.span.stop
        assert end == blocks.stop, f"the chain ends before block {blocks.stop}"

    def _finish(self) -> None:
        """Everything is over: nothing may be left, and the mean in flight is rate times mean time (Little 1961)."""
        self.settle()
        self.check(empty=True)
        told = sum(tokens - 1 for tokens in self.outcomes.output_tokens if tokens)
        assert len(self.outcomes.gaps_s) == told, "a token was told twice, or not at all"
        times_ns = sum(map(ns_of, self.outcomes.end_s))
        assert abs(times_ns - self._late_ns - self.in_flight_ns) <= len(self.outcomes), (
            f"requests were in flight for {self.in_flight_ns} ns together, and say {times_ns - self._late_ns} ns"
        )

    # Requests come, go and wait.

    def took_token(self, flight: Flight, gap_ns: int) -> None:
        """The client gets a token."""
        if flight.produced > 1:
            self.outcomes.gaps_s.append(gap_ns / 1e9)

    def finished(self, flight: Flight) -> None:
        """A request has all its tokens."""
        assert flight.produced == flight.output_tokens
        self._end(flight, "finished")

    def refused(self, flight: Flight, peer: PeerId) -> None:
        """A machine has no room: another one, or wait."""
        self.gateway.ended(flight.peers)
        flight.chain = ()
        flight.refused_by |= {peer}
        self._route(flight)

    def impossible(self, flight: Flight, reason: str) -> None:
        """It can never be served."""
        self._end(flight, "failed" if flight.produced else "refused", reason)

    def lost(self, flight: Flight, peer: PeerId) -> None:
        """A machine of its chain is not there: go on without it."""
        self.recover(flight, frozenset({peer}))

    def recover(self, flight: Flight, lost: frozenset[PeerId]) -> None:
        """Move a request off machines that are gone, keeping what the others know."""
        if flight.produced == flight.output_tokens or flight.id not in self.path.flights:
            return
        flight.retries += 1
        kept = [hop for hop in flight.hops if hop.worker.peer not in lost and hop.opened]
        if len(flight.hops) > 1 and kept and not self._buggify.strikes:
            try:
                mended = self._mended(flight, lost)
            except NoRoute:
                mended = None
            if mended is not None:
                self.path.close(flight, but=kept)
                progress = {hop.worker.peer: hop for hop in kept}
                self.gateway.ended([peer for peer in flight.peers if peer not in progress])
                flight.chain = mended
                hops = [progress.get(hop.peer) or HopProgress(self.workers[hop.peer]) for hop in mended]
                self.path.mend(flight, hops)
                self._injector.watch(flight)
                return
        self.gateway.ended(flight.peers)
        self.path.close(flight)
        flight.chain = ()
        flight.refused_by |= lost
        self._route(flight)

    def welcome(self) -> None:
        """There may be room again: those who wait try in order of arrival."""
        self._admit(len(self._waiting))

    def _admit(self, most: int) -> None:
        for _ in range(min(most, len(self._waiting))):
            flight = self._waiting[0]
            if not self._try(flight):
                return
            del self._waiting[0]
            flight.waits_since_ns = None

    def _mended(self, flight: Flight, lost: frozenset[PeerId]) -> Chain:
        """The chain with each gap bridged by the router."""
        opened = {hop.worker.peer for hop in flight.hops if hop.opened}
        stays = [hop for hop in flight.chain if hop.peer not in lost and hop.peer in opened]
        avoided = lost | {hop.peer for hop in flight.chain}
        chain: list[Chain] = []
        end, after = self.blocks.start, None
        for hop in stays:
            if hop.span.start > end:
                gap = range(end, hop.span.start)
                chain.append(
                    self.gateway.choose(gap, flight.max_tokens, without=avoided, after=after, before=hop.peer)
                )
                avoided |= {found.peer for found in chain[-1]}
            chain.append((hop,))
            end, after = hop.span.stop, hop.peer
        if end < self.blocks.stop:
            gap = range(end, self.blocks.stop)
            chain.append(self.gateway.choose(gap, flight.max_tokens, without=avoided, after=after))
        whole = tuple(hop for part in chain for hop in part)
        self._check_chain(whole, self.blocks, lost)
        return whole

    def _arrive(self, what: tuple[int, TraceRequest]) -> None:
        number, request = what
        self.offered += 1
        self._count_in_flight()
        flight = Flight(
            id=RequestId(f"r{number}"),
            number=number,
            arrival_ns=self.heap.now_ns,
            prompt=prompt_of(number, request),
            output_tokens=request.output_tokens,
            max_tokens=self._asked_tokens(request),
        )
        self.path.flights[flight.id] = flight
        self.peak_in_flight = max(self.peak_in_flight, len(self.path.flights))
        self._await_next()
        most = self.options.max_model_tokens
        if request.prompt_tokens + request.output_tokens > (most or math.inf):
            self._end(flight, "refused", f"the model takes at most {most} tokens, prompt and answer together")
        else:
            self._route(flight)

    def _asked_tokens(self, request: TraceRequest) -> int:
        """The length that a client asks room for, prompt included."""
        asks, most, answer = self.options.asks, self.options.max_model_tokens, request.output_tokens
        if asks == "context" and most is not None:
            return most
        if asks == "power-of-two":
            answer = 1 << (answer - 1).bit_length()
        asked = request.prompt_tokens + answer
        return asked if most is None else min(asked, most)

    def _route(self, flight: Flight) -> None:
        """Give a request a chain, or let it wait."""
        if (self._waiting and flight.retries == 0) or not self._try(flight):
            self._wait(flight)

    def _try(self, flight: Flight) -> bool:
        full = self._full()
        without = flight.refused_by | full
        if len(without) >= len(self.workers):
            return False
        try:
            chain = self.gateway.choose(self.blocks, flight.max_tokens, without=without)
        except NoRoute:
            return False
        self._check_chain(chain, self.blocks, without)
        flight.chain = chain
        self.path.start(flight, [self.workers[hop.peer] for hop in chain])
        self._injector.watch(flight)
        return True

    def _full(self) -> frozenset[PeerId]:
        most = self.options.sessions_per_machine
        if most is None:
            return frozenset()
        return frozenset(peer for peer, worker in self.workers.items() if worker.sessions >= most)

    def _wait(self, flight: Flight) -> None:
        """Keep a request at the gateway, in order of arrival; it tries when another one ends, and now and then."""
        flight.waits_since_ns = self.heap.now_ns
        flight.refused_by = frozenset()
        insort(self._waiting, flight, key=attrgetter("number"))
        if not self._retrying:
            self._retrying = True
            self.heap.after(RETRY_S, EventKind.NOTICED, "retry", self._retry, None)
        since = flight.waits_since_ns
        self.heap.after(
            self.options.patience_s,
            EventKind.NOTICED,
            f"{flight.id}>patience",
            self._lose_patience,
            (flight, since),
        )

    def _retry(self, nothing: None) -> None:
        del nothing
        self._retrying = bool(self._waiting)
        if self._waiting:
            self.heap.after(RETRY_S, EventKind.NOTICED, "retry", self._retry, None)
            self._admit(1)

    def _lose_patience(self, what: tuple[Flight, int]) -> None:
        flight, since_ns = what
        if flight.waits_since_ns != since_ns or flight not in self._waiting:
            return
        self._waiting.remove(flight)
        waited = f"no machine had room, or none served some blocks, for {self.options.patience_s:g} s"
        self._end(flight, "failed" if flight.produced else "refused", waited)

    def _give_up(self, request_id: RequestId) -> None:
        """It needs more memory than a machine has, and for too long nobody lent any."""
        flight = self.path.flights.get(request_id)
        if flight is not None:
            self.path.close(flight)
            self.impossible(
                flight, f"nobody lent the KV blocks that it needs within {self.options.loan_wait_s:g} s"
            )

    def _end(self, flight: Flight, ending: Ending, reason: str = "") -> None:
        self._count_in_flight()
        del self.path.flights[flight.id]
        if flight.chain:
            self.gateway.ended(flight.peers)
        end_ns = flight.last_ns if ending == "finished" else self.heap.now_ns
        self._late_ns += end_ns - self.heap.now_ns
        self.outcomes.add(
            number=flight.number,
            arrival_s=flight.arrival_ns / 1e9,
            prompt_tokens=len(flight.prompt),
            output_tokens=flight.produced,
            first_s=flight.since_arrival_s(flight.first_ns) if flight.first_ns else 0.0,
            end_s=flight.since_arrival_s(end_ns),
            widest_gap_s=flight.widest_gap_ns / 1e9,
            retries=flight.retries,
            ending=ending,
            reason=reason,
        )
        if self.timeline is not None:
            self.timeline.request(flight, ending)
        if self._waiting:
            self._admit(1)

    # Clockwork.

    def _on_step(self, worker: SimulatedWorker, step: ScheduledStep, began_ns: int) -> None:
        if self.timeline is not None:
            self.timeline.step(worker, step, began_ns, self.heap.now_ns)
        self.path.on_step(worker, step)

    def _await_next(self) -> None:
        following = next(self._requests, None)
        if following is None:
            self._arriving = False
            return
        number, request = following
        at_ns = max(ns_of(request.arrival_s), self.heap.now_ns)
        self.heap.at(at_ns, EventKind.ARRIVAL, f"r{number}", self._arrive, following)

    def _stagger(self) -> None:
        """Machines announce at different times: a tenth of them at a time."""
        workers = list(self.workers.values())
        for group in range(_GROUPS):
            if workers[group::_GROUPS]:
                delay_s = self.options.announce_s * (group + 1) / _GROUPS
                self.heap.after(delay_s, EventKind.TICK, f"announce {group}", self._announce, group)

    def _announce(self, group: int) -> None:
        for worker in list(self.workers.values())[group::_GROUPS]:
            if self._injector.heard(worker) and not self._buggify.strikes:
                self.gateway.hear(worker)
        self.heap.after(self.options.announce_s, EventKind.TICK, f"announce {group}", self._announce, group)

    def _count_in_flight(self) -> None:
        now_ns = self.heap.now_ns
        self.in_flight_ns += len(self.path.flights) * (now_ns - self._counted_until_ns)
        self._counted_until_ns = now_ns

    def _deadlock(self) -> str:
        left = list(self.path.flights.values())
        named = "\n".join(flight.standing() for flight in left[:_NAMED])
        return (
            f"{len(left)} requests will never end: nothing is to come after event {self.heap.events} of seed "
            f"{self.options.seed}, at {self.heap.now_s:.9f} s\n{named}"
        )


def prompt_of(number: int, request: TraceRequest) -> list[int]:
    """Token ids that stand for a prompt: equal up to the end of equal blocks (`TraceRequest.prompt_blocks`); without
    blocks, different from all others' from the first token on."""
    prompt = [0] * request.prompt_tokens
    prompt[0] = _OWN_PROMPT + number
    for place, block in enumerate(request.prompt_blocks):
        prompt[place * PROMPT_BLOCK_TOKENS] = block
    return prompt
