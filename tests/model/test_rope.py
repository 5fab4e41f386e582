"""Inverse frequencies are those of transformers, for every scaling and both sides of every length limit."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from plait.model import frequency_class, inverse_frequencies, read_spec

YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.05 * i for i in range(64)],
    "long_factor": [1.5 + 0.9 * i for i in range(64)],
}
CASES = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn untruncated": {**YARN, "truncate": False},
    "yarn with mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn of no width": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "longrope": LONGROPE,
}


def config_of(case: str, theta: float, max_tokens: int = 131072) -> dict:
    rope = {"rope_type": case.split()[0], "rope_theta": theta, **CASES[case]}
    return dict(
        hidden_size=4096,
        num_attention_heads=32,
        num_hidden_layers=1,
        max_position_embeddings=max_tokens,
        rope_parameters=rope,
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("tokens", [100, 4096, 4097, 200000])
@pytest.mark.parametrize("case", list(CASES))
def test_inverse_frequencies_are_those_of_transformers(case, tokens, theta):
    settings = config_of(case, theta)
    rope = read_spec({"model_type": "llama", **settings}, "config").blocks[0].attention.rope
    config = AutoConfig.for_model("llama", **settings)
    if case == "default":
        theirs = 1.0 / (theta ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128))
        attention_factor = 1.0
    else:
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[case.split()[0]](config, "cpu", seq_len=tokens)
    ours = inverse_frequencies(rope, tokens)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6, atol=1e-7)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("case", ["dynamic", "longrope", "yarn"])
def test_a_length_and_its_class_have_the_same_frequencies(case):
    rope = read_spec({"model_type": "llama", **config_of(case, 1e4)}, "config").blocks[0].attention.rope
    for tokens in (1, 4096, 4097, 131072, 131073, 200000):
        same = inverse_frequencies(rope, frequency_class(rope, tokens))
        np.testing.assert_array_equal(same, inverse_frequencies(rope, tokens))


def test_requests_share_cached_keys_only_if_they_rotate_alike():
    def spec_of(case):
        return read_spec({"model_type": "llama", **config_of(case, 1e4, max_tokens=8192)}, "config")

    longrope, dynamic = spec_of("longrope"), spec_of("dynamic")
    assert (
        longrope.rope_variant(4096) == "" and longrope.rope_variant(4097) == longrope.rope_variant(8000) != ""
    )
    assert (
        dynamic.rope_variant(8192) == "" and len({dynamic.rope_variant(n) for n in (8192, 8193, 9000)}) == 3
    )
    assert {spec_of(case).rope_variant(10**6) for case in ("default", "linear", "llama3", "yarn")} == {""}


def test_scalings_that_extend_a_stated_length_extend_the_model():
    extended = {**config_of("yarn", 1e4, max_tokens=4096)}
    assert read_spec({"model_type": "llama", **extended}, "config").max_model_tokens == 40 * 4096
    dynamic = config_of("dynamic", 1e4, max_tokens=2048)
    assert read_spec({"model_type": "llama", **dynamic}, "config").max_model_tokens == 4 * 2048
    assert read_spec({"model_type": "llama", **config_of("llama3", 1e4)}, "config").max_model_tokens == 131072
