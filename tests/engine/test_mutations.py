"""Every field of a spec matters: change it, and the logits of some family change or its checkpoint no longer fits."""

import dataclasses
import math
import typing
from typing import Any

import pytest
import torch
import zoo
from zoo import Paged, chunk, difference, prompt

from plait.engine.decoder import Decoder
from plait.engine.loader import load_weights
from plait.errors import BadSetup
from plait.model import spec as spec_module

# Tolerance of the family tests: a mutation that stays below it would go unseen there.
TOLERANCE = 1e-4

NOT_MATHEMATICS = {("ModelSpec", "family"), ("ModelSpec", "max_model_tokens")}
SEEN_IN_BFLOAT16_ONLY = {("NormSpec", "casts_first")}

SPEC_CLASSES = [
    value
    for value in vars(spec_module).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type)
]


def is_mutable(owner: type, name: str) -> bool:
    """Whether a field has other values of its own; those that hold a spec are covered by that spec's fields."""
    hint = typing.get_type_hints(owner)[name]
    return not any(dataclasses.is_dataclass(option) for option in (hint, *typing.get_args(hint))) or (
        type(None) in typing.get_args(hint)
    )


FIELDS = [
    (owner.__name__, field.name)
    for owner in SPEC_CLASSES
    for field in dataclasses.fields(owner)
    if (owner.__name__, field.name) not in NOT_MATHEMATICS and is_mutable(owner, field.name)
]
# Long enough for every window and scaling; just longer than an original length; shorter.
LENGTHS = (150, 65, 40)


def mutations(owner: type, name: str, value: Any) -> list[Any]:
    """Values a field could wrongly have, given the right one."""
    hint = typing.get_type_hints(owner)[name]
    words = [word for option in (hint, *typing.get_args(hint)) for word in typing.get_args(option)]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [word for word in words if isinstance(word, str) and word != value]
    if value is None:
        return []
    optional = [None] if type(None) in typing.get_args(hint) else []
    if isinstance(value, int):
        return [*optional, value + 1]
    if isinstance(value, float):
        return [*optional, value * 1.5 + 0.05]
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return [tuple(entry * 1.5 for entry in value)]
    if isinstance(value, tuple):
        return [value[:-1]]
    return optional


def mutated(tree: Any, owner: str, name: str, position: int) -> Any:
    """The spec with every such field changed to its `position`-th mutation; the same object if there is none."""
    if isinstance(tree, tuple):
        children = tuple(mutated(child, owner, name, position) for child in tree)
        return children if any(a is not b for a, b in zip(children, tree, strict=True)) else tree
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return tree
    changes = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        changed = mutated(value, owner, name, position)
        if type(tree).__name__ == owner and field.name == name:
            candidates = mutations(type(tree), name, value)
            changed = candidates[position] if position < len(candidates) else changed
        if changed is not value:
            changes[field.name] = changed
    return dataclasses.replace(tree, **changes) if changes else tree


def logits_of(checkpoint, ids, dtype) -> torch.Tensor:
    weights = load_weights(checkpoint, None, dtype, "cpu")
    paged = Paged(Decoder(checkpoint.spec, weights, device="cpu", dtype=dtype), dtype=dtype)
    return paged.run(chunk(ids, 0, len(ids), paged.table(len(ids))))


@pytest.mark.parametrize(("owner", "name"), FIELDS)
def test_a_wrong_field_is_noticed_by_at_least_one_family(owner, name, tiny_checkpoints):
    noticed: dict[int, bool] = {}
    for length in LENGTHS:
        for variant in zoo.VARIANTS:
            tiny = tiny_checkpoints(variant)
            for position in range(8):
                wrong = mutated(tiny.checkpoint.spec, owner, name, position)
                if wrong is not tiny.checkpoint.spec and not noticed.get(position):
                    noticed[position] = is_noticed(
                        tiny, wrong, prompt(length), (owner, name) in SEEN_IN_BFLOAT16_ONLY
                    )
            if noticed and all(noticed.values()):
                return
    assert noticed, f"no family of the zoo sets {owner}.{name}"
    pytest.fail(
        f"{owner}.{name}: mutations {[p for p, seen in noticed.items() if not seen]} change no family's logits"
    )


def is_noticed(tiny, wrong, ids, in_bfloat16: bool) -> bool:
    """Whether the family tests would fail with the wrong spec."""
    checkpoint = dataclasses.replace(tiny.checkpoint, spec=wrong)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    right = logits_of(tiny.checkpoint, ids, dtype) if in_bfloat16 else tiny.reference_logits(ids)
    try:
        change = difference(logits_of(checkpoint, ids, dtype), right)
    except (BadSetup, KeyError, RuntimeError, ValueError, AssertionError):
        return True  # weights that do not fit, or shapes that do not
    return not math.isfinite(change) or change > (0 if in_bfloat16 else TOLERANCE)
