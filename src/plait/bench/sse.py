"""Server-sent events out of bytes, without I/O (the WHATWG HTML standard, section 9.2)."""


class EventParser:
    """Collects bytes and returns the data of each event that they complete.

    Comments (keep-alive pings) and fields other than `data` are dropped: OpenAI's streams use no others.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """Take the next bytes; return the data of the events that ended in them, in order."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        events: list[str] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append("\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode(errors="replace"))
        return events
