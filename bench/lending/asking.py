"""Requests, what one machine with enough memory answers to them, and clients that ask them."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from swarm.stream import Answer, stream_answer

from lending.model import VOCABULARY
from plait import LLM, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One request; `number` draws its prompt, `seed` None is greedy."""

    number: int
    prompt_tokens: int
    answer_tokens: int
    seed: int | None = None

    @property
    def tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def prompt(self) -> list[int]:
        rng = np.random.default_rng((7, self.number))
        return [int(token) for token in rng.integers(300, VOCABULARY, self.prompt_tokens)]

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": 0.0} if self.seed is None else {"temperature": 1.0, "seed": self.seed}


class OneMachine:
    """The model in this process, with memory for everything: whose tokens are the right ones."""

    def __init__(self, model: Path, longest_tokens: int) -> None:
        self._llm = LLM(
            str(model),
            dtype="float32",
            threads=1,
            max_model_len=longest_tokens,
            kv_cache_memory="1GiB",
        )
        self._known: dict[Wish, list[int]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "OneMachine":
        self._llm.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._llm.__exit__(*error)

    def tokens(self, wish: Wish) -> list[int]:
        """The answer's tokens."""
        with self._lock:
            if wish not in self._known:
                params = SamplingParams(max_tokens=wish.answer_tokens, ignore_eos=True, **wish.sampling)
                (output,) = self._llm.generate([wish.prompt], params)
                self._known[wish] = list(output.outputs[0].token_ids)
            return self._known[wish]

    def margin(self, wish: Wish, place: int) -> float:
        """How far apart the two likeliest tokens were at a place of a greedy answer: logarithms of probabilities."""
        params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0, logprobs=2)
        with self._lock:
            (output,) = self._llm.generate([[*wish.prompt, *self._known[wish][:place]]], params)
        first = output.outputs[0].logprobs[0]
        likeliest = sorted((each.logprob for each in first.values()), reverse=True)
        return likeliest[0] - likeliest[1]


def ask(
    origin: str, wish: Wish, on_tokens: Callable[[int], None] = lambda count: None, **fields: Any
) -> Answer:
    """Ask once; whatever goes wrong is the answer's error."""
    try:
        return stream_answer(origin, wish.prompt, wish.answer_tokens, on_tokens, **wish.sampling, **fields)
    except httpx.HTTPError as error:
        return Answer(error=f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One answer in a crowd: seconds since the crowd began."""

    wish: Wish
    began_s: float
    ended_s: float
    first_token_s: float | None
    token_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    error: str

    @property
    def complete(self) -> bool:
        return not self.error and len(self.token_ids) == self.wish.answer_tokens


def ask_all(origin: str, wishes: Sequence[Wish], clients: int) -> list[Asked]:
    """So many clients ask, one answer after the other, until all wishes are done."""
    began_unix_s = time.time()

    def one(wish: Wish) -> Asked:
        asked_s = time.time() - began_unix_s
        answer = ask(origin, wish)
        came_s = tuple(at_s - began_unix_s for at_s in answer.unix_s)
        return Asked(
            wish=wish,
            began_s=asked_s,
            ended_s=time.time() - began_unix_s,
            first_token_s=came_s[0] - asked_s if came_s else None,
            token_s=came_s,
            token_ids=tuple(answer.token_ids),
            error=answer.error,
        )

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, wishes))
