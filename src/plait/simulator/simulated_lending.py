"""Lending among the machines of a run: who lends to each other, messages between their agents, and what must hold.

Machines with the same blocks of the model form a group. Each hears of the others what a live one would: that a
connection closed, or that nothing came for `silence_s`; then it loses what it has there. Messages have the sizes of
the live ones, and the content of a block occupies its link like everything else. What was sent before either end
crashed does not arrive: the connection was another one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from plait.ids import PeerId, RequestId
from plait.kvcache import LentBlock
from plait.simulator.event_heap import EventHeap, EventKind, ns_of
from plait.simulator.simulated_lender import SimulatedLender
from plait.simulator.simulated_network import SimulatedNetwork
from plait.simulator.simulated_worker import SimulatedWorker
from plait.wire import LoanBooking, LoanKeep, encode_message

DRAIN_LEASES = 4
"""At the end, debts must be gone within so many leases of the longest."""


@dataclass(frozen=True, slots=True)
class _Posted:
    sender: SimulatedLender
    sender_life: int
    receiver: SimulatedLender
    receiver_life: int
    message: LoanBooking


class SimulatedLending:
    """All lending ends of a run."""

    def __init__(
        self,
        heap: EventHeap,
        network: SimulatedNetwork,
        workers: Iterable[SimulatedWorker],
        *,
        wait_s: float,
        give_up: Callable[[RequestId], None],
    ) -> None:
        self._heap = heap
        self._network = network
        self._wait_ns = ns_of(wait_s)
        self._give_up = give_up
        self._silent: set[PeerId] = set()
        self._lenders: dict[PeerId, SimulatedLender] = {}
        self._seen: dict[PeerId, tuple[int, frozenset[tuple[PeerId, int]]]] = {}
        for worker in workers:
            if worker.spec.lending is not None:
                lender = SimulatedLender(worker, worker.spec.lending, heap, network, self)
                worker.lender = self._lenders[worker.peer] = lender
        self.change_groups()
        count = len(self._lenders)
        for place, lender in enumerate(self._lenders.values()):
            beat_s = lender.spec.options.heartbeat_s
            heap.after(
                beat_s * (place + 1) / count,
                EventKind.TICK,
                f"{lender.worker.name} lends",
                self._tick,
                lender,
            )

    @property
    def lenders(self) -> tuple[SimulatedLender, ...]:
        """All of them, in the order of the machines."""
        return tuple(self._lenders.values())

    def lender(self, peer: PeerId) -> SimulatedLender | None:
        """A machine's end; None if it lends nothing."""
        return self._lenders.get(peer)

    def post(self, sender: SimulatedLender, peer: PeerId, message: LoanBooking, content_bytes: int) -> None:
        """Send a message, with the content of a block maybe."""
        receiver = self._lenders.get(peer)
        if receiver is None or not receiver.worker.up:
            return
        size_bytes = len(encode_message(message)) + content_bytes
        sender.totals.message_bytes += size_bytes - content_bytes
        names = sender.worker.name, receiver.worker.name
        arrival_ns = self._network.send(*names, size_bytes, self._heap.now_ns)
        if arrival_ns is None:
            return
        what = _Posted(sender, sender.life, receiver, receiver.life, message)
        name = f"{names[0]}>{names[1]} {type(message).__name__}"
        self._heap.at(arrival_ns, EventKind.DELIVERED, name, self._arrive, what)

    def change_groups(self) -> None:
        """Machines came, went, or noticed that they do not hear each other: tell each who is there."""
        for lender in self._lenders.values():
            if not lender.worker.up:
                self._seen.pop(lender.worker.peer, None)
                continue
            there = frozenset((other.worker.peer, other.life) for other in self._reachable(lender))
            known = self._seen.get(lender.worker.peer)
            if known == (lender.life, there):
                continue
            self._seen[lender.worker.peer] = lender.life, there
            before = (
                known[1] if known is not None and known[0] == lender.life else frozenset[tuple[PeerId, int]]()
            )
            gone = sorted(peer for peer, _ in before - there)
            if any(lender.asks(peer) for peer in gone):
                lender.worker.undo_step()
            what = lender, lender.life, gone, sorted(peer for peer, _ in there)
            lender.worker.between_steps(self._tell, what)

    def lose_sight(self, worker: SimulatedWorker) -> None:
        """Nothing was heard of a machine for too long: the others give it up, until it is back."""
        self._silent.add(worker.peer)
        self.change_groups()

    def see_again(self, worker: SimulatedWorker) -> None:
        """A machine is heard again."""
        self._silent.discard(worker.peer)
        self.change_groups()

    @property
    def hopes(self) -> bool:
        """Whether somebody stands still for want of blocks, and may still get some."""
        return any(lender.worker.up and lender.starving is not None for lender in self._lenders.values())

    @property
    def quiet(self) -> bool:
        """Whether nothing is lent or borrowed any more."""
        books = [lender.agent.loans for lender in self._lenders.values() if lender.worker.up]
        return all(not book.debts.borrowed_blocks and not book.book.lent_blocks for book in books)

    def drain(self) -> None:
        """All requests are over: let what is still lent come back, for a few leases at most."""
        leases_s = [lender.spec.terms.lease_s for lender in self._lenders.values()]
        until_ns = self._heap.now_ns + ns_of(DRAIN_LEASES * max(leases_s))
        while not self.quiet and self._heap.now_ns < until_ns:
            self._heap.step()

    def check(self, *, touched_only: bool, empty: bool) -> None:
        """Assert that books agree with themselves, and that no block is two debtors' at once; with `touched_only`, only
        if any book changed since the last time."""
        if touched_only and not any(lender.touched for lender in self._lenders.values()):
            return
        owners: dict[tuple[PeerId, LentBlock], PeerId] = {}
        for debtor, lender in self._lenders.items():
            if not lender.worker.up:
                continue
            lender.touched = False
            lender.check()
            for creditor, block in lender.debts():
                other = owners.setdefault((creditor, block), debtor)
                assert other == debtor, (
                    f"block {block.kv_block} (generation {block.generation}) of {self._name(creditor)} is in the "
                    f"books of both {self._name(other)} and {lender.worker.name}"
                )
        assert not empty or self.quiet, "something is still lent though all requests are over"

    def _name(self, peer: PeerId) -> str:
        return self._lenders[peer].worker.name

    def _arrive(self, posted: _Posted) -> None:
        worker = posted.receiver.worker
        if posted.sender.life != posted.sender_life or posted.receiver.life != posted.receiver_life:
            return
        if not worker.up or not posted.sender.worker.up:
            return
        if worker.silent_until_ns > self._heap.now_ns:
            name = f"{worker.name} reads {type(posted.message).__name__}"
            self._heap.at(worker.silent_until_ns, EventKind.DELIVERED, name, self._arrive, posted)
            return
        worker.between_steps(self._hear, posted, wakes=False)

    def _hear(self, posted: _Posted) -> None:
        posted.receiver.hear(posted.sender.worker.peer, posted.message)

    def _tick(self, lender: SimulatedLender) -> None:
        worker = lender.worker
        if worker.up and worker.silent_until_ns <= self._heap.now_ns:
            if worker.computes:
                self._keep(lender)
            if not lender.ticks:
                lender.ticks = True
                worker.between_steps(self._beat, (lender, lender.life), wakes=False)
        beat_s = lender.spec.options.heartbeat_s
        self._heap.after(beat_s, EventKind.TICK, f"{worker.name} lends", self._tick, lender)

    def _beat(self, what: tuple[SimulatedLender, int]) -> None:
        lender, life = what
        if lender.life == life:
            lender.ticks = False
            lender.carry_out(lender.agent.on_tick(self._heap.now_s))
            starving = lender.starving
            if starving is not None and self._heap.now_ns - lender.starves_since_ns >= self._wait_ns:
                lender.starving = None
                self._give_up(starving)

    def _keep(self, lender: SimulatedLender) -> None:
        """A long step is no silence: its creditors hear that it lives."""
        for creditor in lender.agent.loans.debts.borrowed_from():
            self.post(lender, creditor, LoanKeep(), 0)

    def _tell(self, what: tuple[SimulatedLender, int, list[PeerId], list[PeerId]]) -> None:
        lender, life, gone, there = what
        if lender.life != life:
            return
        agent, now_s, name = lender.agent, self._heap.now_s, lender.worker.name
        for peer in gone:
            lender.carry_out(agent.on_gone(peer, now_s))
        distances = {
            peer: self._network.one_way_s(name, self._name(peer))
            for peer in there
            if peer != lender.worker.peer
        }
        lender.carry_out(agent.set_group(there, distances, now_s))

    def _reachable(self, lender: SimulatedLender) -> list[SimulatedLender]:
        """The group that a machine is in, as it knows it: itself, and whom it still hears."""
        now_ns, name = self._heap.now_ns, lender.worker.name
        found: list[SimulatedLender] = []
        for other in self._lenders.values():
            if other.worker.spec.blocks != lender.worker.spec.blocks or not other.worker.up:
                continue
            if other is not lender:
                lost_ns = self._network.given_up_ns(name, other.worker.name, now_ns)
                if other.worker.peer in self._silent or (lost_ns is not None and lost_ns <= now_ns):
                    continue
            found.append(other)
        return found
