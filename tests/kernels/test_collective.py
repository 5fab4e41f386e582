"""Sums over processes in shared memory: the same bits on every rank, and an end to every wait."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from plait.kernels import native_available

pytestmark = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")

if native_available:
    from collective_rank import MAX_FLOATS, MAX_GATHER_BYTES, numbers_of, run_rounds

    from plait.kernels import _native

PROGRAM = Path(__file__).with_name("collective_rank.py")
FOR_EVER = 10**9


class Group:
    """Rank 0 in this process and the others in processes of their own."""

    def __init__(self, fd: int, ranks: int, timeout_s: float) -> None:
        self.fd, self.ranks, self.timeout_s = fd, ranks, timeout_s
        self.own = self.attach(0)
        self.others: dict[int, subprocess.Popen[str]] = {}

    def attach(self, rank: int) -> "_native.SharedMemoryCollective":
        return _native.SharedMemoryCollective(
            self.fd, rank, self.ranks, MAX_FLOATS, MAX_GATHER_BYTES, self.timeout_s
        )

    def start(self, rank: int, *, rounds: int) -> subprocess.Popen[str]:
        arguments = [self.fd, rank, self.ranks, self.timeout_s, rounds]
        self.others[rank] = process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *map(str, arguments)],
            pass_fds=[self.fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line(rank) == "attached"
        return process

    def line(self, rank: int) -> str:
        out = self.others[rank].stdout
        assert out is not None
        return out.readline().strip()


@contextmanager
def group_of(ranks: int, *, timeout_s: float = 30.0) -> Iterator[Group]:
    fd = os.memfd_create("plait-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    _native.SharedMemoryCollective.prepare(fd, ranks, MAX_FLOATS, MAX_GATHER_BYTES)
    group = Group(fd, ranks, timeout_s)
    try:
        yield group
    finally:
        os.close(fd)
        for process in group.others.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sums_are_exact_and_have_the_same_bits_on_every_rank(ranks: int) -> None:
    with group_of(ranks) as group:
        for rank in range(1, ranks):
            group.start(rank, rounds=120)
        digest = run_rounds(group.own, 120, check=True)
        assert [group.line(rank) for rank in range(1, ranks)] == [digest] * (ranks - 1)
        assert group.own.exchanges == 120


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ten_thousand_rounds_never_mix_two_of_them(ranks: int) -> None:
    with group_of(ranks) as group:
        for rank in range(1, ranks):
            group.start(rank, rounds=10_000)
        digest = run_rounds(group.own, 10_000)
        assert [group.line(rank) for rank in range(1, ranks)] == [digest] * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_killed_rank_is_named_by_all_others_long_before_the_timeout(ranks: int) -> None:
    with group_of(ranks) as group:
        for rank in range(1, ranks):
            group.start(rank, rounds=FOR_EVER if rank < ranks - 1 else 5)
        run_rounds(group.own, 5)  # the last rank is through with its rounds, and the others wait for it
        victim = group.others[ranks - 1]
        assert len(group.line(ranks - 1)) == 64
        victim.kill()
        killed_s = time.monotonic()
        sentence = rf"rank {ranks - 1} \(process {victim.pid}\) has ended"
        with pytest.raises(RuntimeError, match=sentence):
            group.own.add_sum(numbers_of(0, 5), np.zeros_like(numbers_of(0, 5)))
        assert time.monotonic() - killed_s < 5.0  # 0.02 s on a quiet machine, and the timeout is 30 s
        for rank in range(1, ranks - 1):
            assert f"rank {ranks - 1} (process {victim.pid}) has ended" in group.line(rank)
        assert group.own.error  # and it stays so, without waiting again
        with pytest.raises(RuntimeError, match=sentence):
            group.own.gather(b"late")


def test_a_rank_killed_in_the_middle_of_a_wait_is_named() -> None:
    with group_of(2) as group:
        other = group.start(1, rounds=FOR_EVER)
        run_rounds(group.own, 5)
        other.kill()  # it waits for this rank's sixth, which never reads its answer
        other.wait()
        size = len(numbers_of(0, 5))
        out = np.zeros(size, np.float32)
        with pytest.raises(RuntimeError, match="rank 1"):
            for _ in range(3):  # what it had written already still counts
                group.own.add_sum(np.ones(size, np.float32), out)


def test_a_stopped_rank_ends_the_wait_at_the_deadline() -> None:
    with group_of(2, timeout_s=0.4) as group:
        other = group.start(1, rounds=5)
        run_rounds(group.own, 5)
        assert len(group.line(1)) == 64
        os.kill(other.pid, signal.SIGSTOP)
        start_s = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"rank 1 \(process {other.pid}\) has not answered for 0.4 s"):
            group.own.add_sum(np.ones(3, np.float32), np.zeros(3, np.float32))
        assert time.monotonic() - start_s >= 0.4
        os.kill(other.pid, signal.SIGCONT)


def test_a_rank_that_never_came_is_named() -> None:
    with (
        group_of(3, timeout_s=0.2) as group,
        pytest.raises(RuntimeError, match="rank 1 did not join the group"),
    ):
        group.own.add_sum(np.ones(3, np.float32), np.zeros(3, np.float32))


def test_a_rank_that_leaves_frees_those_that_wait() -> None:
    with group_of(2) as group:
        group.start(1, rounds=FOR_EVER)
        run_rounds(group.own, 5)
        group.own.leave()
        assert f"rank 0 (process {os.getpid()}) has left the group" in group.line(1)


def test_ranks_that_do_not_run_the_same_step_are_found_out() -> None:
    with group_of(2) as group:
        group.start(1, rounds=FOR_EVER)
        with pytest.raises(RuntimeError, match="the ranks do not run the same step"):
            group.own.add_sum(np.ones(2, np.float32), np.zeros(2, np.float32))
        assert "the ranks do not run the same step" in group.line(1)


def test_nothing_is_left_in_the_file_system_and_no_descriptor_stays_open() -> None:
    with group_of(2) as group:
        group.start(1, rounds=5)
        run_rounds(group.own, 5)
    del group
    before = _open_files()
    with group_of(2) as group:
        assert not [name for name in os.listdir("/dev/shm") if "plait" in name]
        other = group.start(1, rounds=FOR_EVER)
        run_rounds(group.own, 5)
        other.kill()
        with pytest.raises(RuntimeError):
            for _ in range(9):
                group.own.add_sum(numbers_of(0, 5), np.zeros_like(numbers_of(0, 5)))
    del group
    assert _open_files() == before
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if "plait-test" in line]


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("offset", "written", "reason"),
    [
        (0, b"notplait", "not that of a group"),
        (8, b"\x63", "layout version 99"),
        (12, b"\x03", "other sizes"),
        (16, b"\x01\x00", "other sizes"),
        (32, b"\x01\x00", "other sizes"),
    ],
)
def test_a_malformed_header_is_refused(offset: int, written: bytes, reason: str) -> None:
    with group_of(2) as group:
        os.pwrite(group.fd, written, offset)
        with pytest.raises(ValueError, match=reason):
            group.attach(1)


def test_memory_of_another_size_or_kind_is_refused(tmp_path: Path) -> None:
    with group_of(2) as group:
        with pytest.raises(ValueError, match=r"has .* bytes, and a group of 2 ranks"):
            _native.SharedMemoryCollective(group.fd, 1, 2, 2 * MAX_FLOATS, MAX_GATHER_BYTES, 1.0)
        with pytest.raises(ValueError, match="new and empty memfd"):
            _native.SharedMemoryCollective.prepare(group.fd, 2, MAX_FLOATS, MAX_GATHER_BYTES)
        with pytest.raises(ValueError, match=f"rank 0 of the group is process {os.getpid()} already"):
            group.attach(0)
        for rank, ranks in ((2, 2), (-1, 2), (0, 0), (0, 65)):
            with pytest.raises(ValueError, match="is none"):
                _native.SharedMemoryCollective(group.fd, rank, ranks, MAX_FLOATS, MAX_GATHER_BYTES, 1.0)
        size_bytes = os.fstat(group.fd).st_size
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(ValueError, match="sealed"):
        _native.SharedMemoryCollective.prepare(file, 2, MAX_FLOATS, MAX_GATHER_BYTES)
    assert os.fstat(file).st_size == size_bytes
    with pytest.raises(ValueError, match="sealed region"):  # another process could cut it short
        _native.SharedMemoryCollective(file, 1, 2, MAX_FLOATS, MAX_GATHER_BYTES, 1.0)
    os.close(file)
    with pytest.raises(ValueError, match="not open"):
        _native.SharedMemoryCollective(file, 1, 2, MAX_FLOATS, MAX_GATHER_BYTES, 1.0)


def test_too_much_for_the_region_is_refused() -> None:
    with group_of(1) as group:
        with pytest.raises(ValueError, match="no room for 5001 numbers"):
            group.own.add_sum(np.ones(MAX_FLOATS + 1, np.float32), np.ones(MAX_FLOATS + 1, np.float32))
        with pytest.raises(ValueError, match="4097 bytes are more"):
            group.own.gather(bytes(MAX_GATHER_BYTES + 1))
        with pytest.raises(ValueError, match="as many sums"):
            group.own.add_sum(np.ones(3, np.float32), np.ones(4, np.float32))


# -- a group whose exchange is a function ----------------------------------------------------------------


def test_a_function_brings_the_numbers_of_the_other_ranks() -> None:
    seen: list[np.ndarray] = []

    def exchange(terms: np.ndarray) -> None:
        seen.append(terms[1].copy())
        terms[0] = 1e8
        terms[2] = -1e8

    group = _native.CallbackCollective(exchange, 1, 3, 100)
    out = np.full(7, 0.5, np.float32)
    mine = np.arange(7, dtype=np.float32)
    group.add_sum(mine, out, 2.0)
    assert np.array_equal(seen[0], mine)
    in_rank_order = (np.float32(1e8) + mine) + np.float32(-1e8)
    assert np.array_equal(out, np.float32(0.5) + np.float32(2.0) * in_rank_order)
    assert (group.rank, group.ranks, group.error) == (1, 3, "")


def test_a_function_that_raises_ends_the_group_with_its_sentence() -> None:
    calls: list[int] = []

    def exchange(terms: np.ndarray) -> None:
        calls.append(len(terms))
        raise OSError("rank 1 cannot be reached")

    group = _native.CallbackCollective(exchange, 0, 2, 10)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="rank 1 cannot be reached"):
            group.add_sum(np.ones(2, np.float32), np.ones(2, np.float32))
    assert calls == [2]  # asked once, not again


def test_an_array_outlives_its_group() -> None:
    kept: list[np.ndarray] = []
    group = _native.CallbackCollective(kept.append, 0, 2, 10)
    group.add_sum(np.arange(3, dtype=np.float32), np.zeros(3, np.float32))
    del group
    assert kept[0][0].tolist() == [0.0, 1.0, 2.0]
