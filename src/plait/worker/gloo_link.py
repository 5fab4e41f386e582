# pyright: standard
"""Ranks on several hosts: torch's gloo for frames, sums and gathers, over TCP.

Gloo asks nobody who they are and encrypts nothing: it is for a network that only these machines can reach.
"""

import logging
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed

from plait.errors import BadSetup, EngineLost
from plait.worker.rank_links import Address, Frame, FrameKind, GroupSizes, checked_head

if TYPE_CHECKING:
    from plait.kernels._native import Collective

log = logging.getLogger(__name__)

# People start the ranks of other hosts by hand.
JOIN_TIMEOUT_S = 600.0
# How often a rank that was started before rank 0 looks for it.
RETRY_S = 0.2
_YEAR_S = 365 * 86400.0  # gloo's waits cannot be without end
_SUMS, _FRAMES = 0, 1
"""Tags: what is sent under one is never received under the other."""


class GlooLink:
    """Ranks anywhere that one address of rank 0 can be reached from.

    Rank 0 listens there for the others to find each other, and nowhere else; all further connections are between the
    addresses through which the ranks reach it. Numbers go from each rank to each other and not through gloo's own
    collectives: a wait then knows whom it waits for, and it is faster (bench/tensor_parallel.py).
    """

    def __init__(self, rank: int, ranks: int, address: Address, *, join_timeout_s: float) -> None:
        """Waits until all ranks have joined at rank 0's address.

        Raises:
            BadSetup: the address is not this machine's, cannot be reached, or not all ranks came in time.
        """
        self.rank, self.ranks = rank, ranks
        self._timeout_s = join_timeout_s
        host, port = address
        listening = _listen(host, port) if rank == 0 else None
        try:
            own_host = host if rank == 0 else _address_towards(host, port, join_timeout_s)
            self._store: Any = distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage] - documented
                host,
                port,
                ranks,
                is_master=rank == 0,
                timeout=timedelta(seconds=join_timeout_s),
                master_listen_fd=None if listening is None else listening.detach(),
            )
            gloo: Any = distributed.ProcessGroupGloo  # torch's own types leave these out
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=own_host)]
            options._timeout = timedelta(seconds=join_timeout_s)
            self._peers = _GlooPeers(gloo(self._store, rank, ranks, options))
        except (RuntimeError, OSError):
            raise BadSetup(
                f"rank {rank} did not meet the other {ranks - 1} at {host} port {port} within {join_timeout_s:g} s; "
                "start every rank with the same --tensor-parallel-size and --tensor-parallel-address"
            ) from None

    def open_sums(self, sizes: GroupSizes, timeout_s: float) -> "Collective":
        from plait.kernels import _native

        self._timeout_s = timeout_s
        exchange = self._exchange(timeout_s)
        return _native.CallbackCollective(exchange, self.rank, self.ranks, sizes.max_floats)

    def _exchange(self, timeout_s: float) -> Callable[[np.ndarray], None]:
        return _GlooExchange(self._peers, self.rank, self.ranks, timeout_s)

    def send(self, to: int, frame: Frame, *, timeout_s: float) -> None:
        head = torch.tensor([frame.kind, len(frame.body)], dtype=torch.int64)
        self._peers.finish(self._peers.send(head, to, _FRAMES), to, timeout_s)
        if frame.body:
            body = torch.frombuffer(bytearray(frame.body), dtype=torch.uint8)
            self._peers.finish(self._peers.send(body, to, _FRAMES), to, timeout_s)

    def receive(self, sender: int, *, timeout_s: float) -> Frame:
        head = torch.empty(2, dtype=torch.int64)
        self._peers.finish(self._peers.receive(head, sender, _FRAMES), sender, timeout_s)
        kind, size = checked_head(int(head[0]), int(head[1]), sender)
        body = torch.empty(size, dtype=torch.uint8)
        if size:
            self._peers.finish(self._peers.receive(body, sender, _FRAMES), sender, timeout_s)
        return Frame(kind, body.numpy().tobytes())

    def gather(self, payload: bytes) -> list[bytes]:
        if self.rank != 0:
            self.send(0, Frame(FrameKind.RESULT, payload), timeout_s=self._timeout_s)
            return []
        frames = [self.receive(peer, timeout_s=self._timeout_s) for peer in range(1, self.ranks)]
        for peer, frame in enumerate(frames, start=1):
            if frame.kind is not FrameKind.RESULT:
                raise EngineLost(f"rank {peer} sent {frame.kind.name} instead of its result")
        return [payload, *(frame.body for frame in frames)]

    def close(self) -> None:
        # Connections close with the last reference: the others notice at once.
        self._peers.group = None
        self._store = None


class _GlooPeers:
    """A gloo process group, with failures that name the peer."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def send(self, numbers: torch.Tensor, to: int, tag: int) -> Any:
        return self._begun(to, lambda: self.group.send([numbers], to, tag))

    def receive(self, numbers: torch.Tensor, sender: int, tag: int) -> Any:
        return self._begun(sender, lambda: self.group.recv([numbers], sender, tag))

    def finish(self, work: Any, peer: int, timeout_s: float) -> None:
        try:
            work.wait(timedelta(seconds=min(timeout_s, _YEAR_S)))
        except RuntimeError as error:
            if "imed out" in str(error):
                raise EngineLost(f"rank {peer} has not answered for {timeout_s:g} s") from None
            raise self._gone(peer, error) from None

    def _begun(self, peer: int, begin: Callable[[], Any]) -> Any:
        if self.group is None:
            raise EngineLost("this rank has left the group")
        try:
            return begin()
        except RuntimeError as error:
            raise self._gone(peer, error) from None

    @staticmethod
    def _gone(peer: int, error: RuntimeError) -> EngineLost:
        log.debug("gloo: %s", error)
        return EngineLost(f"rank {peer} has ended or can no longer be reached")


class _GlooExchange:
    """What a `CallbackCollective` calls; it holds no reference to the link, whose end must not wait for it."""

    def __init__(self, peers: _GlooPeers, rank: int, ranks: int, timeout_s: float) -> None:
        self._peers, self._rank, self._timeout_s = peers, rank, timeout_s
        self._others = [peer for peer in range(ranks) if peer != rank]

    def __call__(self, terms: np.ndarray) -> None:
        """Send this rank's row of float32 [ranks, numbers] to all others, and fill in theirs."""
        rows = torch.from_numpy(terms)
        sent = [self._peers.send(rows[self._rank], peer, _SUMS) for peer in self._others]
        received = [self._peers.receive(rows[peer], peer, _SUMS) for peer in self._others]
        for works in (received, sent):
            for work, peer in zip(works, self._others, strict=True):
                self._peers.finish(work, peer, self._timeout_s)


def _listen(host: str, port: int) -> socket.socket:
    """A socket on this address and no other one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise BadSetup(
            f"rank 0 cannot listen at --tensor-parallel-address {host} port {port}: {error.strerror}"
        ) from None
    return listening


def _address_towards(host: str, port: int, timeout_s: float) -> str:
    """This machine's address on the way to rank 0, once that listens."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=timeout_s) as connection:
                return connection.getsockname()[0]
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)
