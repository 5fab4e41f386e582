"""The machines of a trial: those of the beginning, those that join, and those that come back."""

import asyncio
from collections.abc import Callable

import numpy as np

from plait.ids import PeerId
from plait.session import SessionTimes
from plait.simulator.fault_schedule import FaultSchedule, MachinePlan
from plait.simulator.machine import GatewayMachine, Machine, Observer, WorkerMachine
from plait.simulator.virtual_loop import VirtualLoop
from plait.transport import MemoryNet, TicketPeer
from plait.worker import SwarmOptions

TIMES = SessionTimes(opening_s=30.0, answer_s=5.0, token_s=8.0, recovery_s=40.0)
STARTED_BY_S = 30.0
"""When all machines of the beginning must be there."""
_GATEWAY = "gateway"


class TrialSwarm:
    """A gateway and its workers on one `net`; `on_machine` is told of each machine before it starts.

    `machines` are all that ever were; `workers` the latest of each name, since one that was killed may start again.
    """

    def __init__(
        self, schedule: FaultSchedule, observer: Observer, on_machine: Callable[[Machine], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.net = MemoryNet(schedule.wire, seed=schedule.seed)
        self.machines: list[Machine] = []
        self.workers: dict[str, WorkerMachine] = {}
        self.joined_s = 0.0
        """When the latest machine joined, after the beginning."""
        self.closed = False
        """Whether nobody joins any more."""
        self._loop = loop
        self._schedule = schedule
        self._observer = observer
        self._on_machine = on_machine
        self._names: dict[PeerId, str] = {}
        self.gateway = GatewayMachine(
            _GATEWAY,
            self.net,
            rng=self._rng(_GATEWAY),
            options=SwarmOptions(draft_tokens=schedule.draft_tokens, times=TIMES),
            observer=observer,
        )

    async def start(self) -> None:
        """Start the machines of the beginning, and wait until all know all."""
        self._add(self.gateway)
        await self.gateway.up.wait()
        for plan in self._schedule.machines:
            if not plan.joins_s:
                self._add_worker(plan)
        async with asyncio.timeout(STARTED_BY_S):
            while any(len(machine.membership.records()) < len(self.machines) for machine in self.machines):
                await asyncio.sleep(0.1)

    def join(self, plan: MachinePlan) -> None:
        """Start a worker, for the first time or once more."""
        if not self.closed:
            self.joined_s = self._loop.time()
            self._add_worker(plan)

    def living_workers(self) -> list[WorkerMachine]:
        return [machine for machine in self.workers.values() if not machine.dead]

    def living(self) -> list[Machine]:
        return [machine for machine in self.machines if not machine.dead]

    def name(self, peer: PeerId) -> str:
        """Of a machine; for others, how their id begins."""
        return self._names.get(peer, peer[:6])

    def _add_worker(self, plan: MachinePlan) -> None:
        introducers = (TicketPeer(self.gateway.peer, (self.gateway.address,)),)
        earlier = next(iter(self.living_workers()), None)
        if earlier is not None:
            introducers += (TicketPeer(earlier.peer, (earlier.address,)),)
        machine = WorkerMachine(
            plan,
            self.net,
            rng=self._rng(plan.name),
            introducers=introducers,
            draft_tokens=self._schedule.draft_tokens,
            observer=self._observer,
        )
        self.workers[plan.name] = machine
        self._add(machine)

    def _add(self, machine: Machine) -> None:
        self._names[machine.peer] = machine.name
        self.machines.append(machine)
        self._on_machine(machine)
        machine.start()

    def _rng(self, name: str) -> np.random.Generator:
        """A component's own, so that one more draw of it changes nothing elsewhere."""
        return np.random.default_rng([self._schedule.seed, len(self.machines), *name.encode()])
