"""Beam search as a pure function from candidates to survivors.

The rules are those of `transformers` 5 (`GenerationMixin._beam_search` with `early_stopping=False`), so a
search finds the same hypotheses:

- The best `candidates_per_beam` continuations of all beams are ranked by cumulative log-probability, ties by
  beam, then by token id.
- A continuation has ended if its token is an end token or its length is the limit. Ended ones among the first
  `width` become finished hypotheses with score = cumulative log-probability / length ** length_penalty (the
  length counts generated tokens, the end token too); the best `width` finished are kept. Ended ones further
  down are lost.
- The first `width` that have not ended are the next beams.
- The search is over when `width` are finished and the best beam, scored at its present length, beats none of
  them; or at the length limit.

vLLM differs in the last two: it keeps every finished hypothesis and never stops before the limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from plait.session import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """What stays the same during one search; `max_tokens` and `min_tokens` count generated tokens."""

    width: int
    max_tokens: int
    end_token_ids: frozenset[int] = frozenset()
    length_penalty: float = 1.0
    min_tokens: int = 0

    @property
    def candidates_per_beam(self) -> int:
        """Continuations of each beam to offer: enough that `width` go on even if all the best ones end."""
        return max(2, 1 + len(self.end_token_ids)) * self.width


@dataclass(frozen=True, slots=True)
class Beam:
    """One hypothesis that goes on: its generated tokens and the log-probability of each."""

    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    cumulative_logprob: float = 0.0

    def extended(self, token: TokenLogprob) -> "Beam":
        """This hypothesis with one more token."""
        return Beam(
            (*self.token_ids, token.token_id),
            (*self.token_logprobs, token.logprob),
            self.cumulative_logprob + token.logprob,
        )


@dataclass(frozen=True, slots=True)
class FinishedBeam:
    """One complete hypothesis; `ended` says by an end token, which `beam` includes, and not by the limit."""

    beam: Beam
    score: float
    ended: bool


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """The state of one search: it starts with a single empty beam, `done` once nothing is left to do."""

    beams: tuple[Beam, ...] = field(default_factory=lambda: (Beam(),))
    finished: tuple[FinishedBeam, ...] = ()
    done: bool = False


def advance_beams(
    search: BeamSearch, candidates: Sequence[Sequence[TokenLogprob]], options: BeamOptions
) -> tuple[BeamSearch, tuple[int, ...]]:
    """Fold one step's candidates into a search.

    `candidates` holds, for each beam in order, its `options.candidates_per_beam` most likely next tokens.
    Returns the next state and, for each of its beams, the index of the beam it continues: those to fork. Both
    are empty of beams once the search is done.
    """
    assert not search.done and len(candidates) == len(search.beams)
    length = len(search.beams[0].token_ids) + 1
    at_limit = length >= options.max_tokens
    ranked = _ranked(search, candidates, options, length)
    finished = list(search.finished)
    going_on: list[tuple[int, Beam]] = []
    for rank, (parent, token) in enumerate(ranked):
        ended = token.token_id in options.end_token_ids
        if not ended and not at_limit:
            if len(going_on) < options.width:
                going_on.append((parent, search.beams[parent].extended(token)))
        elif rank < options.width:
            beam = search.beams[parent].extended(token)
            finished.append(FinishedBeam(beam, _score(beam.cumulative_logprob, length, options), ended))
    finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[: options.width]
    done = not going_on
    if not done and len(finished) == options.width:
        done = _score(going_on[0][1].cumulative_logprob, length, options) <= finished[-1].score
    if done:
        return BeamSearch((), tuple(finished), True), ()
    beams = tuple(beam for _, beam in going_on)
    return BeamSearch(beams, tuple(finished)), tuple(parent for parent, _ in going_on)


def best_beams(search: BeamSearch, n: int) -> tuple[FinishedBeam, ...]:
    """The `n` best finished hypotheses of a search, best first."""
    return search.finished[:n]


def _ranked(
    search: BeamSearch, candidates: Sequence[Sequence[TokenLogprob]], options: BeamOptions, length: int
) -> list[tuple[int, TokenLogprob]]:
    too_short = length <= options.min_tokens
    offered = [
        (-(search.beams[parent].cumulative_logprob + token.logprob), parent, token.token_id, token)
        for parent, tokens in enumerate(candidates)
        for token in tokens
        if token.logprob > -math.inf and not (too_short and token.token_id in options.end_token_ids)
    ]
    offered.sort(key=lambda offer: offer[:3])
    return [(parent, token) for _, parent, _, token in offered[: options.candidates_per_beam]]


def _score(cumulative_logprob: float, length: int, options: BeamOptions) -> float:
    return cumulative_logprob / length**options.length_penalty
