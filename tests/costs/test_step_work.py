from hypothesis import given
from hypothesis import strategies as st

from plait.costs import StepWork

chunks = st.lists(st.tuples(st.integers(1, 600), st.integers(0, 5000)), max_size=12)


def test_the_sums_of_a_mixed_step() -> None:
    features = StepWork.of([(1, 100), (1, 0), (3, 10)], sampled=2).features
    assert (features.sequences, features.tokens, features.decodes, features.prefill_tokens) == (3, 5, 2, 3)
    assert (features.context_tokens, features.decode_context_tokens) == (110, 100)
    assert (features.chunk_times_context, features.prefill_chunk_times_context) == (130, 30)
    assert (features.chunk_squared, features.prefill_chunk_squared) == (11, 9)
    # 101 keys, 1 key, then 11 + 12 + 13 keys
    assert features.attended_tokens == 101 + 1 + 36


@given(chunks)
def test_attended_tokens_are_the_pairs_that_a_causal_mask_keeps(pairs: list[tuple[int, int]]) -> None:
    counted = sum(sum(range(context + 1, context + new + 1)) for new, context in pairs)
    assert StepWork.of(pairs, sampled=0).features.attended_tokens == counted


@given(chunks, chunks)
def test_features_add_up_over_sequences(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    both = StepWork.of(first + second, sampled=0).features
    alone = [StepWork.of(part, sampled=0).features for part in (first, second)]
    for name in type(both).__slots__:
        assert getattr(both, name) == sum(getattr(part, name) for part in alone)
