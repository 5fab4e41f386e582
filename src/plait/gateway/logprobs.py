"""Log-probabilities as OpenAI's two APIs write them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from plait.engine import Tokenizer
from plait.session import PositionLogprobs, TokenLogprob

# JSON has no -inf; vLLM and OpenAI write this number for "impossible".
IMPOSSIBLE = -9999.0


def chat_logprobs(tokenizer: Tokenizer, positions: Iterable[PositionLogprobs]) -> list[dict[str, Any]]:
    """The `content` list of a chat choice's logprobs."""
    return [
        {
            **_token_object(tokenizer, position.chosen),
            "top_logprobs": [_token_object(tokenizer, token) for token in position.top],
        }
        for position in positions
    ]


class LegacyLogprobs:
    """The `logprobs` object of a completion, in parts: offsets go on where the last part ended."""

    def __init__(self, tokenizer: Tokenizer, *, top: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = 0

    def take(
        self, positions: Sequence[PositionLogprobs | None], first_token_id: int | None
    ) -> dict[str, Any]:
        """The object for the next positions; a first prompt token has an id but no log-probabilities."""
        tokens: list[str] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for position in positions:
            token_id = position.chosen.token_id if position is not None else first_token_id
            text = token_text(self._tokenizer, token_id) if token_id is not None else ""
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            chosen.append(None if position is None else finite(position.chosen.logprob))
            tops.append(None if position is None else self._alternatives(position))
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }

    def _alternatives(self, position: PositionLogprobs) -> dict[str, float]:
        alternatives = {
            token_text(self._tokenizer, token.token_id): finite(token.logprob) for token in position.top
        }
        alternatives.setdefault(
            token_text(self._tokenizer, position.chosen.token_id), finite(position.chosen.logprob)
        )
        return alternatives


def prompt_logprobs_object(
    tokenizer: Tokenizer, positions: Sequence[PositionLogprobs | None]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token its id and alternatives, None for the first."""
    return [
        None
        if position is None
        else {
            str(token.token_id): {
                "logprob": finite(token.logprob),
                "decoded_token": token_text(tokenizer, token.token_id),
            }
            for token in (position.chosen, *position.top)
        }
        for position in positions
    ]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token on its own; part of a character shows as U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def _token_object(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, Any]:
    token_bytes = tokenizer.token_bytes(token.token_id)
    return {
        "token": token_bytes.decode("utf-8", errors="replace"),
        "logprob": finite(token.logprob),
        "bytes": list(token_bytes),
    }
