"""A link of this machine to itself: what a small message takes one way, and how fast a large one goes."""

import socket
import threading
import time

from plait.costs import SharedLink

_SMALL_BYTES = 64
_LARGE_BYTES = 8 << 20


def measure_loopback(*, round_trips: int = 200, transfers: int = 8) -> SharedLink:
    """TCP on 127.0.0.1, an echo in another thread: the median round trip halved, the fastest large transfer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        echo = threading.Thread(target=_echo, args=(server,), daemon=True)
        echo.start()
        with socket.create_connection(server.getsockname(), timeout=30) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            small, large = bytes(_SMALL_BYTES), bytes(_LARGE_BYTES)
            trips_s = sorted(_exchange(link, small, _SMALL_BYTES) for _ in range(round_trips))
            one_way_s = trips_s[len(trips_s) // 2] / 2
            # The answer to a large message is its last bytes: the way back costs one small message.
            sent_s = min(_exchange(link, large, _SMALL_BYTES) for _ in range(transfers)) - 2 * one_way_s
        echo.join(timeout=30)
    return SharedLink(bandwidth_bytes_per_s=_LARGE_BYTES / max(sent_s, 1e-9), one_way_s=one_way_s)


def _exchange(link: socket.socket, message: bytes, answer_bytes: int) -> float:
    began_s = time.perf_counter()
    link.sendall(len(message).to_bytes(4, "big") + message)
    got = 0
    while got < answer_bytes:
        got += len(link.recv(answer_bytes - got)) or answer_bytes
    return time.perf_counter() - began_s


def _echo(server: socket.socket) -> None:
    connection, _ = server.accept()
    buffer = bytearray(1 << 20)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while header := connection.recv(4, socket.MSG_WAITALL):
            left = int.from_bytes(header, "big")
            while left:
                left -= connection.recv_into(buffer, min(left, len(buffer)))
            connection.sendall(bytes(_SMALL_BYTES))
