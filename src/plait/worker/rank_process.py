"""A rank as a process of its own on rank 0's host: `python -m plait.worker.rank_process SOCKET MEMORY RANK RANKS`.

SOCKET and MEMORY are open descriptors that rank 0 hands over: a socket to rank 0, and the memory that all ranks share.
"""

import logging
import os
import select
import signal
import socket
import sys
import threading

from plait.errors import ServingError
from plait.worker.follower import follow
from plait.worker.rank_links import LocalLink

log = logging.getLogger(__name__)


def main() -> None:
    """Be a rank until rank 0 stops it, or ends."""
    socket_fd, memory_fd, rank, ranks = (int(argument) for argument in sys.argv[1:5])
    # A Ctrl-C is for rank 0, which lets running requests end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=socket_fd)
    threading.Thread(target=_end_with, args=(channel,), name="plait-rank-0-watch", daemon=True).start()
    link = LocalLink(rank, ranks, {0: channel}, memory_fd)
    try:
        follow(link, on_plan=lambda plan: _pin(rank, plan.threads))
    except ServingError as error:
        log.debug("%s", error)  # rank 0 has been told, and says it to people
        os._exit(1)
    # Nothing is left to be written, and taking torch down piece by piece would keep rank 0 waiting.
    os._exit(0)


def _end_with(channel: socket.socket) -> None:
    """End this process with rank 0's, however that ends and whatever this one is doing."""
    poll = select.poll()
    poll.register(channel, 0)  # asks for nothing: a hang-up is told anyway
    poll.poll()
    os._exit(1)


def _pin(rank: int, threads: int) -> None:
    """Take cores of its own, as far as there are enough: rank 0 takes the first."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(rank * threads + thread) % len(cores)] for thread in range(threads)})


if __name__ == "__main__":
    main()
