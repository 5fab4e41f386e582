"""A swarm of real processes on this machine: each has a home, keys and a log of its own."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx

START_S = 240.0
_TIME = re.compile(r"time=(\S+ \S+) ")


PLAIT = ("-m", "plait")


class Machine:
    """One `plait serve --swarm` or `plait join`; its standard output is JSON lines, its log has times.

    `program` is what Python runs with these arguments.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        home: Path,
        log: Path,
        cache: Path,
        *,
        program: Sequence[str] = PLAIT,
    ) -> None:
        self.name = name
        self.events: dict[str, dict[str, Any]] = {}
        self._log = log
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PLAIT_", "OPENAI_"))
        }
        environment |= {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(cache),
            "PLAIT_ENGINE__THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        home.mkdir(parents=True, exist_ok=True)
        self._out = log.with_suffix(".out")
        with self._out.open("w") as out, log.open("w") as errors:
            self.process = subprocess.Popen(
                (sys.executable, *program, *arguments),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def said(self) -> str:
        return self._out.read_text()

    def wait_for(self, holds: Callable[[], Any], what: str) -> Any:
        """Wait until something holds, and return it; the process must live until then."""
        deadline_s = time.monotonic() + START_S
        while not (value := holds()):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"{self.name}: {what} did not come about:\n{self.said}\n{self.log[-3000:]}"
                )
            time.sleep(0.02)
        return value

    def lost_unix_s(self, peer: str, since_unix_s: float) -> float | None:
        """When this machine's log first said, after a moment, that a peer is lost."""
        for line in self.log.splitlines():
            found = _TIME.match(line)
            if found and f"peer={peer[:8]} lost" in line:
                at_s = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                if at_s >= since_unix_s - 0.001:
                    return at_s
        return None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()


class SwarmOfProcesses:
    """A gateway and the machines that joined it; entering starts the gateway, leaving ends all."""

    def __init__(self, *gateway_arguments: str, model: str = "tiny") -> None:
        self._model = model
        self._arguments = gateway_arguments
        self.machines: dict[str, Machine] = {}
        self.peers: dict[str, str] = {}
        self._started = 0

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="plait-swarm-"))
        try:
            arguments = ("serve", self._model, "--swarm", "--port", "0", "--json", *self._arguments)
            self.gateway = self._start("gateway", arguments)
            lines = self.gateway.wait_for(lambda: self._lines("swarm"), "the ticket")
            self.ticket = lines["swarm"]["ticket"]
            self.base_url = lines["listening"]["base_url"]
            self.origin = self.base_url.removesuffix("/v1")
            self.http = httpx.Client(base_url=self.origin, timeout=30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for machine in [*self.machines.values(), *([self.gateway] if hasattr(self, "gateway") else [])]:
            machine.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, name: str, blocks: str, *more: str) -> None:
        """Start a machine, or start it again after it was killed; `more` goes to `plait join`."""
        arguments = ("join", self.ticket, "--name", name, "--blocks", blocks, "--json", *more)
        self.machines[name] = self._start(name, (*arguments, "--set", "swarm.announce_s=1"))

    def wait_ready(self, *names: str) -> None:
        """Wait until these machines serve, and the gateway knows it."""
        for name in names:
            machine = self.machines[name]
            machine.wait_for(lambda machine=machine: machine.said.strip(), "serving")
            self.peers[name] = json.loads(machine.said)["peer"]
        self.gateway.wait_for(lambda: set(names) <= self.online(), f"{names} in the gateway's view")

    def online(self) -> set[str]:
        """Machines that the gateway routes over."""
        try:
            machines = self.status()["machines"]
        except (httpx.HTTPError, KeyError):
            return set()
        return {
            machine["name"]
            for machine in machines
            if machine["state"] == "online" and not machine["banned"] and machine["linked"]
        }

    def status(self) -> dict[str, Any]:
        return self.http.get("/swarm/status").json()

    def kill(self, name: str) -> float:
        """SIGKILL; returns when, by the wall clock."""
        at_s = time.time()
        self.machines[name].signal(signal.SIGKILL)
        return at_s

    def freeze(self, name: str) -> float:
        """SIGSTOP; returns when, by the wall clock."""
        at_s = time.time()
        self.machines[name].signal(signal.SIGSTOP)
        return at_s

    def thaw(self, name: str) -> None:
        self.machines[name].signal(signal.SIGCONT)

    def _start(self, name: str, arguments: Sequence[str]) -> Machine:
        self._started += 1
        return Machine(
            name,
            arguments,
            self._folder / name,
            self._folder / f"{name}-{self._started}.log",
            self._folder / "cache",
        )

    def _lines(self, needed: str) -> dict[str, dict[str, Any]] | None:
        lines = [json.loads(line) for line in self.gateway.said.splitlines() if line.endswith("}")]
        events = {line["event"]: line for line in lines}
        return events if needed in events else None
