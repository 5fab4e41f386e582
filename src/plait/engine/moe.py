# pyright: standard
"""Mixtures of experts: routing in float32, then one pair of matrix products per visited expert."""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from plait.model import RouterSpec


def route(
    hidden: Tensor,
    router: RouterSpec,
    chosen: int,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights, both [tokens, chosen].

    Group-limited choice: DeepSeek-V2, section 2.2.2; with `correction` and ranking by the best two: DeepSeek-V3, 2.1.2.
    """
    logits = functional.linear(hidden.to(weight.dtype), weight, bias)  # [tokens, experts]
    scores = logits.sigmoid() if router.score == "sigmoid" else logits.softmax(dim=-1)
    ranked = scores if correction is None else scores + correction
    if router.groups > 1:
        grouped = ranked.view(ranked.shape[0], router.groups, -1)
        best = (
            grouped.topk(2, dim=-1).values.sum(dim=-1)
            if router.group_rank == "best_two"
            else grouped.amax(dim=-1)
        )
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
            1, best.topk(router.kept_groups, dim=-1).indices, True
        )
        ranked = grouped.masked_fill(~kept[:, :, None], float("-inf")).view_as(ranked)
    experts = ranked.topk(chosen, dim=-1).indices
    weights = scores.gather(1, experts)
    if router.renormalises:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * router.scale if router.scale != 1.0 else weights


def run_experts(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    expert_count: int,
    weighs_input: bool,
    run_expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Sum over each token's experts; `run_expert(e, rows)` is one expert on the rows that visit it.

    Visits are sorted by expert, so that each expert runs once; the sum over a token's experts has a fixed order.
    """
    tokens, chosen = experts.shape
    visits = experts.flatten()
    order = visits.argsort(stable=True)
    counts: list[int] = torch.bincount(visits, minlength=expert_count).tolist()
    visit_weights = weights.flatten().index_select(0, order).to(hidden.dtype)[:, None]
    rows = hidden.index_select(0, order // chosen)  # [visits, hidden]
    if weighs_input:
        rows = rows * visit_weights
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            outputs.append(run_expert(expert, rows[start : start + count]))
            start += count
    output = torch.cat(outputs)
    if not weighs_input:
        output = output * visit_weights
    unsorted = torch.empty_like(output).index_copy_(0, order, output)
    return unsorted.view(tokens, chosen, -1).sum(dim=1)
