"""Tokens are drawn from the stated distribution, and depend on their own row alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from plait import SamplingParams
from plait.engine import sampling
from plait.engine.sampling import (
    SamplingRow,
    position_logprobs,
    reference_distribution,
    sample_rows,
    top_candidates,
    uniform_bits,
)
from plait.errors import BadRequest, EngineFailure

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": None, **values})


def row(position: int = 0, seed: int = 1, sample_index: int = 0, **values: Any) -> SamplingRow:
    state = {
        name: values.pop(name)
        for name in ("prompt_token_ids", "output_token_ids", "stop_token_ids", "allowed")
        if name in values
    }
    return SamplingRow(params(**values), seed, position, sample_index, **state)


def tokens(logits: torch.Tensor, rows: Sequence[SamplingRow], vocab_limit: int | None = None) -> list[int]:
    sampled = sample_rows(logits, rows, logits.shape[1] if vocab_limit is None else vocab_limit)
    return [token.token_id for token in sampled]


def draws(logits: torch.Tensor, count: int, **values: Any) -> np.ndarray:
    """How often each token came out of `count` draws at different positions. `logits`: [vocab]."""
    ids = tokens(logits.repeat(count, 1), [row(position, **values) for position in range(count)])
    return np.bincount(ids, minlength=len(logits))


def chi_square_excess(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How unlikely a chi-square statistic is, as a normal deviate (Wilson and Hilferty 1931).

    Cells that expect fewer than 5 are pooled.
    """
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    if not freedom:
        return 0.0
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def bitmask(allowed: Sequence[int], vocab: int) -> np.ndarray:
    bits = np.zeros(-(-vocab // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


# -- random numbers ------------------------------------------------------------------------------------


def test_random_bits_are_the_same_for_ever() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 10**6, 127), (-1, 10**6, 127)]
    bits = uniform_bits(*zip(*keys, strict=True))
    assert [hex(value) for value in bits] == GOLDEN


GOLDEN = [
    "0x238275bc38fcbe91",
    "0xb18a02f46d8d86c3",
    "0x44e5b98100c67fb0",
    "0x2f32a78496c67c60",
    "0x7f416d4df22bf1b2",
    "0x7f416d4df22bf1b2",
]


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_random_bits_are_uniform_and_uncorrelated_along_each_part_of_the_key(varied: int) -> None:
    count = 1 << 16
    key: list[list[int]] = [[7] * count, [11] * count, [0] * count]
    key[varied] = list(range(count))
    bits = uniform_bits(*key)
    assert len(np.unique(bits)) == count
    for shift in range(0, 64, 8):
        counts = np.bincount((bits >> np.uint64(shift)).astype(np.int64) & 255, minlength=256)
        assert abs(chi_square_excess(counts, np.full(256, 1 / 256))) < 4
    uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    for lag in (1, 2, 16):
        correlation = np.corrcoef(uniform[:-lag], uniform[lag:])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(count)


def test_every_bit_of_the_key_flips_half_of_the_random_bits() -> None:
    for part in range(3):
        for bit in range(0, 64, 3):
            keys = [
                [value + (1 << bit) * flipped for flipped in (0, 1) for _ in range(64)]
                if index == part
                else list(range(64)) * 2
                for index, value in enumerate((5, 0, 0))
            ]
            bits = uniform_bits(*keys)
            flips = np.bitwise_count(bits[:64] ^ bits[64:])
            assert 28 < flips.mean() < 36


# -- distributions -------------------------------------------------------------------------------------


def random_logits(vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


MIXES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 3, "top_p": 0.6},
    {"top_k": 10_000, "top_p": 0.9},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_draws_follow_the_reference_distribution(mix: dict[str, Any], device: str) -> None:
    logits = random_logits(60)
    expected = reference_distribution(logits.numpy(), params(**mix))
    counts = draws(logits.to(device), 6000, **mix)
    assert counts[expected == 0].sum() == 0
    assert chi_square_excess(counts, expected) < 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mix", [{"top_p": 0.9}, {"top_p": 0.99, "top_k": 600}, {"top_p": 0.999}, {"top_p": 0.1}], ids=str
)
def test_a_cut_of_top_p_far_down_a_large_vocabulary_is_found(mix: dict[str, Any], device: str) -> None:
    logits = random_logits(5000)
    expected = reference_distribution(logits.numpy(), params(**mix))
    counts = draws(logits.to(device), 300, **mix)
    assert counts[expected == 0].sum() == 0
    in_groups = [group.sum() for group in np.array_split(counts[np.argsort(-expected)], 50)]
    of_groups = [group.sum() for group in np.array_split(np.sort(expected)[::-1], 50)]
    assert chi_square_excess(np.array(in_groups), np.array(of_groups)) < 4


@given(
    values=st.lists(
        st.sampled_from([-np.inf, -60.0, -2.0, -1.0, 0.0, 0.0, 1.0, 1.5, 3.0]), min_size=1, max_size=12
    ),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    temperature=st.sampled_from([0.2, 1.0, 5.0]),
)
@settings(max_examples=150, deadline=None)
def test_only_tokens_that_pass_all_filters_are_drawn_also_among_ties(
    values: list[float], top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    if not np.isfinite(values).any():
        values = [*values, 0.0]
    mix = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    expected = reference_distribution(np.array(values, dtype=np.float32), params(**mix))
    counts = draws(torch.tensor(values), 200, **mix)
    assert counts[expected == 0].sum() == 0
    assert counts[expected > 0.05].min() > 0


@pytest.mark.parametrize(
    ("mix", "warper"),
    [
        ({"top_k": 9}, TopKLogitsWarper(9)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.05}, TopPLogitsWarper(0.05)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
    ],
)
def test_each_filter_keeps_the_tokens_that_transformers_keeps(mix: dict[str, Any], warper: Any) -> None:
    for seed in range(20):
        logits = random_logits(200, seed)
        kept = reference_distribution(logits.numpy(), params(**mix)) > 0
        theirs = warper(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0]
        assert (kept == torch.isfinite(theirs).numpy()).all()


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((500,), -torch.inf)
    logits[[3, 499]] = torch.tensor([0.0, 1.0])
    assert set(np.flatnonzero(draws(logits, 500))) == {3, 499}
    assert set(np.flatnonzero(draws(torch.tensor([0.0, -1e4, -40.0]), 500))) == {0}


# -- greedy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_first_of_the_largest_logits(device: str) -> None:
    logits = torch.tensor(
        [[0.0, 2.0, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-5.0, -4.0, -9.0, -4.0]], device=device
    )
    assert tokens(logits, [row(temperature=0.0)] * 3) == [1, 0, 1]
    many = random_logits(5000).round().repeat(64, 1).to(device)
    assert tokens(many, [row(temperature=0.0)] * 64) == [int(many[0].argmax())] * 64


def test_ids_above_the_tokenizer_are_never_chosen() -> None:
    logits = torch.zeros(200, 40)
    logits[:, 30:] = 50.0
    assert tokens(logits[:1], [row(temperature=0.0)], vocab_limit=30) == [0]
    assert max(tokens(logits, [row(position) for position in range(200)], vocab_limit=30)) == 29


# -- a row depends on itself alone ---------------------------------------------------------------------


def mixed_rows(count: int, vocab: int, seed: int) -> list[SamplingRow]:
    rng = np.random.default_rng(seed)
    rows: list[SamplingRow] = []
    for index in range(count):
        mix: dict[str, Any] = dict(rng.choice(np.array([*MIXES, {"temperature": 0.0}], dtype=object)))
        if rng.random() < 0.3:
            mix |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.2}
        if rng.random() < 0.3:
            mix |= {"logit_bias": {int(rng.integers(vocab)): 3.0, vocab + 5: 1.0}}
        if rng.random() < 0.3:
            mix |= {"allowed": bitmask(rng.choice(vocab, vocab // 2, replace=False), vocab)}
        if rng.random() < 0.3:
            mix |= {"min_tokens": 50, "stop_token_ids": (1, 2)}
        if rng.random() < 0.3:
            mix |= {"logprobs": int(rng.integers(0, 4))}
        stop = mix.pop("stop_token_ids", ())
        prompt, output = rng.integers(0, vocab, 20).tolist(), rng.integers(0, vocab, 10).tolist()
        made = row(
            index, seed=int(rng.integers(2**63)), prompt_token_ids=prompt, output_token_ids=output, **mix
        )
        rows.append(SamplingRow(made.params, made.seed, index, index % 3, prompt, output, stop, made.allowed))
    return rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [50, 3000])
def test_a_row_gives_the_same_token_alone_as_in_any_batch(vocab: int, device: str) -> None:
    count = 48
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(count, vocab + 7, generator=generator) * 2).to(device)
    rows = mixed_rows(count, vocab, seed=vocab)
    together = sample_rows(logits, rows, vocab)
    alone = [sample_rows(logits[i : i + 1], rows[i : i + 1], vocab)[0] for i in range(count)]
    assert [token.token_id for token in alone] == [token.token_id for token in together]
    order = np.random.default_rng(1).permutation(count)
    shuffled = sample_rows(logits[torch.from_numpy(order).to(device)], [rows[i] for i in order], vocab)
    assert [token.token_id for token in shuffled] == [together[i].token_id for i in order]
    times = sampling.CHUNK_ELEMENTS // (vocab * count) + 2 if vocab > 1000 else 3
    chunked = sample_rows(logits.repeat(times, 1), rows * times, vocab)
    assert [token.token_id for token in chunked] == [token.token_id for token in together] * times


def test_logits_are_not_changed() -> None:
    logits = torch.randn(48, 57, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample_rows(logits, mixed_rows(48, 50, seed=3), 50)
    assert torch.equal(logits, before)


def test_seed_position_and_sample_index_each_change_the_draw() -> None:
    logits = torch.zeros(1, 100_000)
    base = tokens(logits, [row(3, seed=5, sample_index=1)])
    assert tokens(logits, [row(3, seed=5, sample_index=1)]) == base
    others = [row(4, seed=5, sample_index=1), row(3, seed=6, sample_index=1), row(3, seed=5, sample_index=2)]
    for other in others:
        assert tokens(logits, [other]) != base


# -- bias, penalties, masks ----------------------------------------------------------------------------


def greedy_of(logits: torch.Tensor, **values: Any) -> int:
    return tokens(logits[None], [row(temperature=0.0, **values)])[0]


def changed(logits: torch.Tensor, **values: Any) -> torch.Tensor:
    """The logits of one row after bias, penalties and masks."""
    return sampling._apply_bias_penalties_masks(logits[None], [row(**values)])[0]


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(40)
    prompt, output = [1, 5, 5, 7], [9, 1, 39]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits[None].clone())[0]
    ours = changed(logits, repetition_penalty=1.7, prompt_token_ids=prompt, output_token_ids=output)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(6)
    ours = changed(
        logits,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        prompt_token_ids=[0, 1],
        output_token_ids=np.array([2, 3, 3, 3]),
    )
    assert ours.tolist() == [0, 0, -0.75, -1.25, 0, 0]


def test_bias_comes_before_the_repetition_penalty_as_in_vllm() -> None:
    ours = changed(
        torch.tensor([-1.0, 0.0]), logit_bias={0: 3.0}, repetition_penalty=2.0, output_token_ids=[0]
    )
    assert ours.tolist() == [1.0, 0.0]


def test_ids_that_the_vocabulary_lacks_are_ignored_by_bias_and_penalties() -> None:
    logits = random_logits(10)
    odd = {"prompt_token_ids": [10, 99, -1], "output_token_ids": [50], "logit_bias": {10: 5.0, 99: 1.0}}
    ours = changed(logits, repetition_penalty=2.0, presence_penalty=1.0, **odd)
    assert torch.equal(ours, logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [31, 32, 33, 100])
def test_only_allowed_tokens_are_chosen(vocab: int, device: str) -> None:
    allowed = list(range(0, vocab, 3))
    logits = random_logits(vocab).to(device).repeat(100, 1)
    rows = [row(position, temperature=5.0, allowed=bitmask(allowed, vocab)) for position in range(100)]
    assert set(tokens(logits, rows)) <= set(allowed)


def test_a_mask_shorter_or_longer_than_the_vocabulary_allows_nothing_beyond() -> None:
    logits = torch.arange(100.0)
    assert greedy_of(logits, allowed=bitmask([5, 6], 32)) == 6
    assert greedy_of(logits[:20], allowed=bitmask([5, 60], 100)) == 5


def test_a_sequence_does_not_stop_before_min_tokens() -> None:
    logits = torch.tensor([5.0, 9.0, 1.0])
    stop = {"stop_token_ids": frozenset({1, 77}), "min_tokens": 2}
    assert greedy_of(logits, output_token_ids=[0], **stop) == 0
    assert greedy_of(logits, output_token_ids=[0, 0], **stop) == 1


def test_min_tokens_gives_way_where_a_constraint_allows_only_the_end() -> None:
    logits = torch.tensor([5.0, 9.0, 1.0])
    stop = {"stop_token_ids": (1,), "min_tokens": 2}
    assert greedy_of(logits, allowed=bitmask([1, 2], 3), **stop) == 2
    assert greedy_of(logits, allowed=bitmask([1], 3), **stop) == 1


# -- failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_without_usable_logits_is_named(poison: float, temperature: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1] = poison
    with pytest.raises(EngineFailure, match=r"row 1 of 3 .* position 8"):
        sample_rows(logits, [row(position, temperature=temperature) for position in (7, 8, 9)], 10)
    logits[1] = 0.0
    logits[1, 4] = poison
    if poison != -math.inf:
        with pytest.raises(EngineFailure, match="row 1 of 3"):
            sample_rows(logits, [row(temperature=temperature)] * 3, 10)


def test_a_constraint_that_allows_nothing_is_the_callers_fault() -> None:
    with pytest.raises(BadRequest, match=r"position 0 the constraint .* allows no token"):
        greedy_of(torch.zeros(10), allowed=bitmask([], 10))


# -- log-probabilities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_reported_logprobs_are_those_of_the_raw_logits(device: str) -> None:
    logits = torch.stack([random_logits(50, seed) for seed in range(4)]).to(device)
    rows = [
        row(temperature=0.5, top_k=1, logit_bias={3: 99.0}, logprobs=3),
        row(temperature=0.0),
        row(temperature=2.0, logprobs=0),
        row(logprobs=60),
    ]
    sampled = sample_rows(logits, rows, 40)
    expected = torch.log_softmax(logits[:, :40], dim=-1).cpu()
    assert sampled[1].logprobs is None
    for index, top in ((0, 3), (2, 0), (3, 40)):
        found = sampled[index].logprobs
        assert found is not None
        assert found.chosen.token_id == sampled[index].token_id
        assert found.chosen.logprob == pytest.approx(float(expected[index, found.chosen.token_id]))
        best = expected[index].argsort(descending=True)[:top].tolist()
        assert [token.token_id for token in found.top] == best
        assert [token.logprob for token in found.top] == pytest.approx(expected[index, best].tolist())
    assert sampled[0].token_id == 3


@pytest.mark.parametrize("device", DEVICES)
def test_equal_candidates_come_in_the_order_of_their_ids(device: str) -> None:
    logits = torch.tensor([[0.0, -0.0, 2.0, 0.0, 2.0, -1.0, -torch.inf]], device=device)
    assert [token.token_id for token in top_candidates(logits, 4)[0]] == [2, 4, 0, 1]
    assert [token.token_id for token in top_candidates(logits, 99)[0]] == [2, 4, 0, 1, 3, 5]


def test_prompt_logprobs_are_log_softmax_of_each_row() -> None:
    logits = torch.stack([random_logits(30, seed) for seed in range(3)])
    expected = torch.log_softmax(logits, dim=-1)
    found = position_logprobs(logits, [4, 5, 29], [2, 0, 1])
    assert [line.chosen.logprob for line in found] == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate((4, 5, 29))]
    )
    assert [len(line.top) for line in found] == [2, 0, 1]
    assert found[2].top[0].token_id == int(expected[2].argmax())
