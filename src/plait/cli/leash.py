"""Ending with whoever started this process: that program holds the other end of standard input."""

import os
import threading

from plait.errors import BadSetup

# The longest line that is taken; a ticket has some hundred characters.
MAX_LINE_BYTES = 65536


def read_line() -> str:
    """The next line of standard input, without its end; "" once it is closed.

    Raises:
        BadSetup: the line does not end.
    """
    line = bytearray()
    # Byte by byte and around Python's buffer, so that what follows is left for `end_with_input`.
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
        if len(line) > MAX_LINE_BYTES:
            raise BadSetup("standard input has no line that could be a ticket")
    return line.decode(errors="replace").strip()


def end_with_input() -> None:
    """From now on, end this process at once when standard input closes.

    The system closes it whatever becomes of the process at the other end, also if that one is killed.
    """
    threading.Thread(target=_end_when_closed, name="plait-leash", daemon=True).start()


def _end_when_closed() -> None:
    while os.read(0, MAX_LINE_BYTES):
        pass
    os._exit(0)
