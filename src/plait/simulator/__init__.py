"""The live system on a virtual clock: the same coroutines, other clock, other wires, another model.

virtual_loop.py      the event loop, and processes on it that can be stopped and killed
"""

from plait.simulator.virtual_loop import Deadlock, Livelock, Process, VirtualLoop, run_virtual

__all__ = ["Deadlock", "Livelock", "Process", "VirtualLoop", "run_virtual"]
