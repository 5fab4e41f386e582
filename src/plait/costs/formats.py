"""In which formats numbers are kept and multiplied, and the bytes that each takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from plait.errors import BadSetup

WEIGHT_BYTES: Mapping[str, float] = MappingProxyType(
    {
        "fp32": 4.0,
        "bf16": 2.0,
        "fp8": 1.0,
        "int8": 1.0,  # a float32 scale for each output column is not counted
        "int4": 0.5 + 2 / 32,  # 16-bit scales of groups of 32
        "int4-g128": 0.5 + 2 / 128,
    }
)
KV_BYTES: Mapping[str, float] = MappingProxyType({"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0})
KV_SCALE_BYTES: Mapping[str, float] = MappingProxyType({"int8": 4.0})
"""For each token, head and plane: int8 keys and values have a float32 scale."""
ACTIVATION_BYTES: Mapping[str, float] = MappingProxyType({"fp32": 4.0, "bf16": 2.0, "int8": 1.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Formats of weights, of keys and values, of what flows between layers, and of the arithmetic.

    `compute` names the unit whose peak limits matrix products: int4 weights are multiplied as int8 by CPU kernels, and
    as bf16 where a GPU only stores them so.
    """

    weights: str = "bf16"
    kv: str = "bf16"
    activations: str = "bf16"
    compute: str = "bf16"

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("weight", self.weights, WEIGHT_BYTES),
            ("KV", self.kv, KV_BYTES),
            ("activation", self.activations, ACTIVATION_BYTES),
        ):
            if name not in known:
                raise BadSetup(f"no {kind} format is called {name!r}; known are {', '.join(known)}")


_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16", "float64": "fp32"}


def formats_of(weight_format: str, kv_format: str) -> Formats:
    """The formats of an engine, from its own names of them (`torch-float32`, `bf16`, `int4-g128`, ...).

    Raises:
        BadSetup: an unknown name.
    """
    weights = weight_format.removeprefix("torch-")
    weights = _NAMES.get(weights, weights)
    compute = {"int4": "int8", "int4-g128": "int8"}.get(weights, weights)
    return Formats(weights=weights, kv=_NAMES.get(kv_format, kv_format), activations="fp32", compute=compute)
