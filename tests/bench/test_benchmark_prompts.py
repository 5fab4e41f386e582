import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from other_server import count_tokens

from plait.bench.prompts import estimate_tokens, write_prompt


async def count(text: str) -> int:
    return count_tokens(text)


def write(tokens: int, seed: int) -> str:
    return asyncio.run(write_prompt(tokens, count, np.random.default_rng(seed)))


@given(tokens=st.integers(4, 3000), seed=st.integers(0, 50))
def test_a_prompt_has_the_wanted_tokens_up_to_its_last_word(tokens: int, seed: int) -> None:
    # The longest word of the prose is 15 characters, four of the tokens that `count` makes.
    assert tokens - 4 < count_tokens(write(tokens, seed)) <= tokens


def test_a_prompt_is_text_even_where_no_word_fits() -> None:
    assert write(1, 0).rstrip(".").isdigit()


def test_prompts_of_different_seeds_share_no_prefix_and_equal_seeds_repeat() -> None:
    prompts = [write(64, seed) for seed in range(20)]
    assert len({prompt.split()[0] for prompt in prompts}) == 20
    assert prompts[3] == write(64, 3)


@pytest.mark.parametrize("tokens", [16, 161, 1024])
def test_without_a_tokenizer_a_hundred_tokens_are_75_words(tokens: int) -> None:
    prompt = asyncio.run(write_prompt(tokens, estimate_tokens, np.random.default_rng(0)))
    assert len(prompt.split()) == pytest.approx(tokens * 0.75, abs=1)
