"""Whatever a profile's file holds: an error of one sentence that names it, or costs that are numbers."""

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.costs import MAX_PROFILE_BYTES, StepWork, format_profile, parse_profile
from plait.errors import BadSetup, MissingCost
from plait.profiler import shipped_profile

GOOD = json.loads(format_profile(shipped_profile("tiny-zen4")))
GOOD["samples"] = GOOD["samples"][:4]

WORKS = (StepWork.of([(1, 100)] * 3 + [(20, 7)], sampled=4), StepWork.of([(1, 0)], sampled=1))
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, -1.5, 1e300, -1e300, 10**40, -(10**40), 2**63, 1e-320, "", "nan", [], {}]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
    st.text(max_size=8),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a tree."""
    found = [path] if path else []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found.extend(leaves(value, (*path, key)))
    return found


PATHS = leaves(GOOD)


def refused_or_usable(text: str | bytes) -> None:
    try:
        profile = parse_profile(text, where="fuzz.json")
    except BadSetup as error:
        assert "fuzz.json" in error.message
        assert "\n" not in error.message
        assert len(error.message) < 400
        return
    for blocks in (None, range(1), profile.blocks):
        for model in (profile.table_costs, profile.regression_costs):
            try:
                costs = model(blocks, **({"extrapolates": True} if model == profile.table_costs else {}))
                values = [
                    value
                    for work in WORKS
                    for value in (costs.step_s(work), costs.host_s(work), costs.energy_j(work))
                ]
            except MissingCost:
                continue
            assert all(math.isfinite(value) and value >= 0 for value in values)
            assert costs.kv_bytes_per_token >= 0


@given(st.sampled_from(PATHS), odd)
def test_a_profile_with_something_odd_in_it_is_refused_or_usable(path: tuple[Any, ...], value: Any) -> None:
    tree = copy.deepcopy(GOOD)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    refused_or_usable(json.dumps(tree))


@given(st.sampled_from(PATHS))
def test_a_profile_that_lacks_something_is_refused_or_usable(path: tuple[Any, ...]) -> None:
    tree = copy.deepcopy(GOOD)
    place = tree
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    refused_or_usable(json.dumps(tree))


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(0, 3))
def test_a_profile_that_was_cut_or_overwritten_is_refused_or_usable(noise: bytes, at: int, cut: int) -> None:
    text = json.dumps(GOOD).encode()
    at %= len(text)
    refused_or_usable(noise)
    refused_or_usable(text[:at])
    refused_or_usable(text[:at] + noise + text[at + cut * len(noise) :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no profile"),
        (b"\xff\xfe{}", "is no profile"),
        (b"[" * 100_000, "is no profile"),
        (b'{"more": ' + b"[" * 100_000, "is no profile"),
        (json.dumps(GOOD).replace('"per_step_s": ', '"per_step_s": NaN, "x": '), "is no profile"),
        (json.dumps(GOOD).replace('"per_step_s": ', '"per_step_s": 1e999, "x": '), "is no profile"),
        (b" " * (MAX_PROFILE_BYTES + 1), "larger than any profile"),
        (json.dumps({"format": "plait-profile", "version": 99}), "of version 99"),
        (json.dumps({"format": "a novel", "version": 2, "pages": 300}), "'a novel' of version 2"),
        (json.dumps({**GOOD, "regression": [1.0]}), "regression has 6 coefficients"),
        (
            json.dumps({**GOOD, "regression": [-1.0] * 6}),
            r"regression\.0 is -1\.0, which cannot have been measured",
        ),
        (json.dumps({**GOOD, "model": {**GOOD["model"], "end_block": 0}}), "blocks 0:0 of 6"),
        (json.dumps({**GOOD, "model": {**GOOD["model"], "model_blocks": 3}}), "blocks 0:6 of 3"),
        (json.dumps({**GOOD, "links": {"x": {"bandwidth_bytes_per_s": 0.0}}}), r"links\.x is no link"),
        (
            json.dumps({**GOOD, "links": {"x": {"bandwidth_bytes_per_s": 1.0, "loss_fraction": 1.5}}}),
            r"links\.x is no link",
        ),
        (json.dumps({**GOOD, "facts": {**GOOD["facts"], "weight_bytes": -1}}), r"facts\.weight_bytes is -1"),
        (
            json.dumps({**GOOD, "host": {"per_step_s": -0.1}}),
            r"host\.per_step_s is -0\.1",
        ),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(text: str | bytes, message: str) -> None:
    with pytest.raises(BadSetup, match=message) as refused:
        parse_profile(text, where="my.json")
    assert "my.json" in refused.value.message
