"""`plait` in this process, and in processes of its own whose output is read line by line."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from typer.testing import CliRunner, Result

from plait.cli import app

COMMAND = (sys.executable, "-m", "plait")
# Far longer than anything here takes; a test that hangs ends.
DEADLINE_S = 120.0


def plait_environment(folder: Path) -> dict[str, str]:
    """The variables of this process without plait's, with homes in `folder` and one thread."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PLAIT_", "OPENAI_", "HF_"))
    }
    homes = {
        "HOME": folder,
        "HF_HOME": folder / "hf",
        "XDG_CONFIG_HOME": folder / "config",
        "XDG_CACHE_HOME": folder / "cache",
    }
    return {
        **kept,
        **{name: str(path) for name, path in homes.items()},
        "PLAIT_ENGINE__THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }


class InProcess:
    """Runs a command in this process: its exit code, standard output and standard error."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __call__(self, *arguments: str, stdin: str = "", **variables: str) -> Result:
        return CliRunner(env={**self._environment, **variables}).invoke(app, list(arguments), input=stdin)


class RunningPlait:
    """A command with its standard output as lines; killed at the end if it still runs."""

    def __init__(
        self, *arguments: str, environment: Mapping[str, str], deadline_s: float = DEADLINE_S
    ) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            (*COMMAND, *arguments),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._killer = threading.Timer(deadline_s, self._process.kill)

    def __enter__(self) -> Self:
        self._reader.start()
        self._killer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._killer.cancel()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    @property
    def origin(self) -> str:
        """Where it listens, as it says itself."""
        found = re.search(r"page +(http://\S+)/", "\n".join(self.lines))
        assert found is not None, self.said
        return found[1]

    @property
    def errors(self) -> str:
        return "".join(self._errors)

    @property
    def said(self) -> str:
        return "\n".join(self.lines) + "\n--- standard error\n" + self.errors

    def wait_for(self, text: str) -> str:
        """Read lines until one contains `text`; it fails if the output ends before."""
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return line
        self._process.wait()
        self._reader.join()
        raise AssertionError(f"{text!r} was not said:\n{self.said}")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end; returns the exit code."""
        stdout = self._process.stdout
        assert stdout is not None
        self.lines.extend(line.rstrip("\n") for line in stdout)
        code = self._process.wait()
        self._reader.join()
        return code

    def _read_errors(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        self._errors.extend(stderr)


def run_plait(
    *arguments: str, environment: Mapping[str, str], stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a process of its own."""
    return subprocess.run(
        (*COMMAND, *arguments),
        env=dict(environment),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
