"""What was left open is decided in one place, and what does not fit together is refused with the flag's name."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import plait.model
from plait.engine.checkpoint import open_checkpoint
from plait.engine.options import EngineOptions, available_memory_bytes
from plait.engine.packed import packed_weight_bytes
from plait.engine.wishes import QUANTIZATIONS, Wishes, decide_options
from plait.errors import BadSetup
from plait.kernels import native_available
from plait.settings import Settings, setting_facts

TINY = Path(plait.model.__file__).parent / "tiny"
OPTIONS = EngineOptions(folder=TINY, threads=3, seed=5)
needs_native = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")


def decided(options: EngineOptions = OPTIONS, **wishes: object) -> EngineOptions:
    return decide_options(options, Wishes(**{"device": "cpu", **wishes}))


@needs_native
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_kernels_take_bfloat16_and_every_format(quantization: str) -> None:
    options = decided(quantization=quantization)
    assert (options.device, options.dtype, options.quantization) == ("cpu", "bfloat16", quantization)
    assert options.kv_cache_dtype == "bfloat16"
    assert (options.threads, options.seed, options.folder) == (3, 5, TINY)
    assert decided(quantization=quantization, dtype="bf16", kv_cache_dtype="int8").kv_cache_dtype == "int8"


@pytest.mark.parametrize("dtype", ["float32", "float16", "fp32", "float64"])
def test_another_dtype_is_torchs(dtype: str) -> None:
    options = decided(dtype=dtype)
    assert options.dtype == {"fp32": "float32"}.get(dtype, dtype) == options.kv_cache_dtype
    assert options.quantization == "none"


def test_a_model_that_the_kernels_cannot_run_is_torchs(tiny_checkpoints) -> None:
    options = decided(replace(OPTIONS, folder=tiny_checkpoints("deepseek_v3").folder))
    assert (options.dtype, options.kv_cache_dtype) == ("float32", "float32")


def test_kv_blocks_that_the_kernels_cannot_cut_are_torchs() -> None:
    assert decided(replace(OPTIONS, block_tokens=8)).dtype == "float32"


@needs_native
@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"quantization": "awq"}, "--quantization 'awq' is not known; choose none, int8, int4, int4-g128"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype 'fp8' is not known; choose auto, bfloat16, int8"),
        ({"quantization": "int8", "dtype": "float32"}, "--quantization int8 .*do not compute in float32"),
        ({"kv_cache_dtype": "int8", "dtype": "fp32"}, "--kv-cache-dtype int8 .*do not compute in fp32"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "--kv-cache-dtype bfloat16: .*is float32 here"),
        ({"dtype": "float8"}, "--dtype 'float8' is not known"),
    ],
)
def test_wishes_that_exclude_each_other_are_refused(wishes: dict[str, str], said: str) -> None:
    with pytest.raises(BadSetup, match=said) as refusal:
        decided(**wishes)
    assert "\n" not in refusal.value.message


@needs_native
@pytest.mark.parametrize("flag", [{"quantization": "int4"}, {"kv_cache_dtype": "int8"}])
def test_what_needs_the_kernels_is_refused_where_they_cannot_run(
    flag: dict[str, str], tiny_checkpoints
) -> None:
    name, value = next(iter(flag.items()))
    option = f"--{name.replace('_', '-')} {value}"
    with pytest.raises(BadSetup, match=f"{option} needs plait's CPU kernels.*latent attention"):
        decided(replace(OPTIONS, folder=tiny_checkpoints("deepseek_v3").folder), **flag)
    with pytest.raises(BadSetup, match=f"{option} needs plait's CPU kernels.*multiple of 16 tokens"):
        decided(replace(OPTIONS, block_tokens=8), **flag)


@needs_native
def test_the_cache_takes_a_part_of_what_the_packed_weights_leave() -> None:
    """Nothing else of the machine may change in between, so only the order and a bound are certain."""
    assert decided(kv_cache_bytes=12345).kv_cache_bytes == 12345
    checkpoint = open_checkpoint(TINY)
    assert packed_weight_bytes(checkpoint, format="int8") < 0.6 * packed_weight_bytes(
        checkpoint, format="bf16"
    )
    assert 0 < decided(quantization="int8").kv_cache_bytes < available_memory_bytes()


@pytest.mark.slow
def test_without_the_kernels_torch_computes_in_float32_and_quantising_is_refused() -> None:
    code = f"""
from pathlib import Path
from plait.engine.options import EngineOptions
from plait.engine.wishes import Wishes, decide_options
from plait.errors import BadSetup
options = EngineOptions(folder=Path({str(TINY)!r}))
decided = decide_options(options, Wishes(device="cpu"))
print(decided.dtype, decided.kv_cache_dtype)
for wishes in (Wishes(device="cpu", quantization="int8"), Wishes(device="cpu", kv_cache_dtype="int8")):
    try:
        decide_options(options, wishes)
    except BadSetup as error:
        print(error.message)
"""
    environment = {**os.environ, "PLAIT_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    dtypes, weights, keys = done.stdout.splitlines()
    assert dtypes == "float32 float32"
    assert weights.startswith("--quantization int8 needs plait's CPU kernels, which cannot be used here: ")
    assert keys.startswith("--kv-cache-dtype int8 needs plait's CPU kernels, which cannot be used here: ")


def test_the_settings_offer_what_the_engine_knows() -> None:
    kinds = {facts.path: facts.kind.split("|") for facts in setting_facts()}
    assert kinds["model.quantization"] == list(QUANTIZATIONS)
    assert Settings().kvcache.dtype == Wishes().kv_cache_dtype
