"""What is asked of every engine: prompts of random tokens, so that none shares a beginning, and lengths."""

from dataclasses import dataclass

import numpy as np

_FIRST_TOKEN_ID = 300  # below are special tokens and single bytes in the tokenizers used here
_LAST_TOKEN_ID = 2000  # every tokenizer used here has as many


@dataclass(frozen=True, slots=True)
class Request:
    prompt: tuple[int, ...]
    output_tokens: int


def requests(prompt_tokens: int, output_tokens: int, *, count: int = 1, seed: int = 0) -> list[Request]:
    """Requests of one shape; equal seeds give equal prompts."""
    rng = np.random.default_rng((seed, prompt_tokens))
    return [Request(_prompt(rng, prompt_tokens), output_tokens) for _ in range(count)]


def chat_mix(count: int = 64, *, seed: int = 0) -> list[Request]:
    """Lengths like those of chats: log-normal with spread 0.8 around means of 200 tokens in (8 to 512) and 120 out
    (4 to 256).
    """
    rng = np.random.default_rng((seed, 0))
    spread = 0.8

    def lengths(mean_tokens: float, least: int, most: int) -> list[int]:
        drawn = rng.lognormal(np.log(mean_tokens) - spread**2 / 2, spread, size=count)
        return np.clip(np.rint(drawn), least, most).astype(int).tolist()

    shapes = list(zip(lengths(200, 8, 512), lengths(120, 4, 256), strict=True))
    return [Request(_prompt(rng, prompt), output) for prompt, output in shapes]


def _prompt(rng: np.random.Generator, tokens: int) -> tuple[int, ...]:
    return tuple(rng.integers(_FIRST_TOKEN_ID, _LAST_TOKEN_ID, tokens).tolist())
