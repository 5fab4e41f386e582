"""Prefix hits of the scheduler against a trie of full blocks."""

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_engine import SimulatedEngine

prompts = st.lists(
    st.tuples(
        st.builds(
            lambda head, shared, tail: [head, *[0, 1, 1, 0, 0, 1][:shared], *tail],
            st.integers(0, 1),
            st.integers(0, 6),
            st.lists(st.integers(0, 1), max_size=6),
        ),
        st.integers(1, 6),
        st.sampled_from([b"one", b"two"]),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(prompts, st.sampled_from([1, 2, 3]))
def test_hits_are_those_of_a_trie_of_full_blocks(
    asked: list[tuple[list[int], int, bytes, bool]], block_tokens: int
) -> None:
    """Nothing is evicted here, so a hit is the longest path of full blocks that anybody has computed."""
    engine = SimulatedEngine("paged", kv_blocks=400, block_tokens=block_tokens)
    trie: set[tuple[bytes, tuple[int, ...]]] = set()
    for prompt, new_tokens, namespace, reuse_prefix in asked:
        request_id = engine.submit(
            prompt, new_tokens=new_tokens, namespace=namespace, reuse_prefix=reuse_prefix
        )
        (chunk,) = engine.step().chunks
        hit_blocks = 0
        while (
            reuse_prefix
            and (hit_blocks + 1) * block_tokens < len(prompt)
            and (namespace, tuple(prompt[: (hit_blocks + 1) * block_tokens])) in trie
        ):
            hit_blocks += 1
        assert chunk.start == hit_blocks * block_tokens
        # All its tokens but the last one sampled are computed in the end; tokens sampled are 7.
        computed = prompt + [7] * (new_tokens - 1)
        while request_id in engine.requests:
            assert engine.scheduler.cached_tokens(request_id) == chunk.start
            engine.step()
        for end in range(block_tokens, len(computed) + 1, block_tokens):
            trie.add((namespace, tuple(computed[:end])))
    engine.check_nothing_is_left()


def test_a_prompt_known_entirely_still_computes_its_last_token() -> None:
    engine = SimulatedEngine("paged", block_tokens=4)
    for _ in range(2):
        engine.submit([1] * 8)
        engine.run_until_idle()
    counts = engine.scheduler.counts()
    assert (counts.prefix_query_tokens_total, counts.prefix_hit_tokens_total) == (16, 4)


def test_generated_tokens_are_found_by_the_next_turn_of_a_chat() -> None:
    engine = SimulatedEngine("paged", block_tokens=4)
    engine.submit([1] * 6, new_tokens=7)
    engine.run_until_idle()
    engine.submit([1] * 6 + [7] * 7 + [2] * 3)
    (chunk,) = engine.step().chunks
    assert chunk.start == 12


def test_two_running_requests_share_one_copy_of_their_prefix() -> None:
    engine = SimulatedEngine("paged", block_tokens=4)
    engine.submit([1] * 12 + [2])
    engine.step()
    engine.submit([1] * 12 + [3])
    engine.step()
    assert engine.pool.used_blocks == 3 + 1 + 1


def test_another_tenant_never_hits() -> None:
    engine = SimulatedEngine("paged", block_tokens=4)
    for namespace in (b"tenant one", b"tenant two"):
        engine.submit([1] * 13, namespace=namespace)
        engine.run_until_idle()
    assert engine.scheduler.counts().prefix_hit_tokens_total == 0


def test_a_cached_prefix_counts_once_when_two_take_it_back_in_one_step() -> None:
    engine = SimulatedEngine("paged", kv_blocks=8, block_tokens=4, watermark_fraction=0.0)
    engine.submit([1] * 16, new_tokens=2)
    engine.run_until_idle()
    both = tuple(engine.submit([1] * 16 + [token], new_tokens=3) for token in (2, 3))
    assert engine.step().admitted == both
    assert engine.pool.used_blocks == 4 + 1 + 1
    engine.run_until_idle()
