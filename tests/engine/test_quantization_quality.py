"""Quantised weights and an int8 KV cache cost the embedded model no more than they may, on text it never saw.

The bounds are far below what one wrong scale, column or tile would cost, so these tests also say that the kernels agree
with the packing and with each other.
"""

import functools
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import plait.model
from plait.engine import Engine, EngineOptions, load_engine
from plait.engine.tokenizer import Tokenizer
from plait.kernels import native_available

pytestmark = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")

TINY = Path(plait.model.__file__).parent / "tiny"
REPOSITORY = Path(__file__).parents[2]
END_OF_TEXT = 0
WINDOW_TOKENS = 1023  # the context is 1024 tokens, of which an engine keeps one for an answer


@dataclass(frozen=True)
class Case:
    """A way to hold the model, and the most that it may cost.

    `most_percent` is of the bits per byte; both are against bfloat16 weights in float32 arithmetic.
    """

    quantization: str
    kv_cache_dtype: str
    most_percent: float
    most_divergence_nats: float

    def __str__(self) -> str:
        return f"{self.quantization}-{self.kv_cache_dtype}"


CASES = (
    Case("none", "bfloat16", 0.05, 0.0001),
    Case("none", "int8", 0.1, 0.0003),
    Case("int8", "bfloat16", 0.3, 0.002),
    Case("int4", "bfloat16", 2.0, 0.03),
    Case("int4-g128", "bfloat16", 2.0, 0.03),
)


def engine(dtype: str, quantization: str = "none", kv_cache_dtype: str = "auto") -> Engine:
    return load_engine(
        EngineOptions(
            folder=TINY,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_bytes=16 * 2**20,
            packed_cache=False,
            prefix_caching=False,
            threads=1,
        )
    )


def windows_of(text: str, tokenizer: Tokenizer) -> list[torch.Tensor]:
    """Token ids of consecutive windows; each begins with the token before it, which is not predicted."""
    ids = torch.tensor([END_OF_TEXT, *tokenizer.encode(text)])
    return [ids[start : start + WINDOW_TOKENS + 1] for start in range(0, len(ids) - 1, WINDOW_TOKENS)]


def costs_over(windows: Sequence[torch.Tensor], exact: Engine) -> dict[Case, tuple[float, float]]:
    """For every case the change of the bits per byte in percent, and the mean KL divergence in nats."""
    engines = {case: engine("bfloat16", case.quantization, case.kv_cache_dtype) for case in CASES}
    nats = dict.fromkeys(CASES, 0.0)
    divergences = dict.fromkeys(CASES, 0.0)
    exact_nats = 0.0
    for ids in windows:
        prompt, targets = ids[:-1].tolist(), ids[1:, None]
        expected = exact.prompt_logits(prompt).log_softmax(-1)
        exact_nats -= expected.gather(1, targets).sum(dtype=torch.float64).item()
        for case, quantised in engines.items():
            logprobs = quantised.prompt_logits(prompt).log_softmax(-1)
            nats[case] -= logprobs.gather(1, targets).sum(dtype=torch.float64).item()
            divergences[case] += (expected.exp() * (expected - logprobs)).sum(dtype=torch.float64).item()
    tokens = sum(len(ids) - 1 for ids in windows)
    return {case: (100 * (nats[case] / exact_nats - 1), divergences[case] / tokens) for case in CASES}


@pytest.fixture(scope="module")
def exact() -> Engine:
    return engine("float32")


@pytest.fixture(scope="module")
def short_text_costs(exact: Engine) -> dict[Case, tuple[float, float]]:
    """Of the beginning of functools, a file that tools/train_tiny.py holds out."""
    text = Path(functools.__file__).read_text(encoding="utf-8")
    return costs_over(windows_of(text, exact.tokenizer)[:3], exact)


@pytest.fixture(scope="module")
def long_text_costs(exact: Engine) -> dict[Case, tuple[float, float]]:
    """Of every fourth window of all files that tools/train_tiny.py holds out, some 50,000 tokens."""
    trained = runpy.run_path(str(REPOSITORY / "tools" / "train_tiny.py"), run_name="train_tiny")
    texts = [file.text for file in trained["read_library"]() if file.held_out]
    windows = [window for text in texts for window in windows_of(text, exact.tokenizer)]
    return costs_over(windows[::4], exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_short_text_costs_at_most_twice_what_is_allowed(case, short_text_costs):
    percent, divergence = short_text_costs[case]
    assert percent < 2 * case.most_percent
    assert divergence < 2 * case.most_divergence_nats


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_long_text_costs_at_most_what_is_allowed(case, long_text_costs):
    percent, divergence = long_text_costs[case]
    assert percent < case.most_percent
    assert divergence < case.most_divergence_nats
