"""One rank of a group in shared memory, as a process: what test_collective.py starts.

python collective_rank.py FD RANK RANKS TIMEOUT_S ROUNDS

It takes part in so many rounds, then prints a digest of all sums, or what went wrong, and after how long.
"""

import hashlib
import sys
import time

import numpy as np

from plait.kernels import _native

MAX_FLOATS = 5000
MAX_GATHER_BYTES = 4096
# Sizes that are no multiple of anything, and the largest.
SIZES = (1, 17, 256, 257, 2048, MAX_FLOATS)


def numbers_of(rank: int, turn: int) -> np.ndarray:
    """What a rank brings to a round: values whose sum depends on the order in which they are added."""
    rng = np.random.default_rng([rank, turn % 50])
    count = SIZES[turn % len(SIZES)]
    return (rng.standard_normal(count) * 10.0 ** rng.integers(-3, 4, count)).astype(np.float32)


def sums_of(ranks: int, turn: int, before: np.ndarray) -> np.ndarray:
    """The same in numpy, in rank order."""
    total = numbers_of(0, turn)
    for rank in range(1, ranks):
        total = total + numbers_of(rank, turn)
    return before + np.float32(0.5) * total


def run_rounds(group: "_native.SharedMemoryCollective", rounds: int, *, check: bool = False) -> str:
    """Sum every round and gather every tenth; the digest of all that came out."""
    digest = hashlib.sha256()
    for turn in range(rounds):
        mine = numbers_of(group.rank, turn)
        before = np.full_like(mine, 0.25)
        out = before.copy()
        group.add_sum(mine, out, 0.5)
        if check:
            assert np.array_equal(out, sums_of(group.ranks, turn, before)), f"round {turn}"
        digest.update(out.tobytes())
        if turn % 10 == 0:
            brought = group.gather(bytes([group.rank]) * (turn % MAX_GATHER_BYTES))
            assert brought == [bytes([rank]) * (turn % MAX_GATHER_BYTES) for rank in range(group.ranks)]
    return digest.hexdigest()


def main() -> None:
    fd, rank, ranks, rounds = (int(sys.argv[at]) for at in (1, 2, 3, 5))
    group = _native.SharedMemoryCollective(fd, rank, ranks, MAX_FLOATS, MAX_GATHER_BYTES, float(sys.argv[4]))
    print("attached", flush=True)
    start_s = time.monotonic()
    try:
        print(run_rounds(group, rounds), flush=True)
    except RuntimeError as failure:
        print(f"{failure} | {time.monotonic() - start_s:.3f}", flush=True)
    sys.stdin.read()  # stays, as a process between two steps does, until the test lets it go


if __name__ == "__main__":
    main()
