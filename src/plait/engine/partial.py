# pyright: standard
"""Attention over parts of a context, and the merge that makes the whole of them.

For a query q and the keys k and values v of one part, a holder computes

    most = max q.k        weight = sum exp(q.k - most)        summed = sum exp(q.k - most) v

and whoever has all parts merges: with M the greatest `most`, each part counts exp(most - M) times; the result is the
sum of `summed` over the sum of `weight`. That is softmax attention over all keys, rearranged: no approximation,
whatever the cuts. The merge is associative and commutative but for rounding, so parts are merged in a fixed order where
the last bit matters. An empty or hidden part has most = -inf and weight 0, and changes nothing. DistAttention of
Infinite-LLM (Lin et al. 2024); the recurrence is that of online softmax (Milakov and Gimelshein 2018).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """One part of an attention, in float32 (float64 if the inputs are): `most` and `weight` [tokens, heads],
    `summed` [tokens, heads, value_dim]. Parts of the CPU kernels are in float64, their weights relative to a power of
    two, 2^most: they are merged by the kernels only (csrc/attention.inl).
    """

    most: Tensor
    weight: Tensor
    summed: Tensor


def partial_of_scores(scores: Tensor, values: Tensor) -> Partial:
    """The part of keys with these scores [..., keys] and values [..., keys, value_dim] (or what broadcasts to it)."""
    if not scores.shape[-1]:
        shape = scores.shape[:-1]
        none = torch.full(shape, float("-inf"), dtype=scores.dtype, device=scores.device)
        empty = torch.zeros((*shape, values.shape[-1]), dtype=scores.dtype, device=scores.device)
        return Partial(none, torch.zeros_like(none), empty)
    most = scores.amax(dim=-1)
    shift = torch.where(torch.isinf(most), torch.zeros_like(most), most)
    weights = torch.exp(scores - shift[..., None])
    return Partial(
        most, weights.sum(-1), torch.matmul(weights[..., None, :], values.to(scores.dtype)).squeeze(-2)
    )


def attend_partly(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attend query [tokens, heads, head_dim] over keys [kv_heads, keys, head_dim] that are a part of its context.

    Heads share keys and values in groups (one key-value head: MQA; latents: MLA). `bias` [kv_heads or 1, heads per
    kv head or 1, tokens, keys] is added to the scores: minus infinity where a key is hidden.
    """
    tokens, heads, head_dim = query.shape
    kv_heads, count = keys.shape[:2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(wide).view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = torch.matmul(grouped.reshape(kv_heads, -1, head_dim), keys.to(wide).transpose(-1, -2)).mul_(
        scale
    )
    scores = scores.view(kv_heads, heads // kv_heads, tokens, count)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    if not count:
        return partial_of_scores(scores.permute(2, 0, 1, 3).reshape(tokens, heads, 0), values)
    most = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(torch.where(torch.isinf(most), torch.zeros_like(most), most)).exp_()
    weight = weights.sum(-1)
    summed = torch.matmul(weights.view(kv_heads, -1, count), values.to(wide)).view(*weight.shape, -1)
    return Partial(
        most.squeeze(-1).permute(2, 0, 1).reshape(tokens, heads),
        weight.permute(2, 0, 1).reshape(tokens, heads),
        summed.permute(2, 0, 1, 3).reshape(tokens, heads, -1),
    )


def sink_part(sinks: Tensor, like: Partial) -> Partial:
    """A learned score [heads] that takes weight and brings no value."""
    most = sinks.to(like.most.dtype).expand_as(like.most)
    return Partial(most, torch.ones_like(most), torch.zeros_like(like.summed))


def merge_partials(partials: Sequence[Partial]) -> Partial:
    """The part that all of these make together, summed in their order."""
    most = partials[0].most
    for each in partials[1:]:
        most = torch.maximum(most, each.most)
    shift = torch.where(torch.isinf(most), torch.zeros_like(most), most)
    factors = [torch.exp(each.most - shift) for each in partials]
    weight = factors[0] * partials[0].weight
    summed = factors[0][..., None] * partials[0].summed
    for factor, each in zip(factors[1:], partials[1:], strict=True):
        weight = weight + factor * each.weight
        summed = summed + factor[..., None] * each.summed
    return Partial(most, weight, summed)


def finish_partial(whole: Partial) -> Tensor:
    """The attention [tokens, heads, value_dim] that a part which is the whole stands for."""
    return whole.summed / whole.weight[..., None]
