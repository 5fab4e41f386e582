"""The thread pool meets at every barrier, survives what goes wrong in it, and memory is what it says."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.kernels import native_available

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)

from plait.kernels._native import Arena, Pool, exercise_pool

TASKS = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not TASKS.is_dir(), reason="the system does not list threads in /proc")


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline_s, "what was waited for never happened"


def on_every_thread(pool: Pool, ask: Callable[[], Any]) -> dict[int, Any]:
    answers: dict[int, Any] = {}

    def note(thread: int) -> None:
        answers[thread] = ask()

    pool.run(note)
    return answers


# ---- runs and barriers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "runs"), [(1, 500), (2, 200), (3, 10), (5, 5)])
def test_no_thread_passes_a_barrier_before_all_have_come(threads: int, runs: int) -> None:
    assert exercise_pool(Pool(threads), runs, barriers=3) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "runs"), [(1, 10_000), (2, 10_000), (3, 300), (4, 300), (5, 300)])
def test_no_thread_passes_a_barrier_before_all_have_come_in_thousands_of_runs(
    threads: int, runs: int
) -> None:
    pool = Pool(threads)
    for barriers in (0, 1, 4):
        assert exercise_pool(pool, runs, barriers) == 0


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_run_has_every_thread_once_and_the_first_is_the_caller(threads: int) -> None:
    pool = Pool(threads)
    assert pool.threads == threads
    idents = on_every_thread(pool, threading.get_ident)
    assert sorted(idents) == list(range(threads))
    assert len(set(idents.values())) == threads
    assert idents[0] == threading.get_ident()
    assert on_every_thread(pool, threading.get_ident) == idents  # they stay


@needs_proc
def test_idle_threads_fall_asleep_and_wake_for_the_next_run() -> None:
    pool = Pool(2)
    worker = on_every_thread(pool, threading.get_native_id)[1]

    def asleep() -> bool:
        return (TASKS / str(worker) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "S"

    for _ in range(5):
        until(asleep)
        assert on_every_thread(pool, threading.get_native_id)[1] == worker


# ---- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failing_thread_ends_the_wait_of_the_others_and_its_error_is_raised(failing: int) -> None:
    pool, passed = Pool(3), []

    def task(thread: int) -> None:
        if thread == failing:
            raise KeyError(thread)
        pool.barrier()
        passed.append(thread)

    for _ in range(3):
        with pytest.raises(KeyError, match=str(failing)):
            pool.run(task)
    assert not passed
    assert exercise_pool(pool, 2, 2) == 0  # as if nothing had been


def test_only_one_of_several_errors_is_raised() -> None:
    pool = Pool(3)

    def task(thread: int) -> None:
        raise ValueError(thread)

    with pytest.raises(ValueError):
        pool.run(task)
    assert sorted(on_every_thread(pool, threading.get_ident)) == [0, 1, 2]


def test_a_run_inside_a_run_is_refused() -> None:
    pool = Pool(2)

    def task(thread: int) -> None:
        if thread == 1:
            pool.run(lambda _: None)

    with pytest.raises(RuntimeError, match="one run at a time"):
        pool.run(task)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_that_its_pool_has_no_threads() -> None:
    pool = Pool(2)
    assert exercise_pool(pool, 1, 1) == 0
    child = os.fork()
    if child == 0:  # nothing of the test runner may run here
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        status = 1
        try:
            pool.run(lambda _: None)
        except RuntimeError as error:
            status = 0 if "make a new pool" in str(error) else 2
        del pool  # joins nobody
        os._exit(status or int(exercise_pool(Pool(2), 3, 3) != 0))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert exercise_pool(pool, 1, 1) == 0


@needs_proc
def test_a_pool_takes_its_threads_with_it() -> None:
    before = len(list(TASKS.iterdir()))
    pools = [Pool(3) for _ in range(10)]
    assert sum(exercise_pool(pool, 1, 1) for pool in pools) == 0
    assert len(list(TASKS.iterdir())) == before + 20
    del pools
    until(lambda: len(list(TASKS.iterdir())) == before)  # the system's list lags behind joining
    for _ in range(100):
        Pool(2)  # gone before its thread has begun
    until(lambda: len(list(TASKS.iterdir())) == before)


@pytest.mark.parametrize(
    ("threads", "cores", "sentence"),
    [
        (0, [], "1 to 1024"),
        (1025, [], "1 to 1024"),
        (2, [0], "one core for each"),
        (2, [0, -1], "not negative"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(threads: int, cores: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Pool(threads, cores)


# ---- where and how threads run --------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not pin threads")
def test_workers_are_pinned_and_the_caller_is_not() -> None:
    usable = os.sched_getaffinity(0)
    core = max(usable)
    pool = Pool(3, [core, core, 1023])  # the last is not there: that worker runs anywhere
    where = on_every_thread(pool, lambda: os.sched_getaffinity(threading.get_native_id()))
    assert where == {0: usable, 1: {core}, 2: usable}
    assert os.sched_getaffinity(0) == usable


def test_denormal_numbers_are_zero_inside_runs_only() -> None:
    tiny, tenth = np.full(4, 2e-38, np.float32), np.full(4, 0.1, np.float32)
    for threads in (1, 2):
        products = on_every_thread(Pool(threads), lambda: (tiny * tenth).tolist())
        assert all(product == [0.0] * 4 for product in products.values())
        assert np.all(tiny * tenth > 0)


# ---- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_an_arena_is_zeroed_aligned_and_of_its_size(size: int) -> None:
    arena = Arena(size)
    memory = arena.memory
    assert arena.bytes == size and memory.shape == (size,) and memory.dtype == np.uint8
    assert size == 0 or memory.ctypes.data % (2 << 20) == 0
    assert not memory.any()
    memory[:] = 7
    assert np.all(arena.memory == 7)


def test_an_array_keeps_its_arena() -> None:
    part = Arena(3 << 20).memory[100:200]
    part[:] = 5
    gc.collect()
    others = [Arena(3 << 20) for _ in range(4)]  # would take the place of what had been unmapped
    assert np.all(part == 5) and not any(other.memory[100:200].any() for other in others)


def test_an_arena_of_no_possible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Arena(-1)
    for size in (1 << 61, 2**63 - 1):
        with pytest.raises(MemoryError):
            Arena(size)
