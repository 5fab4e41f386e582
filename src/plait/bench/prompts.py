"""Text of a wanted number of tokens.

Prompts are sentences from public-domain books and speeches (Carroll, Dickens, Austen, Melville, Lincoln,
Doyle, Darwin, Wells and others) in an order of their own, cut at a word. Each opens with a number, so that no
two share a prefix for a server to reuse.
"""

from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files

from numpy.random import Generator

# OpenAI's rule of thumb for English: 100 tokens are about 75 words.
WORDS_PER_TOKEN = 0.75
# Each try corrects by the words per token that the one before found: more of them gain nothing.
_MAX_TRIES = 8

CountTokens = Callable[[str], Awaitable[int]]


async def estimate_tokens(text: str) -> int:
    """Count tokens by the rule of thumb, for servers that do not show their tokenizer."""
    return round(len(text.split()) / WORDS_PER_TOKEN)


async def write_prompt(tokens: int, count_tokens: CountTokens, rng: Generator) -> str:
    """Write text of as close to `tokens` tokens as whole words allow, and not above where one word fits."""
    words = _shuffled_words(tokens, rng)
    lowest, highest = 1, len(words)  # the longest text known to fit, and the longest that may
    tried = round(tokens * WORDS_PER_TOKEN)
    for _ in range(_MAX_TRIES):
        tried = min(max(tried, lowest), highest)
        count = await count_tokens(" ".join(words[:tried]))
        if count > tokens:
            highest = max(tried - 1, lowest)
        else:
            lowest = tried
        if count == tokens or lowest == highest:
            break
        step = round((tokens - count) * tried / max(count, 1))
        tried += step or (1 if count < tokens else -1)
    return " ".join(words[:lowest])


def _shuffled_words(tokens: int, rng: Generator) -> list[str]:
    # No tokenizer makes fewer than one token of three of these words, so three times `tokens` always suffice.
    sentences = _sentences()
    words = [f"{rng.integers(10**9)}."]
    while len(words) < 3 * tokens:
        order: list[int] = rng.permutation(len(sentences)).tolist()
        for index in order:
            words += sentences[index]
    return words[: 3 * tokens]


@cache
def _sentences() -> tuple[tuple[str, ...], ...]:
    prose = files("plait.bench").joinpath("prose.txt").read_text(encoding="utf-8")
    return tuple(tuple(line.split()) for line in prose.splitlines())
