# pyright: standard
"""Rotary positions: cosines and sines of one step, and their application.

Pairs are (j, j + rotary_dim / 2): the loader has reordered what was stored otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plait.model import RopeSpec, frequency_class, inverse_frequencies

# Dynamic scaling has one set of frequencies per maximum length; enough for those that run at the same time.
_MAX_CACHED_FREQUENCIES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Of every token in a step, [tokens, 1, rotary_dim]: cosines twice, and sines negated then plain."""

    cosines: Tensor
    sines: Tensor
    rotary_dim: int

    def apply(self, heads: Tensor) -> Tensor:
        """Rotate [tokens, heads, head_dim]; dimensions beyond rotary_dim stay."""
        dim = self.rotary_dim
        turned = heads[..., :dim] if dim < heads.shape[-1] else heads
        rotated = torch.roll(turned, dim // 2, -1).mul_(self.sines).addcmul_(turned, self.cosines)
        return rotated if dim == heads.shape[-1] else torch.cat((rotated, heads[..., dim:]), dim=-1)


class FrequencyTables:
    """Inverse frequencies on the device, computed once for each rope and length class."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[tuple[RopeSpec, int], Tensor] = {}

    def rotation(
        self,
        rope: RopeSpec,
        positions: Tensor,
        rope_tokens: Sequence[int],
        chunk_tokens: Sequence[int],
        dtype: torch.dtype,
    ) -> Rotation:
        """Rotation of a step's tokens: `rope_tokens` and the number of tokens of each chunk, in batch order."""
        classes = [frequency_class(rope, tokens) for tokens in rope_tokens]
        distinct = sorted(set(classes))
        if len(distinct) == 1:
            frequencies = self._table(rope, distinct[0])[None]
        else:
            tables = torch.stack([self._table(rope, one) for one in distinct])
            which = np.repeat([distinct.index(one) for one in classes], chunk_tokens)
            frequencies = tables.index_select(0, torch.from_numpy(which).to(self._device))
        # Float32 whatever the model's dtype: at position 100000 bfloat16 angles are off by hundreds of radians.
        angles = positions.to(frequencies.dtype)[:, None] * frequencies
        cosines, sines = angles.cos(), angles.sin()
        if rope.attention_factor != 1.0:
            cosines, sines = cosines * rope.attention_factor, sines * rope.attention_factor
        return Rotation(
            torch.cat((cosines, cosines), dim=-1).to(dtype)[:, None],
            torch.cat((-sines, sines), dim=-1).to(dtype)[:, None],
            rope.rotary_dim,
        )

    def _table(self, rope: RopeSpec, length_class: int) -> Tensor:
        key = (rope, length_class)
        if key not in self._tables:
            if len(self._tables) >= _MAX_CACHED_FREQUENCIES:
                self._tables.clear()
            self._tables[key] = torch.from_numpy(inverse_frequencies(rope, length_class)).to(self._device)
        return self._tables[key]
