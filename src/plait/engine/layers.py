# pyright: standard
"""The parts of a block, over flat batches: linear maps, norms, attention, latent attention, MLPs and mixtures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from plait.engine.attention import KeyGroup, Reach, attend, gather
from plait.engine.loader import Weights
from plait.engine.moe import route, run_experts
from plait.engine.split_attention import begin_split
from plait.engine.step import Step
from plait.model import AttentionSpec, MlpSpec, MoeSpec, NormSpec


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """`hidden @ weight.T + bias`, weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Normalises the last axis; `weight` is what multiplies (1 already added), and may have leading axes."""

    spec: NormSpec
    weight: Tensor | None
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        spec = self.spec
        if spec.kind == "layer":
            return functional.layer_norm(hidden, hidden.shape[-1:], self.weight, self.bias, spec.eps)
        wide = hidden if hidden.dtype in (torch.float32, torch.float64) else hidden.float()
        length = torch.linalg.vector_norm(
            wide, dim=-1, keepdim=True
        )  # one pass, where square and mean take two
        normed = wide * torch.rsqrt(length.square_().div_(wide.shape[-1]).add_(spec.eps))
        if self.weight is None:
            return normed.to(hidden.dtype)
        if spec.casts_first:
            return normed.to(hidden.dtype).mul_(self.weight)
        return normed.mul_(self.weight).to(hidden.dtype)


# Small float32 matrices are kept [in, out] on a CPU: torch's product with one row is then 2.8 times as fast (MKL, 5 M
# parameters in cache). Large ones read memory either way.
_MAX_TURNED_ELEMENTS = 2**22


def linear_of(weights: Weights, block: int | None, slot: str) -> Linear | None:
    """The linear map of a slot, or None where the model has none."""
    weight = weights.get(block, slot)
    if weight is None:
        return None
    small = weight.dim() == 2 and weight.numel() <= _MAX_TURNED_ELEMENTS
    if small and weight.dtype == torch.float32 and weight.device.type == "cpu":
        weight = weight.t().contiguous().t()
    return Linear(weight, weights.get(block, slot, "bias"))


def _required(weights: Weights, block: int | None, slot: str) -> Linear:
    found = linear_of(weights, block, slot)
    assert found is not None, f"block {block} has no {slot}"
    return found


def norm_of(
    weights: Weights, block: int | None, slot: str, spec: NormSpec | None, dtype: torch.dtype
) -> Norm | None:
    """The norm of a slot, or None where the spec or the span has none."""
    weight = weights.get(block, slot)
    if spec is None or (spec.weighted and weight is None):
        return None
    return Norm(spec, _norm_weight(weight, spec, dtype), weights.get(block, slot, "bias"))


def _norm_weight(weight: Tensor | None, spec: NormSpec, dtype: torch.dtype) -> Tensor | None:
    """What multiplies: in float32 unless the norm casts first or is a layer norm."""
    if weight is None or spec.kind == "layer" or (spec.casts_first and spec.kind == "rms"):
        return weight
    wide = weight if dtype == torch.float64 else weight.float()
    wide = wide + 1.0 if spec.kind == "rms1p" else wide
    return wide.to(dtype) if spec.casts_first else wide


class Attention:
    """Multi-head, grouped-query or multi-query attention over paged keys and values."""

    def __init__(
        self, spec: AttentionSpec, weights: Weights, block: int, layer: int, dtype: torch.dtype
    ) -> None:
        self._spec, self._layer = spec, layer
        self._reach = Reach.of(spec)
        self._qkv = _required(weights, block, "qkv")
        self._out = _required(weights, block, "attention_out")
        self._sinks = weights.get(block, "sinks")
        self._query_norm = self._key_norm = self._head_norm = None
        if spec.qk_norm is None:
            return
        if spec.qk_norm.over == "whole":
            self._query_norm = norm_of(weights, block, "query_norm", spec.qk_norm.norm, dtype)
            self._key_norm = norm_of(weights, block, "key_norm", spec.qk_norm.norm, dtype)
        else:
            query, key = weights.get(block, "query_norm"), weights.get(block, "key_norm")
            both = None
            if query is not None and key is not None:
                both = torch.cat((query.expand(spec.heads, -1), key.expand(spec.kv_heads, -1)))
            self._head_norm = Norm(spec.qk_norm.norm, _norm_weight(both, spec.qk_norm.norm, dtype), None)

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        """Attention of every token over its own sequence, projected back to [tokens, hidden]."""
        spec, tokens = self._spec, hidden.shape[0]
        heads, rotated_heads = spec.heads, spec.heads + spec.kv_heads
        fused = self._qkv(hidden).view(tokens, rotated_heads + spec.kv_heads, spec.head_dim)
        query_key, value = fused[:, :rotated_heads], fused[:, rotated_heads:]
        query_key = self._rotated(query_key, step)
        query, key = query_key[:, :heads], query_key[:, heads:]
        if spec.temperature is not None:
            query = query * step.temperature(spec.temperature)
        step.write(self._layer, 0, key)
        step.write(self._layer, 1, value)
        begun = [
            begin_split(step.store, group, self._layer, query[group.rows])
            for group in step.split_groups(self._reach, spec.kv_heads)
        ]
        attended = [
            self._attend(group, query, key, value, step) for group in step.groups(self._reach, spec.kv_heads)
        ]
        attended += [each.finish(spec, self._sinks) for each in begun]
        flat = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self._out(flat.reshape(tokens, -1))

    def _rotated(self, query_key: Tensor, step: Step) -> Tensor:
        """Queries and keys [tokens, heads + kv_heads, head_dim] with their norms and rotation."""
        spec = self._spec
        normed_first = spec.qk_norm is not None and not spec.qk_norm.after_rope
        if self._query_norm is not None and self._key_norm is not None:
            query, key = query_key[:, : spec.heads].flatten(1), query_key[:, spec.heads :].flatten(1)
            query_key = torch.cat((self._query_norm(query), self._key_norm(key)), dim=1).view(query_key.shape)
        elif self._head_norm is not None and normed_first:
            query_key = self._head_norm(query_key)
        if spec.rope is not None:
            query_key = step.rotation(spec.rope).apply(query_key)
        if self._head_norm is not None and not normed_first:
            query_key = self._head_norm(query_key)
        return query_key

    def _attend(self, group: KeyGroup, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        spec, rows = self._spec, group.rows
        if group.pages is None:
            keys, values = key[rows].transpose(0, 1)[None], value[rows].transpose(0, 1)[None]
        else:
            keys, values = gather(step.store, group, self._layer, step.scratch).split(spec.kv_heads, dim=1)
        mine = query[rows].unflatten(0, (group.sequences, -1))
        return attend(mine, keys, values, group, spec.scale, spec.softcap, self._sinks)


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): the cache holds latents, not keys and values.

    A decoding token is attended in latent space, with the up-projections absorbed into its query and its result. A
    prefill chunk expands the latents that it sees into keys and values, which is cheaper when there are many queries.
    """

    def __init__(
        self, spec: AttentionSpec, weights: Weights, block: int, layer: int, dtype: torch.dtype
    ) -> None:
        assert spec.latent is not None
        self._spec, self._latent, self._layer = spec, spec.latent, layer
        self._reach = Reach.of(spec)
        self._in = _required(weights, block, "latent_in")
        self._query_norm = norm_of(weights, block, "query_latent_norm", spec.latent.norm, dtype)
        self._query_up = linear_of(weights, block, "query_up")
        self._norm = norm_of(weights, block, "latent_norm", spec.latent.norm, dtype)
        self._up = _required(weights, block, "latent_up")
        self._out = _required(weights, block, "attention_out")
        up = self._up.weight.view(spec.heads, spec.latent.nope_dim + spec.value_dim, spec.latent.kv_rank)
        self._key_up = up[:, : spec.latent.nope_dim]  # [heads, nope_dim, kv_rank]
        self._value_down = up[:, spec.latent.nope_dim :].transpose(1, 2)  # [heads, kv_rank, value_dim]

    def __call__(self, hidden: Tensor, step: Step) -> Tensor:
        """Attention of every token over its own sequence, projected back to [tokens, hidden]."""
        spec, latent, tokens = self._spec, self._latent, hidden.shape[0]
        assert spec.rope is not None and self._norm is not None
        query, compressed, key_rope = self._in(hidden).split(
            [self._in.weight.shape[0] - latent.kv_rank - latent.rope_dim, latent.kv_rank, latent.rope_dim],
            dim=-1,
        )
        if self._query_up is not None and self._query_norm is not None:
            query = self._query_up(self._query_norm(query))
        query = query.unflatten(-1, (spec.heads, -1))  # [tokens, heads, nope_dim + rope_dim]
        rotated = step.rotation(spec.rope).apply(
            torch.cat((query[..., latent.nope_dim :], key_rope[:, None]), dim=1)
        )
        query_nope, query_rope = query[..., : latent.nope_dim], rotated[:, :-1]
        rows = torch.cat((self._norm(compressed), rotated[:, -1]), dim=-1)  # [tokens, kv_rank + rope_dim]
        step.write(self._layer, 0, rows)
        begun = [
            begin_split(
                step.store,
                group,
                self._layer,
                self._absorbed(query_nope[group.rows], query_rope[group.rows]),
            )
            for group in step.split_groups(self._reach, spec.heads)
        ]
        attended = [
            self._attend(group, query_nope, query_rope, rows, step)
            for group in step.groups(self._reach, spec.heads)
        ]
        attended += [self._expanded(each.finish(spec)) for each in begun]
        flat = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self._out(flat.reshape(tokens, -1))

    def _attend(
        self, group: KeyGroup, query_nope: Tensor, query_rope: Tensor, rows: Tensor, step: Step
    ) -> Tensor:
        nope, rope = query_nope[group.rows], query_rope[group.rows]
        if group.pages is None:
            seen = rows[group.rows][None]
        else:
            seen = gather(step.store, group, self._layer, step.scratch)[
                :, 0
            ]  # [sequences, keys, kv_rank + rope_dim]
        if group.sequences == nope.shape[0]:
            return self._attend_absorbed(nope, rope, seen, group)
        return self._attend_expanded(nope, rope, seen[0], group)

    def _attend_absorbed(self, nope: Tensor, rope: Tensor, seen: Tensor, group: KeyGroup) -> Tensor:
        query = self._absorbed(nope, rope)[:, None]
        # Values are the latents; attending over whole rows keeps keys and values equally wide, as fused kernels ask.
        rows = seen[:, None]
        attended = attend(query, rows, rows, group, self._spec.scale)[..., : self._latent.kv_rank]
        return self._expanded(attended)

    def _absorbed(self, nope: Tensor, rope: Tensor) -> Tensor:
        """Queries in latent space, [tokens, heads, kv_rank + rope_dim]."""
        absorbed = torch.bmm(nope.transpose(0, 1), self._key_up).transpose(0, 1)  # [tokens, heads, kv_rank]
        return torch.cat((absorbed, rope), dim=-1)

    def _expanded(self, attended: Tensor) -> Tensor:
        """From attended latents [tokens, heads, kv_rank] to values, [tokens, heads, value_dim]."""
        return torch.bmm(attended.transpose(0, 1), self._value_down).transpose(0, 1)

    def _attend_expanded(self, nope: Tensor, rope: Tensor, seen: Tensor, group: KeyGroup) -> Tensor:
        spec, latent = self._spec, self._latent
        expanded = self._up(seen[:, : latent.kv_rank]).unflatten(-1, (spec.heads, -1))
        key_rope = seen[:, None, latent.kv_rank :].expand(-1, spec.heads, -1)
        keys = torch.cat((expanded[..., : latent.nope_dim], key_rope), dim=-1).transpose(0, 1)
        values = expanded[..., latent.nope_dim :].transpose(0, 1)
        return attend(torch.cat((nope, rope), dim=-1)[None], keys[None], values[None], group, spec.scale)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "relu": functional.relu,
}


def _activated(up: Tensor, spec: MlpSpec) -> Tensor:
    """From the fused projection [tokens, 2 * inner] (gate, then up; ungated [tokens, inner]) to [tokens, inner]."""
    if not spec.gated:
        return _ACTIVATIONS[spec.activation](up)
    gate, up = up.chunk(2, dim=-1)
    if spec.activation == "clamped_swiglu":
        gate = gate.clamp(max=spec.swiglu_limit)
        up = up.clamp(-spec.swiglu_limit, spec.swiglu_limit)
        return (up + 1) * (gate * torch.sigmoid(gate * spec.swiglu_alpha))
    return _ACTIVATIONS[spec.activation](gate).mul_(up)


class FeedForward:
    """A block's MLP, or its mixture of experts with the shared one."""

    def __init__(self, spec: MlpSpec | MoeSpec, weights: Weights, block: int) -> None:
        self._spec = spec
        if isinstance(spec, MlpSpec):
            self._up, self._down = _required(weights, block, "up"), _required(weights, block, "down")
            return
        self._router = _required(weights, block, "router")
        self._correction = weights.get(block, "router_correction")
        self._experts_up = _required(weights, block, "experts_up")
        self._experts_down = _required(weights, block, "experts_down")
        self._shared_up = linear_of(weights, block, "shared_up")
        self._shared_down = linear_of(weights, block, "shared_down")

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] to [tokens, hidden]."""
        spec = self._spec
        if isinstance(spec, MlpSpec):
            return self._down(_activated(self._up(hidden), spec))
        experts, weights = route(
            hidden,
            spec.router,
            spec.experts_per_token,
            self._router.weight,
            self._router.bias,
            self._correction,
        )
        mixed = run_experts(
            hidden, experts, weights, spec.experts, spec.router.weighs == "input", self._run_expert
        )
        if spec.shared is None or self._shared_up is None or self._shared_down is None:
            return mixed
        return mixed + self._shared_down(_activated(self._shared_up(hidden), spec.shared))

    def _run_expert(self, expert: int, rows: Tensor) -> Tensor:
        assert isinstance(self._spec, MoeSpec)
        up, down = self._experts_up, self._experts_down
        inner = functional.linear(rows, up.weight[expert], None if up.bias is None else up.bias[expert])
        inner = _activated(inner, self._spec.expert)
        return functional.linear(inner, down.weight[expert], None if down.bias is None else down.bias[expert])
