"""How fast the tokens of a session come while its chain stays as it is."""

WINDOW_TOKENS = 16


class Pace:
    """Counts the tokens of one session, window by window."""

    def __init__(self) -> None:
        self._epoch = 0
        self._tokens = 0
        self._began_s = 0.0

    def count(self, tokens: int, now_s: float, *, epoch: int) -> float | None:
        """Take tokens that came now; at the end of a window, its seconds per token.

        A window begins with the tokens that come first over a chain: what went before them was a prompt or a replay.
        """
        if epoch != self._epoch:
            self._epoch, self._tokens, self._began_s = epoch, 0, now_s
            return None
        self._tokens += tokens
        if self._tokens < WINDOW_TOKENS:
            return None
        pace_s = (now_s - self._began_s) / self._tokens
        self._tokens, self._began_s = 0, now_s
        return pace_s
