# pyright: standard
"""What the ranks make of a step, brought together: each has the logits of its own slice of the vocabulary.

A row that only needs its k best tokens brings k pairs (id, logit) a rank, and the best k of all pairs are exactly the
best of the whole row. A row that needs all its logits brings its slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from plait.engine import SequenceChunk
from plait.errors import EngineLost
from plait.worker.rank_links import RankLink

Best = Sequence[Sequence[tuple[int, float]]]
"""For every row that wants its best tokens only, (id, logit), best first."""

_BEST = np.dtype([("id", "<i4"), ("logit", "<f4")])


@dataclass(frozen=True, slots=True)
class Results:
    """What rank 0 has of a step: float32 logits [rows that need all of them, vocab], and the best of the other rows."""

    logits: Tensor
    best: Best
    received_bytes: int = 0
    """What the other ranks sent for it."""


def gather_results(
    link: RankLink,
    chunks: Sequence[SequenceChunk],
    vocabularies: Sequence[range],
    logits: Tensor,
    best: Best,
    max_gather_bytes: int,
) -> Results:
    """Bring a rank's logits [rows, its vocabulary] and best tokens together; every rank calls this after every step.

    All but rank 0 get an empty result.

    Raises:
        EngineLost: a rank failed.
    """
    full_rows = sum(chunk.logit_rows for chunk in chunks if not chunk.top_logits)
    tops = [top for chunk in chunks for top in [chunk.top_logits] * chunk.logit_rows if top]
    sizes_bytes = [
        _BEST.itemsize * sum(tops) + 4 * full_rows * len(vocabulary) for vocabulary in vocabularies
    ]
    brought = b"".join(
        (_pairs_of(best, tops).tobytes(), logits.numpy().tobytes() if full_rows else b""),
    )
    parts: list[list[bytes]] = []
    # As many pieces as the longest needs: the ranks' slices differ by some tokens.
    for start in range(0, max(sizes_bytes), max_gather_bytes):
        parts.append(link.gather(brought[start : start + max_gather_bytes]))
    if link.rank != 0:
        return Results(torch.empty(0, 0), ())
    whole = [b"".join(pieces) for pieces in zip(*parts, strict=True)]
    for rank, (content, size_bytes) in enumerate(zip(whole, sizes_bytes, strict=False)):
        if len(content) != size_bytes:
            raise EngineLost(f"rank {rank} brought {len(content)} bytes to a step that needs {size_bytes}")
    return Results(
        logits=_all_logits(whole, full_rows, sum(tops), vocabularies),
        best=_all_best(whole, tops),
        received_bytes=sum(len(content) for content in whole[1:]),
    )


def _pairs_of(best: Best, tops: Sequence[int]) -> np.ndarray:
    """The pairs of all rows; a rank whose slice has fewer tokens than are wanted fills up with none."""
    pairs = np.full(sum(tops), -1, dtype=_BEST)
    first = 0
    for row, top in zip(best, tops, strict=True):
        pairs[first : first + len(row)] = row
        first += top
    return pairs


def _all_logits(whole: Sequence[bytes], rows: int, pairs: int, vocabularies: Sequence[range]) -> Tensor:
    logits = torch.empty(rows, vocabularies[-1].stop)
    if not rows:
        return logits
    for content, vocabulary in zip(whole, vocabularies, strict=True):
        part = np.frombuffer(content, "<f4", offset=_BEST.itemsize * pairs).reshape(rows, len(vocabulary))
        logits.numpy()[:, vocabulary.start : vocabulary.stop] = part
    return logits


def _all_best(whole: Sequence[bytes], tops: Sequence[int]) -> list[list[tuple[int, float]]]:
    by_rank = [np.frombuffer(content, _BEST, count=sum(tops)) for content in whole]
    best: list[list[tuple[int, float]]] = []
    first = 0
    for top in tops:
        pairs = chain.from_iterable(pairs[first : first + top].tolist() for pairs in by_rank)
        best.append(sorted((pair for pair in pairs if pair[0] >= 0), key=_order)[:top])
        first += top
    return best


def _order(pair: tuple[int, float]) -> tuple[bool, float, int]:
    """As the kernels rank tokens (csrc/table.h, fold_top): NaN first, then the larger logit, then the smaller id."""
    token_id, logit = pair
    is_number = logit == logit
    return is_number, -logit if is_number else 0.0, token_id
