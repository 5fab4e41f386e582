import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import Equal, LengthMix, length_mix_named

COUNT = 100_000


@pytest.mark.parametrize(
    ("name", "prompt_mean", "output_mean"),
    [
        ("uniform", 272.0, 64.5),
        ("equal", 272.0, 64.0),
        ("sharegpt-like", 161.31, 337.99),
        ("alpaca-like", 19.31, 58.45),
    ],
)
def test_a_mix_has_the_means_of_its_source(name: str, prompt_mean: float, output_mean: float) -> None:
    prompts, outputs = length_mix_named(name).draw(COUNT, np.random.default_rng(1))
    assert prompts.mean() == pytest.approx(prompt_mean, rel=0.02)
    assert outputs.mean() == pytest.approx(output_mean, rel=0.02)


def test_the_uniform_mix_reaches_both_ends_of_its_ranges() -> None:
    prompts, outputs = length_mix_named("uniform").draw(COUNT, np.random.default_rng(2))
    assert (prompts.min(), prompts.max()) == (32, 512)
    assert (outputs.min(), outputs.max()) == (1, 128)


def test_the_long_tail_is_long() -> None:
    _, outputs = length_mix_named("long-tail").draw(COUNT, np.random.default_rng(3))
    assert np.median(outputs) == pytest.approx(32, rel=0.05)
    assert np.percentile(outputs, 99) > 10 * np.median(outputs)


def test_sharegpt_like_requests_pass_the_filter_of_the_data_set() -> None:
    prompts, outputs = length_mix_named("sharegpt-like").draw(COUNT, np.random.default_rng(4))
    assert min(prompts.min(), outputs.min()) >= 4
    assert prompts.max() <= 1024
    assert (prompts + outputs).max() <= 2048


@given(
    name=st.sampled_from(("equal", "lmsys-chat", "long-tail", "sharegpt-like", "uniform")),
    most_total_tokens=st.integers(336, 4096),
    seed=st.integers(0, 100),
)
def test_no_request_exceeds_the_models_context(name: str, most_total_tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, outputs = length_mix_named(name).draw(64, rng, most_total_tokens=most_total_tokens)
    assert (prompts + outputs).max() <= most_total_tokens
    assert min(prompts.min(), outputs.min()) >= 1


def test_a_mix_that_never_fits_is_refused() -> None:
    mix = LengthMix(prompt=Equal(100), output=Equal(10))
    with pytest.raises(BadSetup, match="at most 109 tokens are too rare"):
        mix.draw(1, np.random.default_rng(0), most_total_tokens=109)


def test_an_unknown_mix_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BadSetup, match=r"equal, lmsys-chat, long-tail, .*, sharegpt-like, uniform"):
        length_mix_named("azure")
