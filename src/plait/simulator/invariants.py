"""What must hold of every machine after every event of its process."""

from collections.abc import Callable

from plait.simulator.machine import Machine
from plait.simulator.virtual_loop import Process


class Invariants:
    """Has each machine checked (`Machine.check`) after every event that runs in its process, and nobody else's.

    No other event can change what belongs to a machine. Of a machine that failed `violate` is told once: what is broken
    stays so.
    """

    def __init__(self, violate: Callable[[str], None]) -> None:
        self.checks = 0
        self._violate = violate
        self._machines: dict[Process, Machine] = {}

    def watch(self, machine: Machine) -> None:
        """Check this one too, from now on."""
        self._machines[machine.process] = machine

    def after_event(self, process: Process | None) -> None:
        """An event of this process has run (None: of nobody's)."""
        machine = None if process is None else self._machines.get(process)
        if machine is None:
            return
        self.checks += 1
        try:
            machine.check()
        except AssertionError as error:
            assert process is not None
            del self._machines[process]
            self._violate(f"{machine.name} is not as it must be: {error}")
