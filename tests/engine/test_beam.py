"""Beam search finds what transformers finds."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from plait.engine.beam import BeamOptions, BeamSearch, advance_beams, best_beams
from plait.engine.sampling import top_candidates
from plait.session import TokenLogprob

VOCAB = 40


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def search(llama: LlamaForCausalLM, prompt: list[int], options: BeamOptions) -> tuple[BeamSearch, int]:
    state, steps = BeamSearch(), 0
    while not state.done:
        rows = torch.tensor([[*prompt, *beam.token_ids] for beam in state.beams])
        with torch.no_grad():
            logits = llama(rows).logits[:, -1].float()
        state, parents = advance_beams(state, top_candidates(logits, options.candidates_per_beam), options)
        assert len(parents) == len(state.beams)
        steps += 1
    return state, steps


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ends", [(5,), (5, 9, 17), ()])
@pytest.mark.parametrize(
    ("width", "length_penalty", "min_tokens"),
    [(1, 1.0, 0), (3, 1.0, 0), (4, 0.0, 3), (5, -1.5, 0), (4, 2.0, 0)],
)
def test_hypotheses_and_scores_equal_transformers(
    llama: LlamaForCausalLM,
    seed: int,
    ends: tuple[int, ...],
    width: int,
    length_penalty: float,
    min_tokens: int,
) -> None:
    prompt = torch.randint(VOCAB, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    limit = 12
    options = BeamOptions(
        width=width,
        max_tokens=limit,
        end_token_ids=frozenset(ends),
        length_penalty=length_penalty,
        min_tokens=min_tokens,
    )
    theirs: Any = llama.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=limit,
        length_penalty=length_penalty,
        early_stopping=False,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=1,
        min_new_tokens=min_tokens or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found, _ = search(llama, prompt, options)
    ours = best_beams(found, width)
    if width == 1:  # transformers searches greedily then, and reports no scores
        expected = theirs.sequences[0, len(prompt) :].tolist()
        assert list(ours[0].beam.token_ids) == expected[: len(ours[0].beam.token_ids)]
        return
    for hypothesis, sequence, score in zip(ours, theirs.sequences, theirs.sequences_scores, strict=True):
        generated = sequence[len(prompt) :].tolist()
        length = len(hypothesis.beam.token_ids)
        assert list(hypothesis.beam.token_ids) == generated[:length]
        assert set(generated[length:]) <= {1}
        # transformers adds log-probabilities up in float32, we in float64
        assert hypothesis.score == pytest.approx(float(score), rel=1e-5)
        assert hypothesis.ended == (hypothesis.beam.token_ids[-1] in ends)


def offers(*beams: dict[int, float]) -> list[list[TokenLogprob]]:
    return [[TokenLogprob(token, math.log(p)) for token, p in beam.items()] for beam in beams]


def test_ties_go_to_the_earlier_beam_and_the_lower_token() -> None:
    options = BeamOptions(width=3, max_tokens=9)
    state, parents = advance_beams(BeamSearch(), offers({7: 0.25, 3: 0.25, 5: 0.25, 1: 0.25}), options)
    assert [beam.token_ids for beam in state.beams] == [(1,), (3,), (5,)]
    state, parents = advance_beams(state, offers({2: 0.5, 1: 0.5}, {4: 0.5, 0: 0.5}, {6: 0.5}), options)
    assert parents == (0, 0, 1)
    assert [beam.token_ids for beam in state.beams] == [(1, 1), (1, 2), (3, 0)]


def test_a_hypothesis_that_ended_keeps_no_beam_and_the_search_stops_when_none_can_improve() -> None:
    options = BeamOptions(width=2, max_tokens=9, end_token_ids=frozenset({0}))
    state, _ = advance_beams(BeamSearch(), offers({0: 0.6, 1: 0.3, 2: 0.1}), options)
    assert [beam.token_ids for beam in state.beams] == [(1,), (2,)]
    assert [hypothesis.beam.token_ids for hypothesis in state.finished] == [(0,)]
    state, parents = advance_beams(state, offers({0: 0.9, 3: 0.01}, {3: 0.01}), options)
    assert state.done
    assert (state.beams, parents) == ((), ())
    assert [hypothesis.beam.token_ids for hypothesis in best_beams(state, 2)] == [(0,), (1, 0)]
    assert best_beams(state, 1)[0].score == pytest.approx(math.log(0.6))


def test_the_limit_ends_all_beams() -> None:
    options = BeamOptions(width=2, max_tokens=1, end_token_ids=frozenset({0}))
    state, _ = advance_beams(BeamSearch(), offers({0: 0.6, 1: 0.3, 2: 0.1}), options)
    assert state.done
    assert [(hypothesis.beam.token_ids, hypothesis.ended) for hypothesis in state.finished] == [
        ((0,), True),
        ((1,), False),
    ]


def test_impossible_tokens_are_no_candidates() -> None:
    options = BeamOptions(width=3, max_tokens=5)
    only = [[TokenLogprob(4, 0.0), TokenLogprob(5, -math.inf)]]
    state, parents = advance_beams(BeamSearch(), only, options)
    assert parents == (0,)
    assert state.beams[0].token_ids == (4,)


def test_a_search_without_any_candidate_is_over() -> None:
    state, _ = advance_beams(BeamSearch(), [[]], BeamOptions(width=2, max_tokens=5))
    assert state.done
    assert state.finished == ()


@given(data=st.data(), width=st.integers(1, 4), vocab=st.integers(2, 5), limit=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_beam_as_wide_as_the_tree_finds_the_best_sequences(
    data: st.DataObject, width: int, vocab: int, limit: int
) -> None:
    """Without end tokens and with a width that prunes nothing, beam search is exhaustive search."""
    width = vocab**limit
    options = BeamOptions(width=width, max_tokens=limit)
    seed = data.draw(st.integers(0, 10_000))

    def logprobs_after(token_ids: tuple[int, ...]) -> list[float]:
        generator = torch.Generator().manual_seed(
            seed + sum((t + 1) * 11**i for i, t in enumerate(token_ids))
        )
        return torch.log_softmax(torch.randn(vocab, generator=generator), 0).tolist()

    state = BeamSearch()
    while not state.done:
        offered = [
            [TokenLogprob(t, p) for t, p in enumerate(logprobs_after(beam.token_ids))] for beam in state.beams
        ]
        state, _ = advance_beams(state, offered, options)
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(limit):
        scores = {
            (*ids, token): total + value
            for ids, total in scores.items()
            for token, value in enumerate(logprobs_after(ids))
        }
    best = sorted(scores, key=lambda ids: -scores[ids])
    assert [hypothesis.beam.token_ids for hypothesis in best_beams(state, width)] == best
    assert [h.beam.cumulative_logprob for h in state.finished] == pytest.approx([scores[ids] for ids in best])
    assert [sum(h.beam.token_logprobs) for h in state.finished] == pytest.approx(
        [scores[ids] for ids in best]
    )
