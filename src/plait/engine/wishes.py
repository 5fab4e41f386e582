"""From what a user would like to what an engine is built from: the one place that decides what was left open."""

from dataclasses import dataclass, replace

from plait.engine import native
from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.options import (
    DTYPE_ALIASES,
    EngineOptions,
    choose_device,
    choose_dtype,
    choose_kv_cache_bytes,
)
from plait.engine.packed import packed_weight_bytes
from plait.errors import BadSetup

QUANTIZATIONS = ("none", "int8", "int4", "int4-g128")
KV_CACHE_DTYPES = ("auto", "bfloat16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a user may leave to us: `auto`, or None for as much KV cache as the machine has room for."""

    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int | None = None
    gpu_memory_fraction: float = 0.9


def decide_options(options: EngineOptions, wishes: Wishes) -> EngineOptions:
    """`options` with everything decided that the wishes are about, for this machine and the model of its folder.

    Raises:
        BadSetup: model, machine and wishes do not fit together.
    """
    _check_wishes(wishes)
    checkpoint = open_checkpoint(options.folder)
    device = choose_device(wishes.device)
    on_kernels = replace(
        options,
        device=device,
        dtype="bfloat16",
        quantization=wishes.quantization,
        kv_cache_dtype="bfloat16" if wishes.kv_cache_dtype == "auto" else wishes.kv_cache_dtype,
    )
    kernels = _asks_for_bfloat16(wishes) and native.uses_kernels(on_kernels, checkpoint.spec)
    decided = on_kernels if kernels else _on_torch(options, wishes, device, checkpoint)
    kv_cache_bytes = wishes.kv_cache_bytes
    if kv_cache_bytes is None:
        kv_cache_bytes = choose_kv_cache_bytes(
            device=device,
            gpu_memory_fraction=wishes.gpu_memory_fraction,
            weight_bytes=packed_weight_bytes(checkpoint, format=native.weight_format(decided))
            if kernels
            else checkpoint.weight_bytes(decided.dtype),
        )
    return replace(decided, kv_cache_bytes=kv_cache_bytes)


def _asks_for_bfloat16(wishes: Wishes) -> bool:
    return DTYPE_ALIASES.get(wishes.dtype, wishes.dtype) in ("auto", "bfloat16")


def _check_wishes(wishes: Wishes) -> None:
    for flag, asked, known in (
        ("--quantization", wishes.quantization, QUANTIZATIONS),
        ("--kv-cache-dtype", wishes.kv_cache_dtype, KV_CACHE_DTYPES),
    ):
        if asked not in known:
            raise BadSetup(f"{flag} {asked!r} is not known; choose {', '.join(known)}")
        if asked in ("int8", "int4", "int4-g128") and not _asks_for_bfloat16(wishes):
            raise BadSetup(
                f"{flag} {asked} is for plait's CPU kernels, which do not compute in {wishes.dtype}; "
                f"leave out --dtype or {flag}"
            )


def _on_torch(options: EngineOptions, wishes: Wishes, device: str, checkpoint: Checkpoint) -> EngineOptions:
    """Without the kernels: nothing is quantised, and the cache has the type of the arithmetic."""
    dtype = choose_dtype(wishes.dtype, device=device, checkpoint_dtype=checkpoint.dtype)
    if wishes.kv_cache_dtype not in ("auto", dtype):
        raise BadSetup(
            f"--kv-cache-dtype {wishes.kv_cache_dtype}: without plait's CPU kernels the cache has the type of the "
            f"arithmetic, which is {dtype} here; leave it out"
        )
    return replace(options, device=device, dtype=dtype, kv_cache_dtype=dtype)
