import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.profiler import ProfileGrid
from plait.profiler.grid import GridPoint


def rows_of(
    points: tuple[GridPoint, ...], operation: str, *, shown_only: bool = False
) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for point in points:
        if point.operation == operation and not (shown_only and point.held_out):
            rows.setdefault(point.row, []).append(point.place)
    return rows


@given(
    step_tokens=st.integers(1, 3000),
    context_tokens=st.integers(0, 5000),
    sequences=st.integers(1, 300),
    sequence_tokens=st.integers(2, 5000),
    more_blocks=st.integers(0, 10**5),
)
def test_a_grid_stays_in_its_bounds_and_its_tables_never_extrapolate_to_what_was_held_out(
    step_tokens: int, context_tokens: int, sequences: int, sequence_tokens: int, more_blocks: int
) -> None:
    grid = ProfileGrid(
        step_tokens=step_tokens,
        context_tokens=min(context_tokens, sequence_tokens - 1),
        sequences=sequences,
        kv_blocks=-(-sequence_tokens // 16) + more_blocks,
        block_tokens=16,
        sequence_tokens=sequence_tokens,
    )
    points = grid.points()
    assert len(set(points)) == len(points)
    for operation in ("dense", "head", "prefill", "decode"):
        rows = rows_of(points, operation)
        shown = rows_of(points, operation, shown_only=True)
        assert all(places == sorted(set(places)) for places in rows.values())
        assert not rows or max(shown) == max(rows)
        assert all(places[-1] == rows[row][-1] for row, places in shown.items())
    for point in points:
        if point.operation == "decode":
            assert point.row <= min(sequences, step_tokens)
            assert point.row * -(-(point.place + 1) // 16) <= grid.kv_blocks
        assert point.place >= 0
        if point.operation == "prefill":
            assert point.row + point.place <= sequence_tokens
            assert point.row <= step_tokens
    assert rows_of(points, "dense")[0][-1] == min(step_tokens, 16 * grid.kv_blocks)


def test_every_third_point_is_held_out() -> None:
    grid = ProfileGrid(
        step_tokens=512,
        context_tokens=4096,
        sequences=64,
        kv_blocks=10**5,
        block_tokens=16,
        sequence_tokens=8192,
    )
    points = grid.points()
    dense = [point.held_out for point in points if point.operation == "dense"]
    assert dense == [index % 3 == 2 and index < 17 for index in range(18)]
    held_out = sum(point.held_out for point in points)
    assert 0.3 < held_out / len(points) < 0.6  # whole rows of the grids, and places of the others


def test_a_memory_without_room_for_one_sequence_is_refused() -> None:
    with pytest.raises(BadSetup, match="raise --kv-cache-memory"):
        ProfileGrid(
            step_tokens=4, context_tokens=4, sequences=1, kv_blocks=1, block_tokens=16, sequence_tokens=20
        )
