"""Carries out the faults of a run, and lets the gateway find out about them as it would: a closed connection at once,
silence after a while."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from plait.ids import PeerId, RequestId
from plait.simulator.event_heap import EventHeap, EventKind, ns_of
from plait.simulator.faults_of_run import RunFault, check_fault
from plait.simulator.flight import Flight
from plait.simulator.simulated_gateway import SimulatedGateway
from plait.simulator.simulated_lending import SimulatedLending
from plait.simulator.simulated_network import GATEWAY, SimulatedNetwork
from plait.simulator.simulated_worker import SimulatedWorker


class Survivor(Protocol):
    """Who goes on with the requests when something broke or came back."""

    def recover(self, flight: Flight, lost: frozenset[PeerId]) -> None:
        """Move a request off machines that are gone."""
        ...

    def welcome(self) -> None:
        """There may be room again."""
        ...


class FaultInjector:
    """Strikes and mends, by events. `flights`: all requests in flight, as they are at any time."""

    def __init__(
        self,
        faults: Sequence[RunFault],
        *,
        heap: EventHeap,
        network: SimulatedNetwork,
        gateway: SimulatedGateway,
        workers: Iterable[SimulatedWorker],
        flights: Mapping[RequestId, Flight],
        survivor: Survivor,
        silence_s: float,
        lending: SimulatedLending | None = None,
    ) -> None:
        self._heap = heap
        self._lending = lending
        self._network = network
        self._gateway = gateway
        self._flights = flights
        self._survivor = survivor
        self._by_name = {worker.name: worker for worker in workers}
        self._silence_ns = ns_of(silence_s)
        for fault in faults:
            check_fault(fault, list(self._by_name))
            name = f"{fault.kind} {','.join(fault.machines)}"
            self._heap.at(ns_of(fault.at_s), EventKind.FAULT, name, self._strike, fault)

    def heard(self, worker: SimulatedWorker) -> bool:
        """Whether the gateway hears a machine now."""
        now_ns = self._heap.now_ns
        return (
            worker.up
            and worker.silent_until_ns <= now_ns
            and self._network.given_up_ns(worker.name, GATEWAY, now_ns) is None
        )

    def watch(self, flight: Flight) -> None:
        """A request was given a chain: see to it that it does not wait for messages that cannot come."""
        if not self._network.faulty:
            return
        lost_at_ns = [at_ns for _, at_ns in self._broken(flight)]
        if lost_at_ns:
            what = (flight, flight.epoch)
            self._heap.at(min(lost_at_ns), EventKind.NOTICED, f"{flight.id}>silence", self._part, what)

    def _strike(self, fault: RunFault) -> None:
        end_ns = self._heap.now_ns + ns_of(fault.duration_s)
        workers = [self._by_name[name] for name in fault.machines]
        name = f"end of {fault.kind} {','.join(fault.machines)}"
        match fault.kind:
            case "crash":
                for worker in workers:
                    self._crash(worker, end_ns)
                return
            case "pause":
                for worker in workers:
                    worker.pause(end_ns)
                    if end_ns - self._heap.now_ns > self._silence_ns:
                        at_ns = self._heap.now_ns + self._silence_ns
                        self._heap.at(at_ns, EventKind.NOTICED, f"{worker.name} silent", self._silent, worker)
            case "slow_node":
                for worker in workers:
                    worker.slow(fault.strength)
            case "slow_link":
                for worker in workers:
                    self._network.slow(worker.name, ns_of(fault.strength))
            case "narrow_link":
                for worker in workers:
                    self._network.narrow(worker.name, fault.strength)
            case "squeeze":
                for worker in workers:
                    worker.squeeze(fault.strength)
            case "cut" | "partition":
                self._cut(workers, end_ns)
        self._heap.at(end_ns, EventKind.FAULT, name, self._mend, fault)

    def _mend(self, fault: RunFault) -> None:
        for name in fault.machines:
            worker = self._by_name[name]
            if fault.kind == "slow_node":
                worker.slow(1 / fault.strength)
            elif fault.kind == "slow_link":
                self._network.slow(name, -ns_of(fault.strength))
            elif fault.kind == "narrow_link":
                self._network.narrow(name, 1 / fault.strength)
            elif fault.kind == "squeeze":
                worker.relax()
            elif self.heard(worker):
                self._gateway.hear(worker)
            if self._lending is not None and worker.silent_until_ns <= self._heap.now_ns:
                self._lending.see_again(worker)
        self._survivor.welcome()

    def _crash(self, worker: SimulatedWorker, end_ns: int) -> None:
        if not worker.up:
            return
        worker.crash()
        noticed_ns = self._heap.now_ns + ns_of(self._network.one_way_s(worker.name, GATEWAY))
        self._heap.at(noticed_ns, EventKind.NOTICED, f"{worker.name} gone", self._gone, worker)
        back_ns = max(end_ns, noticed_ns + 1)
        self._heap.at(back_ns, EventKind.FAULT, f"restart of {worker.name}", self._restart, worker)

    def _restart(self, worker: SimulatedWorker) -> None:
        worker.restart()
        if self._lending is not None:
            self._lending.see_again(worker)
        if self.heard(worker):
            self._gateway.hear(worker)
        self._survivor.welcome()

    def _gone(self, worker: SimulatedWorker) -> None:
        self._gateway.lose(worker.peer)
        if self._lending is not None:
            self._lending.lose_sight(worker)
        for flight in list(self._flights.values()):
            if any(hop.worker is worker for hop in flight.hops):
                self._survivor.recover(flight, frozenset({worker.peer}))

    def _silent(self, worker: SimulatedWorker) -> None:
        if worker.up and worker.silent_until_ns > self._heap.now_ns:
            self._gone(worker)

    def _cut(self, workers: Sequence[SimulatedWorker], end_ns: int) -> None:
        now_ns = self._heap.now_ns
        self._network.cut(frozenset(worker.name for worker in workers), now_ns, end_ns)
        if end_ns - now_ns <= self._silence_ns:
            return
        for worker in workers:
            at_ns = now_ns + self._silence_ns
            self._heap.at(at_ns, EventKind.NOTICED, f"{worker.name} unheard", self._unheard, worker)
        for flight in self._flights.values():
            self.watch(flight)

    def _unheard(self, worker: SimulatedWorker) -> None:
        if not self.heard(worker):
            self._gateway.lose(worker.peer)
        if self._lending is not None:
            self._lending.change_groups()

    def _part(self, what: tuple[Flight, int]) -> None:
        flight, epoch = what
        if epoch == flight.epoch and (broken := self._broken(flight)):
            self._survivor.recover(flight, frozenset(peer for peer, _ in broken))

    def _broken(self, flight: Flight) -> list[tuple[PeerId, int]]:
        """Machines of a chain that somebody waits for in vain, and when that is noticed."""
        workers = [hop.worker for hop in flight.hops]
        if not workers:
            return []
        names = [worker.name for worker in workers]
        # A gateway that does not hear a hop gives it up, also where no token would come from there.
        ways = [(GATEWAY, place) for place in range(len(names))] + [(names[-1], 0)]
        ways += [(names[place - 1], place) for place in range(1, len(names))]
        broken: dict[PeerId, int] = {}
        for sender, place in ways:
            at_ns = self._network.given_up_ns(sender, names[place], self._heap.now_ns)
            if at_ns is not None:
                broken.setdefault(workers[place].peer, at_ns)
        return list(broken.items())
