"""Guessing the next tokens from the text itself: what followed the last time the same few tokens stood there.

Prompt lookup (Saxena 2023), a form of speculative decoding (Leviathan et al. 2023): the longest of a few n-grams at the
end of the text is looked up in all that came before, and what followed there is the guess. It costs no model, and is
right where an answer repeats its prompt or itself: code, tables, quotations, summaries.
"""

from collections.abc import Sequence

_NGRAM_TOKENS = (4, 3, 2)


class PromptLookup:
    """Guesses for one sequence, of at most `max_tokens` tokens each.

    A guess that was right throughout doubles the length of the next ones, one that was all wrong halves it: wrong
    guesses cost every hop their rows, so a text that does not repeat itself is soon left alone but for one token.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._reach_tokens = max_tokens
        self._indexed = 0
        self._next_of: dict[tuple[int, ...], int] = {}

    def guess(self, token_ids: Sequence[int], room_tokens: int) -> tuple[int, ...]:
        """What may follow `token_ids`, which extend those of the call before; at most `room_tokens`, maybe none."""
        wanted = min(self._reach_tokens, room_tokens)
        if wanted <= 0:
            return ()
        self._index(token_ids)
        for size in _NGRAM_TOKENS:
            at = self._next_of.get(tuple(token_ids[-size:])) if len(token_ids) > size else None
            if at is not None:
                return tuple(token_ids[at : at + wanted])
        return ()

    def learn(self, guessed_tokens: int, right_tokens: int) -> None:
        """Tell how many of the latest guess were right."""
        if right_tokens == guessed_tokens:
            self._reach_tokens = min(2 * self._reach_tokens, self._max_tokens)
        elif right_tokens == 0:
            self._reach_tokens = max(1, self._reach_tokens // 2)

    def _index(self, token_ids: Sequence[int]) -> None:
        """Note where each n-gram that something follows was seen last."""
        for end in range(max(self._indexed, 1), len(token_ids)):
            for size in _NGRAM_TOKENS:
                if end >= size:
                    self._next_of[tuple(token_ids[end - size : end])] = end
        self._indexed = max(self._indexed, len(token_ids))
