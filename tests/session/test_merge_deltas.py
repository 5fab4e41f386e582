"""Deltas that were not read in time are read as one."""

from hypothesis import given
from hypothesis import strategies as st

from plait.ids import RequestId
from plait.session import PositionLogprobs, RequestDelta, SequenceDelta, TokenLogprob, merge_deltas

ID = RequestId("r")


def position(token_id: int) -> PositionLogprobs:
    return PositionLogprobs(TokenLogprob(token_id, -1.0), ())


@st.composite
def delta_runs(draw: st.DrawFn) -> list[RequestDelta]:
    """What three sequences gained over some steps; each may end before the last."""
    steps = draw(st.integers(1, 8))
    ends = [draw(st.integers(0, steps - 1)) for _ in range(2)] + [steps - 1]
    with_logprobs = draw(st.booleans())
    deltas: list[RequestDelta] = []
    for step in range(steps):
        sequences: list[SequenceDelta] = []
        for index, end in enumerate(ends):
            if step <= end:
                token_id = 10 * step + index
                logprobs = (position(token_id),) if with_logprobs else None
                reason = "length" if step == end else None
                sequences.append(SequenceDelta(index, (token_id,), f"{token_id},", logprobs, reason))
        last = step == steps - 1
        prompt_logprobs = (None, position(1)) if step == 0 else None
        deltas.append(RequestDelta(ID, tuple(sequences), last, 5, 2, prompt_logprobs))
    return deltas


def read(deltas: list[RequestDelta]) -> dict[int, tuple[tuple[int, ...], str, tuple[int, ...], str | None]]:
    """Everything a reader learns of each sequence."""
    learned: dict[int, tuple[tuple[int, ...], str, tuple[int, ...], str | None]] = {}
    for delta in deltas:
        for sequence in delta.sequences:
            token_ids, text, chosen, _ = learned.get(sequence.index, ((), "", (), None))
            more = tuple(found.chosen.token_id for found in sequence.logprobs or ())
            learned[sequence.index] = (
                token_ids + sequence.token_ids,
                text + sequence.text,
                chosen + more,
                sequence.finish_reason,
            )
    return learned


@given(delta_runs(), st.data())
def test_merging_any_run_of_deltas_changes_nothing_for_the_reader(
    deltas: list[RequestDelta], data: st.DataObject
):
    first = data.draw(st.integers(0, len(deltas) - 1))
    last = data.draw(st.integers(first + 1, len(deltas)))
    merged = [*deltas[:first], merge_deltas(deltas[first:last]), *deltas[last:]]
    assert read(merged) == read(deltas)
    assert merged[0].prompt_logprobs == deltas[0].prompt_logprobs
    assert all(delta.prompt_logprobs is None for delta in merged[1:])
    assert [delta.finished for delta in merged] == [False] * (len(merged) - 1) + [True]
    assert (merged[-1].prompt_tokens, merged[-1].cached_tokens) == (5, 2)
