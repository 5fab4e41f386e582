"""What cannot be asked is refused with a sentence that names the field."""

from typing import Any

import numpy as np
import pytest

from plait.errors import BadRequest
from plait.session import Constraint, SamplingParams


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", "2"),
        ("n", 0),
        ("best_of", 1.5),
        ("max_tokens", "x"),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("min_tokens", None),
        ("top_k", 1.5),
        ("top_k", -2),
        ("seed", 2**64),
        ("seed", "lucky"),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("repetition_penalty", 0.0),
        ("stop", 5),
        ("stop", [5]),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {3: float("inf")}),
        ("logprobs", 1000),
        ("constraint", {"type": "regex"}),
    ],
)
def test_a_wrong_value_is_a_sentence_that_names_its_field(param: str, value: Any) -> None:
    with pytest.raises(BadRequest) as refusal:
        SamplingParams(**{param: value})
    assert refusal.value.param == param
    assert param in refusal.value.message


def test_what_can_be_asked_is_taken() -> None:
    params = SamplingParams(n=np.int64(2), top_k=-1, stop="end", stop_token_ids=[7], seed=-1)
    assert params.sequences == 2
    assert params.top_k == 0
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (7,)
    assert not params.greedy
    assert SamplingParams(temperature=0.0, constraint=Constraint(kind="regex", text="a+")).greedy


def test_beams_exclude_what_they_do_not_do() -> None:
    for more in ({"stop": "x"}, {"best_of": 4}, {"constraint": Constraint(kind="json_object")}, {"n": 5}):
        with pytest.raises(BadRequest, match="beam_width"):
            SamplingParams(beam_width=4, **more)
