# pyright: standard
"""Parts of an attention, merged, are the attention: any cuts, any order, any tree."""

import numpy as np
import pytest
import torch

from plait.engine.partial import (
    Partial,
    attend_partly,
    finish_partial,
    merge_partials,
    partial_of_scores,
    sink_part,
)


def reference(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Softmax attention in float64: scores [cases, keys], values [cases, keys, dim]."""
    weights = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("ck,ckd->cd", weights, values.astype(np.float64))


def shards(scores: torch.Tensor, values: torch.Tensor, members: torch.Tensor, count: int) -> list[Partial]:
    """The part of each shard: of every case, the keys of which `members` [cases, keys] says that they are in it."""
    return [
        partial_of_scores(scores.masked_fill(members != shard, float("-inf")), values)
        for shard in range(count)
    ]


def as_tree(partials: list[Partial], rng: np.random.Generator) -> Partial:
    """Merge any two, or three, until one is left."""
    partials = list(partials)
    while len(partials) > 1:
        rng.shuffle(partials)  # pyright: ignore[reportArgumentType] -- a list of tuples is shuffled like any other
        some = int(rng.integers(2, 4))
        partials = [merge_partials(partials[:some]), *partials[some:]]
    return partials[0]


def test_a_hundred_thousand_cuts_merge_to_the_whole_within_a_millionth() -> None:
    """Scores up to 1e4 either way; shards of random keys, some of them empty; every case in one of 20 trees."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(20):
        cases, keys, count = 5000, int(rng.integers(1, 24)), int(rng.integers(1, 7))
        magnitude = np.array([1.0, 30.0, 1e3, 1e4], dtype=np.float32)[rng.integers(0, 4, (cases, 1))]
        scores = (rng.uniform(-1, 1, (cases, keys)) * magnitude).astype(np.float32)
        values = rng.uniform(-1, 1, (cases, keys, 3)).astype(np.float32)
        members = torch.from_numpy(rng.integers(0, count + 1, (cases, keys)) % count)
        parts = shards(torch.from_numpy(scores), torch.from_numpy(values), members, count)
        result = finish_partial(as_tree(parts, rng)).numpy()
        worst = max(worst, float(np.abs(result - reference(scores, values)).max()))
    assert worst <= 1e-6, worst


def test_bfloat16_values_cost_no_more_than_their_own_rounding() -> None:
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.uniform(-20, 20, (5000, 16)).astype(np.float32))
    exact = torch.from_numpy(rng.uniform(-1, 1, (5000, 16, 3)).astype(np.float32))
    members = torch.from_numpy(rng.integers(0, 3, (5000, 16)))
    parts = shards(scores, exact.bfloat16(), members, 3)
    result = finish_partial(merge_partials(parts)).numpy()
    # Values are rounded to 8 bits, and a mean of rounded values is off by no more than the worst of them.
    assert np.abs(result - reference(scores.numpy(), exact.numpy())).max() <= 2.0**-8


def test_what_is_empty_or_hidden_changes_nothing_and_makes_no_nan() -> None:
    scores = torch.tensor([[1e4, -1e4, 3.0]])
    values = torch.tensor([[[1.0], [2.0], [3.0]]])
    part = partial_of_scores(scores, values)
    hidden = partial_of_scores(torch.full((1, 2), float("-inf")), torch.full((1, 2, 1), 7.0))
    empty = partial_of_scores(torch.empty(1, 0), torch.empty(1, 0, 1))
    for nothing in (hidden, empty):
        assert (
            torch.isneginf(nothing.most).all() and (nothing.weight == 0).all() and (nothing.summed == 0).all()
        )
        for order in ([nothing, part], [part, nothing], [nothing, nothing, part]):
            merged = merge_partials(order)
            assert all(torch.equal(one, other) for one, other in zip(merged, part, strict=True))
        both = merge_partials([nothing, nothing])
        assert torch.isneginf(both.most).all() and (both.weight == 0).all()


@pytest.mark.parametrize("kv_heads", [8, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_heads_that_share_keys_are_torchs_attention(
    kv_heads: int, softcap: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    tokens, heads, dim, keys = 3, 8, 16, 40
    query = torch.randn(tokens, heads, dim, generator=generator, dtype=dtype)
    key = torch.randn(kv_heads, keys, dim, generator=generator, dtype=dtype)
    value = torch.randn(kv_heads, keys, dim, generator=generator, dtype=dtype)
    bias = torch.zeros(1, 1, tokens, keys, dtype=dtype)
    bias[..., 0, 35:] = bias[..., 1, 37:] = float("-inf")
    cuts = [slice(0, 7), slice(7, 7), slice(7, 33), slice(33, 40)]
    parts = [
        attend_partly(query, key[:, cut], value[:, cut], bias=bias[..., cut], scale=0.3, softcap=softcap)
        for cut in cuts
    ]
    repeated = heads // kv_heads
    scores = torch.einsum("thd,hkd->thk", query, key.repeat_interleave(repeated, 0)) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + bias[0, 0][:, None], dim=-1)
    expected = torch.einsum("thk,hkd->thd", weights, value.repeat_interleave(repeated, 0))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert (finish_partial(merge_partials(parts)) - expected).abs().max() <= tolerance


def test_latents_are_keys_and_values_of_one_shared_head() -> None:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, 4, 12, generator=generator)
    rows = torch.randn(1, 20, 12, generator=generator)
    whole = attend_partly(query, rows, rows[..., :8], bias=None, scale=0.2)
    parts = [
        attend_partly(query, rows[:, cut], rows[:, cut, :8], bias=None, scale=0.2)
        for cut in (slice(0, 5), slice(5, 20))
    ]
    assert whole.summed.shape == (2, 4, 8)
    assert (finish_partial(merge_partials(parts)) - finish_partial(whole)).abs().max() <= 1e-6


def test_a_sink_takes_weight_and_brings_nothing() -> None:
    scores = torch.tensor([[[1.0, 2.0]]])
    values = torch.tensor([[[[1.0], [3.0]]]])
    part = partial_of_scores(scores, values)
    result = finish_partial(merge_partials([part, sink_part(torch.tensor([2.5]), part)]))
    weights = torch.softmax(torch.tensor([1.0, 2.0, 2.5]), dim=0)
    assert result.item() == pytest.approx(float(weights[0] + 3 * weights[1]), abs=1e-6)
