"""Prompts: turning long texts into tokens beside the event loop, and the room they leave for an answer."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from plait.errors import ContextLengthExceeded
from plait.session import SamplingParams
from plait.worker import ServedModel

T = TypeVar("T")

# Encoding runs at about 1 MB/s: texts above this take more than 10 ms, during which no stream would move.
LONG_TEXT_CHARACTERS = 10_000


async def off_loop_if_long(call: Callable[[], T], characters: int) -> T:
    """Run `call`, in a thread if the text it works on is long."""
    return call() if characters <= LONG_TEXT_CHARACTERS else await asyncio.to_thread(call)


async def text_prompt(model: ServedModel, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Turn a text prompt into token ids."""

    def encode() -> Sequence[int]:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    return tuple(await off_loop_if_long(encode, len(text)))


def check_room(model: ServedModel, prompt_tokens: int, sampling: SamplingParams) -> SamplingParams:
    """Check that prompt and answer fit the model; an answer without a limit may fill what is left.

    Raises:
        ContextLengthExceeded: they do not; the message has the numbers.
    """
    limit = model.max_model_tokens
    asked = sampling.max_tokens
    if prompt_tokens >= limit:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, prompt and answer together, and "
            f"the prompt has {prompt_tokens}; shorten it",
            param="prompt",
        )
    if asked is None:
        return replace(sampling, max_tokens=limit - prompt_tokens)
    if prompt_tokens + asked > limit:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, and {prompt_tokens + asked} were "
            f"asked for ({prompt_tokens} in the prompt, {asked} for the answer); "
            "shorten the prompt or ask for fewer",
            param="max_tokens",
        )
    return sampling
