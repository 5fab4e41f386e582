"""Inverse frequencies of rotary positions, with every published scaling.

`inv_j = theta^(-2j/d)`; the angle of pair j at position p is `p * inv_j`, in float32. All arithmetic that the
reference (`transformers.modeling_rope_utils`) does in float32 is done in float32 here, in the same order.
"""

import math
from typing import Any, assert_never

import numpy as np

from plait.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RopeSpec,
    YarnScaling,
)

Float32 = np.ndarray[Any, np.dtype[np.float32]]


def inverse_frequencies(rope: RopeSpec, max_tokens: int) -> Float32:
    """Frequencies [rotary_dim / 2] for a request that may become `max_tokens` long."""
    scaling = rope.scaling
    match scaling:
        case None:
            return _unscaled(rope.theta, rope.rotary_dim)
        case LinearScaling(factor=factor):
            return _unscaled(rope.theta, rope.rotary_dim) / np.float32(factor)
        case DynamicScaling():
            return _unscaled(
                _dynamic_theta(rope.theta, rope.rotary_dim, scaling, max_tokens), rope.rotary_dim
            )
        case Llama3Scaling():
            return _llama3(_unscaled(rope.theta, rope.rotary_dim), scaling)
        case YarnScaling():
            return _yarn(rope.theta, rope.rotary_dim, scaling)
        case LongropeScaling():
            factors = scaling.long_factors if max_tokens > scaling.original_tokens else scaling.short_factors
            powers = _powers(rope.theta, rope.rotary_dim)
            return np.float32(1.0) / (np.asarray(factors, dtype=np.float32) * powers)
        case _:
            assert_never(scaling)


def frequency_class(rope: RopeSpec, max_tokens: int) -> int:
    """A length that has the same frequencies as `max_tokens`: the same number for requests that rotate alike."""
    match rope.scaling:
        case LongropeScaling(original_tokens=original):
            return original + 1 if max_tokens > original else original
        case DynamicScaling(original_tokens=original):
            return max(max_tokens, original)
        case _:
            return 0


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention temperature `0.1 * weight * ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def longrope_magnitude(factor: float, original_tokens: int) -> float:
    """LongRoPE's attention temperature `sqrt(1 + ln(factor) / ln(original))`."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_tokens))


def _powers(theta: float, rotary_dim: int) -> Float32:
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.power(np.float32(theta), exponents, dtype=np.float32)


def _unscaled(theta: float, rotary_dim: int) -> Float32:
    return np.float32(1.0) / _powers(theta, rotary_dim)


def _dynamic_theta(theta: float, rotary_dim: int, scaling: DynamicScaling, max_tokens: int) -> float:
    tokens = max(max_tokens, scaling.original_tokens)
    growth = scaling.factor * tokens / scaling.original_tokens - (scaling.factor - 1)
    return theta * growth ** (rotary_dim / (rotary_dim - 2))


def _llama3(inverse: Float32, scaling: Llama3Scaling) -> Float32:
    wavelengths = np.float32(2 * math.pi) / inverse
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    longest, shortest = scaling.original_tokens / low, scaling.original_tokens / high
    smooth = (np.float32(scaling.original_tokens) / wavelengths - np.float32(low)) / np.float32(high - low)
    factor = np.float32(scaling.factor)
    blended = (np.float32(1.0) - smooth) * inverse / factor + smooth * inverse
    return np.where(
        wavelengths < shortest, inverse, np.where(wavelengths > longest, inverse / factor, blended)
    ).astype(np.float32)


def _yarn(theta: float, rotary_dim: int, scaling: YarnScaling) -> Float32:
    def dimension_of(rotations: float) -> float:
        return (
            rotary_dim * math.log(scaling.original_tokens / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as the reference: a ramp of no width would divide by zero
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1.0) - np.clip(ramp, 0, 1)
    powers = _powers(theta, rotary_dim)
    interpolated = np.float32(1.0) / (np.float32(scaling.factor) * powers)
    return (interpolated * (np.float32(1.0) - kept) + np.float32(1.0) / powers * kept).astype(np.float32)
