"""Kept inputs: what was written is read back wherever its pages lie, and pages are bounded."""

import random

import pytest
import torch

from plait.engine.span_inputs import SpanInputs
from plait.errors import KvCacheFull


def test_random_tables_read_what_they_wrote() -> None:
    rng = random.Random(4)
    inputs = SpanInputs(pages=20, page_tokens=4, hidden=3)
    tables: dict[int, list[int]] = {number: [] for number in range(5)}
    written: dict[int, torch.Tensor] = {number: torch.empty(0, 3) for number in tables}
    for _ in range(500):
        number = rng.randrange(5)
        start = rng.randint(0, len(written[number]))
        fresh = torch.randn(rng.randint(0, 9), 3)
        if not inputs.fits(tables[number], start + len(fresh)):
            with pytest.raises(KvCacheFull):
                inputs.resize(tables[number], start + len(fresh))
            continue
        inputs.resize(tables[number], start + len(fresh))
        if len(fresh):
            inputs.write(tables[number], start, fresh)
        written[number] = torch.cat([written[number][:start], fresh])
        inputs.check(tables.values())
        parts = [(n, rng.randrange(len(rows))) for n, rows in written.items() if len(rows)]
        if parts:
            read = inputs.read((tables[n], first, len(written[n]) - first) for n, first in parts)
            assert torch.equal(read, torch.cat([written[n][first:] for n, first in parts]))
    for table in tables.values():
        inputs.resize(table, 0)
    inputs.check([])
    assert inputs.fits([], inputs.total_tokens) and not inputs.fits([], inputs.total_tokens + 1)


def test_where_token_ids_are_the_inputs_pages_cost_nothing() -> None:
    assert SpanInputs.page_bytes(16, None) == 0
    assert SpanInputs.page_bytes(16, 256) == 16 * 256 * 4
    inputs, table = SpanInputs(pages=2, page_tokens=16, hidden=None), []
    inputs.resize(table, 17)
    assert not inputs.fits([], 1)
