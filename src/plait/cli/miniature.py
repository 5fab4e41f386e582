"""A swarm in miniature: `plait join` processes of this machine, which end with the process that started them.

Each holds the reading end of a pipe as its standard input: a line on it is the ticket, its end is the end of the
process (leash.py). So none is left behind, however this process ends.
"""

import asyncio
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

# Ends of pipes are seen in milliseconds; a process that is still importing takes longer.
END_S = 5.0


@dataclass(frozen=True, slots=True)
class Part:
    """What one machine of the swarm is called and serves."""

    name: str
    blocks: range

    @property
    def blocks_text(self) -> str:
        """As --blocks takes them."""
        return f"{self.blocks.start}:{self.blocks.stop}"


@dataclass(slots=True)
class Machine:
    """One process; `ready` is set once it serves or has ended, `exit_code` once it has ended."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    ready: threading.Event = field(default_factory=threading.Event)
    exit_code: int | None = None

    @property
    def lives(self) -> bool:
        return self.exit_code is None

    @property
    def last_words(self) -> str:
        """The last line of what it said on standard error."""
        return (self.log.read_text(errors="replace").splitlines() or [""])[-1]


class Miniature:
    """Machines that wait for a ticket; enter it to start them, leave it to end them.

    `on_end` is called, from another thread, with each machine that ends before that.
    """

    def __init__(self, parts: Sequence[Part], *, on_end: Callable[[Machine], None]) -> None:
        self.machines: list[Machine] = []
        self._parts = parts
        self._on_end = on_end
        self._ending = False

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="plait-demo-")
        for part in self._parts:
            machine = _start(part, self.folder)
            self.machines.append(machine)
            threading.Thread(
                target=self._follow, args=(machine,), name=f"plait-{part.name}", daemon=True
            ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        for machine in self.machines:
            assert machine.process.stdin is not None
            machine.process.stdin.close()
        for machine in self.machines:
            try:
                machine.process.wait(END_S)
            except subprocess.TimeoutExpired:
                machine.process.kill()
                machine.process.wait()
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """Where the keys of this swarm are, until it ends."""
        return Path(self._folder.name)

    def admit(self, ticket: str) -> None:
        """Let the machines join."""
        for machine in self.machines:
            assert machine.process.stdin is not None
            try:
                machine.process.stdin.write(ticket.encode() + b"\n")
                machine.process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended: `on_end` says so

    async def wait_ready(self) -> None:
        """Wait until each serves or has ended."""
        while not all(machine.ready.is_set() for machine in self.machines):
            await asyncio.sleep(0.02)

    def _follow(self, machine: Machine) -> None:
        """In a thread: read what the process says until it ends."""
        assert machine.process.stdout is not None
        for line in machine.process.stdout:
            if line == b"}\n":  # of the JSON that says what it serves
                machine.ready.set()
        machine.exit_code = machine.process.wait()
        machine.ready.set()
        if not self._ending:
            self._on_end(machine)


def _start(part: Part, folder: Path) -> Machine:
    log = folder / f"{part.name}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            (
                *(sys.executable, "-m", "plait", "join", "-", "--until-input-ends", "--json"),
                *(
                    "--name",
                    part.name,
                    "--blocks",
                    part.blocks_text,
                    "--threads",
                    "1",
                    "--log-level",
                    "warning",
                ),
                *("--swarm-listen", "127.0.0.1:0", "--set", f"swarm.folder={folder}"),
                *("--set", "swarm.advertise=[]"),
                *("--set", "swarm.announce_s=0.5"),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # A Ctrl-C in the terminal is for the process that started these: it drains, then it ends them.
            start_new_session=True,
        )
    return Machine(part, process, log)
