"""Lets the faults of a schedule happen, and puts right those that pass."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from plait.simulator.fault_schedule import DISHONEST, HARMLESS, LETHAL, Fault, FaultKind, FaultSchedule
from plait.simulator.faulty_network import Mischief
from plait.simulator.machine import Machine, WorkerMachine
from plait.simulator.trial_swarm import TrialSwarm
from plait.simulator.virtual_loop import VirtualLoop
from plait.transport import Wire

_SWIZZLED = 4


class Havoc:
    """The faults of `schedule`, done to `swarm`; `note` and `on_strike` are told of each as it strikes.

    `struck`: those that found a victim. `liars`, `harmed`: machines that have lied, and that suffered something which
    is not harmless. `broken`: a forward pass was made to fail. `last_s`: when the last fault so far is over.
    """

    def __init__(
        self,
        schedule: FaultSchedule,
        swarm: TrialSwarm,
        *,
        note: Callable[[str], None],
        on_strike: Callable[[FaultKind], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.struck: Counter[FaultKind] = Counter()
        self.liars: set[str] = set()
        self.harmed: set[str] = set()
        self.broken = False
        self.last_s = loop.time()
        self._loop = loop
        self._schedule = schedule
        self._swarm = swarm
        self._note = note
        self._on_strike = on_strike
        self._to_come = list(enumerate(schedule.faults))
        self._undo: dict[int, Callable[[], None]] = {}
        self._over = False

    def given(self, tokens: int) -> None:
        """So many tokens have been given out: let those faults strike that they were to come before."""
        due = [(place, fault) for place, fault in self._to_come if fault.after_tokens <= tokens]
        for place, fault in due:
            self._to_come.remove((place, fault))
            # In nobody's process: it is to happen whoever is stopped by then.
            self._loop.call_later(fault.delay_s, self._strike, place, fault, context=self._swarm.net.context)

    def end(self) -> None:
        """Put everything right that can be; nothing strikes any more."""
        self._over = True
        for place in list(self._undo):
            self._put_right(place)

    def _strike(self, place: int, fault: Fault) -> None:
        if self._over:
            return
        victim: Machine | None = self._swarm.gateway
        if not fault.kind.endswith("_gateway"):
            victim = self._victim(fault)
        if victim is None or victim.dead:
            return
        self._note(f"FAULT {fault.kind} of {victim.name} for {fault.duration_s:.2f} s")
        self.struck[fault.kind] += 1
        if fault.kind not in HARMLESS:
            self.harmed.add(victim.name)
        if fault.kind in DISHONEST:
            self.liars.add(victim.name)
        self.broken |= fault.kind == "break"
        self.last_s = max(self.last_s, self._loop.time() + fault.duration_s)
        self._on_strike(fault.kind)
        undo = self._hurt(victim, fault)
        if undo is not None:
            self._undo[place] = undo
            self._loop.call_later(fault.duration_s, self._put_right, place)

    def _put_right(self, place: int) -> None:
        undo = self._undo.pop(place, None)
        if undo is not None:
            undo()

    def _victim(self, fault: Fault) -> WorkerMachine | None:
        """Who is struck: preferably one that a session crosses."""

        def may_be(machine: WorkerMachine) -> bool:
            spared = fault.kind in LETHAL and machine.plan.sheltered
            return not (machine.dead or machine.leaving or spared)

        swarm = self._swarm
        names = [swarm.name(hop.peer) for hops in swarm.gateway.engine.chains().values() for hop in hops]
        candidates = [swarm.workers[name] for name in names if name in swarm.workers]
        candidates = [machine for machine in candidates if may_be(machine)]
        if not candidates or fault.draw % 5 == 0:
            candidates = [machine for machine in swarm.workers.values() if may_be(machine)]
        return candidates[fault.draw % len(candidates)] if candidates else None

    # -- each of them; what is returned ends it ----------------------------------------------------------

    def _hurt(self, machine: Machine, fault: Fault) -> Callable[[], None] | None:
        net = self._swarm.net
        match fault.kind:
            case "kill" | "kill_gateway":
                return self._kill(machine, fault)
            case "vanish":
                machine.process.kill()
                net.freeze(machine.name)
            case "freeze" | "freeze_gateway":
                machine.process.stop()
                net.freeze(machine.name)
                return lambda: self._thaw(machine)
            case "swizzle":
                return self._swizzle(fault)
            case "partition" | "isolate":
                nodes = self._side(machine, fault)
                net.partition(nodes)
                return lambda: net.heal(nodes)
            case "mute":
                net.mute(machine.name)
                return lambda: net.unmute(machine.name)
            case "cut":
                for other in self._swarm.machines:
                    net.cut(machine.name, other.name)
            case "slow_link":
                return self._rewire(machine, Wire(delay_s=fault.strength / 3, jitter_s=fault.strength))
            case "narrow_link":
                return self._rewire(machine, Wire(bandwidth_bytes_per_s=fault.strength))
            case "slow_node":
                assert isinstance(machine, WorkerMachine)
                return self._slow_down(machine, fault.strength)
            case "duplicate" | "replay" | "reorder" | "lose" | "lie":
                return self._mislead(machine, fault.kind)
            case "break":
                assert isinstance(machine, WorkerMachine)
                machine.fail_next_step()
            case "leave":
                machine.leave()
        return None

    def _kill(self, machine: Machine, fault: Fault) -> Callable[[], None] | None:
        machine.process.kill()
        self._swarm.net.kill(machine.name)
        if not isinstance(machine, WorkerMachine) or fault.draw % 2:
            return None

        def restart() -> None:
            self._swarm.net.revive(machine.name)
            self._swarm.join(machine.plan)

        return restart

    def _swizzle(self, fault: Fault) -> Callable[[], None]:
        """Freeze machines one after the other, and thaw them in another order."""
        rng = np.random.default_rng(fault.draw)
        workers = [machine for machine in self._swarm.living_workers() if not machine.process.stopped]
        order: list[int] = rng.permutation(len(workers)).tolist()
        some = [workers[place] for place in order[:_SWIZZLED]]
        apart_s = fault.duration_s / (2 * max(len(some), 1))
        context = self._swarm.net.context
        frozen: list[Machine] = []

        def freeze(machine: Machine) -> None:
            if not (self._over or machine.dead):
                frozen.append(machine)
                machine.process.stop()
                self._swarm.net.freeze(machine.name)

        def thaw(machine: Machine) -> None:
            if machine in frozen:
                frozen.remove(machine)
                self._thaw(machine)

        for fall, machine in enumerate(some):
            self.harmed.add(machine.name)
            self._loop.call_later(fall * apart_s, freeze, machine, context=context)
        rises: list[int] = rng.permutation(len(some)).tolist()
        for rise, place in enumerate(rises):
            at_s = (len(some) + rise) * apart_s
            self._loop.call_later(at_s, thaw, some[place], context=context)

        def thaw_all() -> None:
            for machine in list(frozen):
                thaw(machine)

        return thaw_all

    def _thaw(self, machine: Machine) -> None:
        self._swarm.net.thaw(machine.name)
        machine.process.go_on()

    def _side(self, machine: Machine, fault: Fault) -> frozenset[str]:
        """Who is separated from all others."""
        nodes = {machine.name}
        if fault.kind == "partition":
            rng = np.random.default_rng(fault.draw)
            nodes |= {each.name for each in self._swarm.living() if rng.random() < 0.4}
        return frozenset(nodes)

    def _rewire(self, machine: Machine, wire: Wire) -> Callable[[], None]:
        def set_all(wire: Wire, others: Sequence[Machine]) -> None:
            for other in others:
                self._swarm.net.set_wire(machine.name, other.name, wire)

        set_all(wire, self._swarm.machines)
        return lambda: set_all(self._schedule.wire, self._swarm.machines)

    def _slow_down(self, machine: WorkerMachine, strength: float) -> Callable[[], None]:
        def speed_up() -> None:
            machine.slowness.remove(strength)

        machine.slowness.append(strength)
        return speed_up

    def _mislead(self, machine: Machine, mischief: Mischief) -> Callable[[], None]:
        network, only = machine.network, frozenset[Mischief]({mischief})

        def behave() -> None:
            network.mischief -= only

        network.mischief |= only
        return behave
