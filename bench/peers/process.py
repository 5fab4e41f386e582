"""The outer side of an engine: a process of its own that is started, asked, suspended and weighed.

Only one engine may compute at a time. The others are suspended (SIGSTOP) rather than trusted to be idle: OpenMP's
threads spin for a while after their work, and vLLM's processes poll each other.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Self

from peers.machine import memory_bytes, process_tree

START_S = 1200.0  # vLLM compiles for minutes when it starts for the first time
ANSWER_S = 1800.0
_STOP_S = 20.0


class EngineDied(Exception):
    """The process ended, or did not answer in time; the message ends with what it printed last."""


class EngineProcess:
    """A program in a process group of its own. Entering starts it and waits until it is ready; leaving ends all."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], threads: int
    ) -> None:
        self.name = name
        self._command = command
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self.started_s = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=self._output(),
            stderr=self._log,
            process_group=0,  # of this session still: its scheduling weight is that of the session that measures
        )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        processes = process_tree(self._process.pid)
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        for process in processes:  # those that left the group too
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def suspend(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def memory_bytes(self) -> dict[str, int]:
        """See `machine.memory_bytes`; of the process and all that it started."""
        return memory_bytes(process_tree(self._process.pid))

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _output(self) -> Any:
        return self._log

    def _wait_ready(self) -> None:
        raise NotImplementedError

    def _died(self, what: str) -> EngineDied:
        self._log.seek(0)
        return EngineDied(f"{self.name} {what}; it printed last:\n{self._log.read()[-2000:]}")


class Driver(EngineProcess):
    """A program that speaks the lines of driver.py."""

    facts: dict[str, Any]
    """What it said when it was ready."""

    def ask(self, command: Mapping[str, Any], *, longest_s: float = ANSWER_S) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._read_line(longest_s)

    def _output(self) -> Any:
        return subprocess.PIPE

    def _wait_ready(self) -> None:
        self._unread = b""
        self.facts = self._read_line(START_S)

    def _read_line(self, longest_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        end_s = time.monotonic() + longest_s
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, end_s - time.monotonic()))
            if not readable:
                raise self._died(f"did not answer within {longest_s:.0f} s")
            received = os.read(self._process.stdout.fileno(), 2**16)
            if not received:
                raise self._died("ended")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


class Server(EngineProcess):
    """A program that serves OpenAI's API at `origin`; `{port}` in its command becomes the port."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], threads: int
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.origin = f"http://127.0.0.1:{port}"
        super().__init__(name, [word.replace("{port}", str(port)) for word in command], environment, threads)

    def _wait_ready(self) -> None:
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise self._died("ended")
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                urllib.request.urlopen(f"{self.origin}/health", timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.05)
        raise self._died(f"was not ready within {START_S:.0f} s")


class HighestPss:
    """Watches the memory of an engine, shared pages divided, while it is entered."""

    pss_bytes = 0

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.pss_bytes = max(self.pss_bytes, self._engine.memory_bytes()["pss"])
