"""Three families of lengths, and the same requests served with lending off and on."""

from collections.abc import Sequence

import numpy as np

from lending.asking import Asked, Wish
from plait.workload import LogNormal, Uniform

FAMILIES = ("uniform short", "long tail", "few very long")


def wishes_of(family: str, count: int, pool_tokens: int, seed: int = 0) -> list[Wish]:
    """Greedy requests; the longest of all families fit the pools of three machines together."""
    rng = np.random.default_rng((seed, FAMILIES.index(family)))
    answers = Uniform(range(32, 97)).draw(count, rng)
    if family == "uniform short":
        prompts = Uniform(range(96, 160)).draw(count, rng)
    elif family == "long tail":
        prompts = np.clip(LogNormal(pool_tokens / 5, 1.1).draw(count, rng), 16, 2 * pool_tokens)
    else:
        prompts = Uniform(range(64, 128)).draw(count, rng)
        long = slice(3, None, 8)
        prompts[long] = Uniform(range(3 * pool_tokens // 2, 2 * pool_tokens)).draw(len(prompts[long]), rng)
    base = 10_000 * (1 + FAMILIES.index(family))
    return [
        Wish(number=base + place, prompt_tokens=int(prompt), answer_tokens=int(answer))
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def served(asked: Sequence[Asked]) -> dict[str, float]:
    """What a crowd got: answers, tokens a second of those that were whole, the longest context, waiting."""
    done = [each for each in asked if each.complete]
    seconds = max((each.ended_s for each in asked), default=0.0)
    firsts = sorted(each.first_token_s for each in done if each.first_token_s is not None)
    gaps = sorted(
        later - one for each in done for one, later in zip(each.token_s, each.token_s[1:], strict=False)
    )
    return {
        "asked": len(asked),
        "completed": len(done),
        "seconds": seconds,
        "tokens_per_s": sum(len(each.token_ids) for each in done) / seconds,
        "prompt_and_answer_tokens_per_s": sum(each.wish.tokens for each in done) / seconds,
        "longest_context_tokens": max((each.wish.tokens for each in done), default=0),
        "first_token_p50_s": float(np.percentile(firsts, 50)) if firsts else 0.0,
        "first_token_p95_s": float(np.percentile(firsts, 95)) if firsts else 0.0,
        "token_p50_s": float(np.percentile(gaps, 50)) if gaps else 0.0,
        "token_p95_s": float(np.percentile(gaps, 95)) if gaps else 0.0,
    }
