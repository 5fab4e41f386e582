# pyright: standard
"""Sampling the rows of many sessions, some of which guess their next tokens.

A feed [t, d1 .. dk] with k drafts has k + 1 rows. The first row's token is what plain decoding would give after t. If
it is d1, the second row's token is what it would give after d1, and so on; rows after the first token that is not the
guessed one have seen a wrong history and are of no use. So a feed gives at least one token and at most k + 1, exactly
those of plain decoding. For greedy choice that is Stern et al. 2018 (blockwise parallel decoding), section 3; it holds
for seeded sampling too, because a position's random number does not depend on how the position was reached. (The rule
of Leviathan et al. 2023 keeps the distribution of the tokens; this keeps the tokens.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from plait.engine.sampling import SampledToken, SamplingRow, sample_each, take_best
from plait.engine.span_session import DueRows, LiveSession
from plait.errors import ServingError


def sample_due(
    due_rows: Sequence[DueRows], logits: Tensor, vocab_limit: int, non_finite: Callable[[], str]
) -> list[tuple[LiveSession, ServingError]]:
    """Sample into the feeds; returns the sessions of which a row cannot be sampled, and why.

    The first rows of all are sampled together, then the second ones of those that go on, and so forth. `logits` is
    float32 [rows, vocab]; ids from `vocab_limit` on are padding. `non_finite` says where numbers ended, if they did.
    """
    failures: list[tuple[LiveSession, ServingError]] = []
    going_on = list(due_rows)
    depth = 0
    while going_on:
        tokens = _sample_row(going_on, depth, logits, vocab_limit, non_finite)
        depth += 1
        further: list[DueRows] = []
        for due, token in zip(going_on, tokens, strict=True):
            if not isinstance(token, SampledToken):
                failures.append((due.live, token))
            elif _take(due, token) and depth < len(due.positions):
                further.append(due)
        going_on = further
    return failures


def _sample_row(
    going_on: Sequence[DueRows],
    depth: int,
    logits: Tensor,
    vocab_limit: int,
    non_finite: Callable[[], str],
) -> list[SampledToken | ServingError]:
    """The tokens of everybody's row number `depth`."""
    rows: list[SamplingRow] = []
    at: list[int] = []
    for due in going_on:
        if due.best is None:
            rows.append(due.answer.row(due.known, due.positions[depth]))
            at.append(due.first_row + depth)
    sampled = iter(())
    if rows:
        own = logits if at == list(range(len(logits))) else logits[torch.tensor(at, device=logits.device)]
        sampled = iter(sample_each(own, rows, vocab_limit))
    return [
        next(sampled) if due.best is None else take_best(*due.best[depth], non_finite) for due in going_on
    ]


def _take(due: DueRows, token: SampledToken) -> bool:
    """Note a sampled token; whether the next row of its feed has seen the right history."""
    feed, language = due.feed, due.answer.language
    following = feed.sampled_from + len(feed.sampled) + 1
    feed.sampled.append(token)
    ends = token.token_id in due.answer.stop_token_ids
    if not ends and language is not None:
        ends = feed.completes = language.take(token.token_id)
    if feed.drafts_from <= following < feed.end:
        feed.stopped = ends or token.token_id != due.known[following]
    return not feed.stopped
