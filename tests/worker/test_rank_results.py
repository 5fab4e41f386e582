"""What ranks bring together after a step is what one rank alone would have found."""

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from plait.engine import SequenceChunk
from plait.errors import EngineLost
from plait.worker.rank_links import Frame, GroupSizes
from plait.worker.rank_results import Results, gather_results

VOCABULARIES = [range(64), range(64, 192), range(192, 200)]


class Meeting:
    """Gathers among threads."""

    def __init__(self, ranks: int) -> None:
        self.brought: list[bytes] = [b""] * ranks
        self.barrier = threading.Barrier(ranks, timeout=10)
        self.gathers = 0


class ThreadLink:
    """A `RankLink` whose gathers happen in memory; the rest is not used here."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.ranks = rank, len(meeting.brought)
        self._meeting = meeting

    def gather(self, payload: bytes) -> list[bytes]:
        self._meeting.brought[self.rank] = payload
        self._meeting.barrier.wait()
        brought = list(self._meeting.brought)
        self._meeting.gathers += self.rank == 0
        self._meeting.barrier.wait()
        return brought if self.rank == 0 else []

    def open_sums(self, sizes: GroupSizes, timeout_s: float) -> None:
        raise NotImplementedError

    def send(self, to: int, frame: Frame, *, timeout_s: float) -> None:
        raise NotImplementedError

    def receive(self, sender: int, *, timeout_s: float) -> Frame:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def chunk(rows: int, top: int) -> SequenceChunk:
    return SequenceChunk(
        start=0,
        token_ids=[1] * max(1, rows),
        kv_blocks=[0],
        rope_tokens=9,
        logit_rows=rows,
        top_logits=top,
    )


def best_of(row: torch.Tensor, first_id: int, k: int) -> list[tuple[int, float]]:
    """The kernels' order, slowly: NaN, then larger, then the smaller id."""
    numbered = [(first_id + index, value) for index, value in enumerate(row.tolist())]
    ranked = sorted(numbered, key=lambda pair: (not math.isnan(pair[1]), -pair[1], pair[0]))
    return ranked[:k]


def bring_together(
    chunks: Sequence[SequenceChunk], rows: torch.Tensor, max_gather_bytes: int = 2**20
) -> tuple[Results, int]:
    """Run one gather on all ranks; `rows` are the logits of all wanted rows, in chunk order."""
    tops = [each.top_logits for each in chunks for _ in range(each.logit_rows)]
    meeting = Meeting(len(VOCABULARIES))
    results: dict[int, Results] = {}

    def be(rank: int) -> None:
        own = VOCABULARIES[rank]
        part = rows[:, own.start : own.stop]
        full = [index for index, top in enumerate(tops) if not top]
        best = [best_of(part[index], own.start, top) for index, top in enumerate(tops) if top]
        link = ThreadLink(rank, meeting)
        results[rank] = gather_results(
            link, chunks, VOCABULARIES, part[full].contiguous(), best, max_gather_bytes
        )

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(len(VOCABULARIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(results[rank].best or len(results[rank].logits) for rank in (1, 2))
    return results[0], meeting.gathers


@pytest.mark.parametrize("max_gather_bytes", [2**20, 1000, 7])
def test_best_tokens_and_all_logits_are_those_of_the_whole_row(max_gather_bytes: int) -> None:
    chunks = [chunk(1, 1), chunk(0, 0), chunk(3, 0), chunk(1, 20), chunk(2, 5)]
    rows = torch.from_numpy(np.random.default_rng(0).integers(-9, 9, (7, 200)).astype(np.float32))
    results, _ = bring_together(chunks, rows, max_gather_bytes)
    assert torch.equal(results.logits, rows[1:4])
    assert results.received_bytes == 2 * 8 * (1 + 20 + 2 * 5) + 3 * 4 * (128 + 8)
    assert results.best == [best_of(rows[index], 0, top) for index, top in ((0, 1), (4, 20), (5, 5), (6, 5))]


def test_ties_across_ranks_go_to_the_smallest_id() -> None:
    rows = torch.zeros(1, 200)
    assert bring_together([chunk(1, 3)], rows)[0].best == [[(0, 0.0), (1, 0.0), (2, 0.0)]]


def test_what_is_not_a_number_comes_first_and_is_not_lost() -> None:
    rows = torch.arange(200.0).reshape(1, 200)
    rows[0, 70] = math.nan
    ((token_id, logit),) = bring_together([chunk(1, 1)], rows)[0].best[0]
    assert token_id == 70 and math.isnan(logit)


def test_a_step_without_logits_gathers_nothing() -> None:
    results, gathers = bring_together([chunk(0, 0)], torch.zeros(0, 200))
    assert (results.logits.shape, results.best, gathers) == ((0, 200), [], 0)


def test_a_rank_that_brings_another_amount_is_named() -> None:
    class Short(ThreadLink):
        def gather(self, payload: bytes) -> list[bytes]:
            return [payload, payload[:-4], payload]

    rows = torch.zeros(1, 64)
    with pytest.raises(EngineLost, match="rank 1 brought 252 bytes to a step that needs 256"):
        gather_results(Short(0, Meeting(3)), [chunk(1, 0)], [range(64)] * 3, rows, [], 2**20)
