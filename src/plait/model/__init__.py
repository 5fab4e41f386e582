"""A model's shape: what a checkpoint's config means, and which tensors it needs. No tensor code.

spec.py      what a decoder computes, as frozen data
config.py    reads config.json, in both dialects, into a spec (config_reader.py: its keys; config_rope.py: its ropes)
families.py  what distinguishes the supported families, as data
names.py     where each family keeps its tensors, as data
plan.py      which stored tensors a span of blocks needs, and where they go in memory
published.py shapes of published models by name
rope.py      inverse frequencies of rotary positions
tiny/        the embedded default model, a Hugging Face folder
"""

from plait.model.config import read_spec
from plait.model.families import FAMILIES, names_of
from plait.model.plan import (
    PlannedSlot,
    PlannedTensor,
    SlotKey,
    TensorPlan,
    head_prefix,
    name_prefix,
    plan_tensors,
)
from plait.model.published import PUBLISHED_SHAPES, published_spec
from plait.model.rope import frequency_class, inverse_frequencies
from plait.model.spec import (
    AlibiSpec,
    AttentionSpec,
    BlockSpec,
    DynamicScaling,
    LatentSpec,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    QkNormSpec,
    RopeSpec,
    RouterSpec,
    TemperatureSpec,
    YarnScaling,
)

__all__ = [
    "FAMILIES",
    "PUBLISHED_SHAPES",
    "AlibiSpec",
    "AttentionSpec",
    "BlockSpec",
    "DynamicScaling",
    "LatentSpec",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "LongropeScaling",
    "MlpSpec",
    "ModelSpec",
    "MoeSpec",
    "NormSpec",
    "PlannedSlot",
    "PlannedTensor",
    "QkNormSpec",
    "RopeSpec",
    "RouterSpec",
    "SlotKey",
    "TemperatureSpec",
    "TensorPlan",
    "YarnScaling",
    "frequency_class",
    "head_prefix",
    "inverse_frequencies",
    "name_prefix",
    "names_of",
    "plan_tensors",
    "published_spec",
    "read_spec",
]
