"""What the machine gives while a measurement runs, and what others take of it."""

import os
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

Limit = Literal["read", "bf16", "int8"]

QUIET_CORES = 0.15  # what housekeeping takes of an otherwise idle machine
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Probe:
    """Measures the limits of `threads` cores: reading memory, and multiply-adds of bfloat16 and int8 (probe.c)."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        program = Path(self._folder.name) / "probe"
        source = Path(__file__).parent / "probe.c"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-pthread", str(source), "-o", str(program)], check=True
        )
        self._process = subprocess.Popen(
            [str(program), str(self._threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def measure(self, limit: Limit) -> float:
        """Median of a third of a second: GB/s read, or Gop/s (a multiply-add is two)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(limit + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline().split()[0])


class OtherLoad:
    """`with OtherLoad() as load`: afterwards, the cores that others used meanwhile."""

    foreign_cores = 0.0
    """Used by processes that this one did not start."""
    stolen_cores = 0.0
    """Used by the host of a virtual machine."""

    def __enter__(self) -> Self:
        self._start_s, self._before = time.perf_counter(), _cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        seconds, after = time.perf_counter() - self._start_s, _cpu_s()
        busy_s, stolen_s, own_s = (now - then for now, then in zip(after, self._before, strict=True))
        self.foreign_cores = max(0.0, busy_s - own_s) / seconds
        self.stolen_cores = stolen_s / seconds


def wait_until_quiet(longest_s: float) -> None:
    """Return when others have used next to nothing for a second, or after `longest_s`."""
    end_s = time.monotonic() + longest_s
    while True:
        with OtherLoad() as load:
            time.sleep(1)
        if load.foreign_cores < QUIET_CORES or time.monotonic() > end_s:
            return


@contextmanager
def preferred_session(nice: int) -> Generator[None]:
    """Weigh all that this session runs against the rest of the machine, as `nice` weighs a process within it.

    Linux divides the cores among sessions first, so nice values alone do not help against others' work. Below 0 needs
    root; 0 changes nothing.
    """
    weight = Path("/proc/self/autogroup")
    if nice:
        weight.write_text(str(nice))
    try:
        yield
    finally:
        if nice:
            weight.write_text("0")


def process_tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for process in found:
        found.extend(children.get(process, ()))
    return found


def memory_bytes(processes: Iterable[int]) -> dict[str, int]:
    """What processes hold now, resident (`rss`) and with shared pages divided (`pss`), and their own highest `rss`."""
    total = {"rss": 0, "pss": 0, "highest_rss": 0}
    for process in processes:
        try:
            lines = (
                Path(f"/proc/{process}/smaps_rollup").read_text()
                + Path(f"/proc/{process}/status").read_text()
            )
        except OSError:  # it has ended
            continue
        for line in lines.splitlines():
            for name, key in (("Rss:", "rss"), ("Pss:", "pss"), ("VmHWM:", "highest_rss")):
                if line.startswith(name):
                    total[key] += int(line.split()[1]) * 1024
    return total


def _cpu_s() -> tuple[float, float, float]:
    """CPU seconds so far: used by anyone, stolen by the host, used by this process and its descendants."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, interrupt, soft, stolen = map(int, file.readline().split()[1:9])
    own = 0
    for process in process_tree(os.getpid()):
        if fields := _stat(process):
            own += sum(map(int, fields[11:15]))  # its own and those of children that it has waited for
    busy = user + nice + system + interrupt + soft
    return busy / _TICKS_PER_S, stolen / _TICKS_PER_S, own / _TICKS_PER_S


def _stat(process: int) -> list[str]:
    """The fields of /proc/N/stat after the name (state first); none if it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
