"""A small network of this kernel: hosts that are network namespaces, cables that are veth pairs into a switch.

Every cable has a cap (tbf, in both directions) and can be pulled. Names hold the process's id, and what an earlier
process left behind is removed. Processes in the hosts are `plait` itself.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

CLONE_NEWNET = 0x40000000
PREFIX = "plait-test"
# Far longer than anything here takes; a test that hangs ends.
DEADLINE_S = 150.0

Result = TypeVar("Result")


class NoNamespaces(Exception):
    """This machine does not let us make networks; says why."""


class Cabled:
    """Hosts `names` behind one switch, 10.77.0.1 for the first; entering makes them, leaving removes all."""

    def __init__(self, names: Sequence[str], *, cap: str = "20mbit") -> None:
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        self._cap = cap
        self._made: list[str] = []

    def __enter__(self) -> Self:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise NoNamespaces("network namespaces need root on Linux")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise NoNamespaces(f"{tool!r} is not installed (iproute2)")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            raise NoNamespaces(f"{' '.join(error.cmd)!r} failed: {error.stderr.strip()}") from None
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for namespace in self._made:
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", namespace)

    def namespace(self, host: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{host}"

    def pull(self, host: str) -> None:
        """Pull a host's cable out of the switch: nobody is told."""
        _run("ip", "-n", self.namespace("switch"), "link", "set", f"to-{host}", "down")

    def plug(self, host: str) -> None:
        """Put it back."""
        _run("ip", "-n", self.namespace("switch"), "link", "set", f"to-{host}", "up")

    def sent_bytes(self, host: str) -> int:
        """What a host has sent through its cap."""
        said = _run("tc", "-n", self.namespace(host), "-s", "qdisc", "show", "dev", "eth0")
        found = re.search(r"Sent (\d+) bytes", said)
        assert found is not None, said
        return int(found[1])

    def inside(self, host: str, work: Callable[[], Result]) -> Result:
        """Do something in a host's network, in a thread that has moved there."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                with open(f"/run/netns/{self.namespace(host)}") as file:
                    libc = ctypes.CDLL(None, use_errno=True)
                    if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                outcome.extend((True, work()))
            except BaseException as error:
                outcome.extend((False, error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        done, value = outcome
        if not done:
            raise value
        return value

    def _make(self) -> None:
        _remove_what_others_left()
        switch = self.namespace("switch")
        self._add(switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, address in self.addresses.items():
            namespace = self.namespace(host)
            self._add(namespace)
            cable = ("type", "veth", "peer", "name", f"to-{host}", "netns", switch)
            _run("ip", "-n", namespace, "link", "add", "eth0", *cable)
            _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", switch, "link", "set", f"to-{host}", "master", "bridge")
            for place, device in ((namespace, "eth0"), (switch, f"to-{host}")):
                cap = ("tbf", "rate", self._cap, "burst", "32kbit", "latency", "400ms")
                _run("tc", "-n", place, "qdisc", "add", "dev", device, "root", *cap)
                _run("ip", "-n", place, "link", "set", device, "up")

    def _add(self, namespace: str) -> None:
        _run("ip", "netns", "add", namespace)
        self._made.append(namespace)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")


class HostProcess:
    """`plait` in a host, with a home of its own; killed at the end."""

    def __init__(self, network: Cabled, host: str, folder: Path, *arguments: str) -> None:
        home = folder / host
        home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLAIT_", "HF_"))}
        environment = kept | {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PLAIT_ENGINE__THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        self._out, self._log = home / "out", home / "log"
        inside = ("ip", "netns", "exec", network.namespace(host))
        with self._out.open("w") as out, self._log.open("w") as log:
            self._process = subprocess.Popen(
                (*inside, sys.executable, "-m", "plait", *arguments),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def said(self) -> str:
        return f"{self._out.read_text()}\n--- standard error\n{self._log.read_text()}"

    def wait_for(self, pattern: str) -> str:
        """Wait until it has said something that matches; returns the first group, or the whole."""

        def found() -> str:
            match = re.search(pattern, self._out.read_text())
            return "" if match is None else match[match.re.groups and 1]

        return until(found, lambda: f"{pattern!r} was not said:\n{self.said}", self._process)


def until(
    holds: Callable[[], Result], what: Callable[[], str], process: "subprocess.Popen[bytes] | None" = None
) -> Result:
    """Look until something holds, and return it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not (value := holds()):
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline_s:
            raise AssertionError(what())
        time.sleep(0.05)
    return value


def cabled_or_skip(names: Sequence[str], *, cap: str = "20mbit") -> Cabled:
    """The network, entered, or a skipped test that says why."""
    network = Cabled(names, cap=cap)
    try:
        return network.__enter__()
    except NoNamespaces as error:
        pytest.skip(f"no networks can be made here: {error}")


def _remove_what_others_left() -> None:
    for line in _run("ip", "netns", "list").splitlines():
        found = re.match(rf"({PREFIX}-(\d+)-\S+)", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", found[1])


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
