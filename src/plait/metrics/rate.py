"""How fast tokens come out, over the last few seconds."""


class TokenRate:
    """Tokens per second over a sliding window of whole seconds."""

    def __init__(self, window_s: int = 5) -> None:
        self.window_s = window_s
        # One counter for each second of the window, and one for the second under way.
        self._counts = [0] * (window_s + 1)
        self._second = 0

    def add(self, tokens: int, now_s: float) -> None:
        """Count tokens that came out now."""
        self._advance(int(now_s))
        self._counts[self._second % len(self._counts)] += tokens

    def per_s(self, now_s: float) -> float:
        """The mean over the window's whole seconds and the part of the current one that has passed."""
        self._advance(int(now_s))
        return sum(self._counts) / (self.window_s + now_s - int(now_s))

    def _advance(self, second: int) -> None:
        for passed in range(max(self._second + 1, second - self.window_s), second + 1):
            self._counts[passed % len(self._counts)] = 0
        self._second = max(self._second, second)
