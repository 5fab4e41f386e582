"""From the tree to the plain options of the packages, with nothing left to decide."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from plait.engine import BytesProgress, EngineOptions, TensorParallel, Wishes, decide_options, resolve_model
from plait.errors import BadSetup
from plait.scheduling import StepLimits
from plait.settings import Settings

if TYPE_CHECKING:
    from plait.gateway import GatewayOptions


def engine_options(settings: Settings, *, on_download: BytesProgress | None = None) -> EngineOptions:
    """Find the model, look at the machine, and decide. This may download, which `on_download` follows.

    Raises:
        BadSetup: model, machine and settings do not fit together.
    """
    folder = resolve_model(settings.model.name, offline=settings.model.offline, on_progress=on_download)
    options = replace(undecided_options(settings, folder), tensor_parallel=tensor_parallel_options(settings))
    return decide_options(options, wishes(settings))


def undecided_options(settings: Settings, folder: Path) -> EngineOptions:
    """What the settings say of an engine for the model in a folder, without what `wishes` leave open."""
    model, kvcache, scheduling = settings.model, settings.kvcache, settings.scheduling
    return EngineOptions(
        folder=folder,
        chat_template=str(model.chat_template) if model.chat_template else None,
        packed_cache=model.packed_cache,
        max_model_tokens=model.max_tokens,
        swap_bytes=kvcache.swap,
        block_tokens=kvcache.block_tokens,
        policy=scheduling.policy,
        limits=StepLimits(
            step_tokens=scheduling.step_tokens,
            max_running_sequences=scheduling.max_running_sequences,
            max_waiting=scheduling.max_waiting,
            long_prefill_tokens=scheduling.long_prefill_tokens,
            watermark_fraction=scheduling.watermark_fraction,
            preemption=scheduling.preemption,
        ),
        prefix_caching=kvcache.prefix_caching,
        seed=settings.engine.seed,
        threads=settings.engine.threads,
    )


def wishes(settings: Settings) -> Wishes:
    """What the settings leave to the machine and the model."""
    return Wishes(
        device=settings.engine.device,
        dtype=settings.model.dtype,
        quantization=settings.model.quantization,
        kv_cache_dtype=settings.kvcache.dtype,
        kv_cache_bytes=settings.kvcache.memory,
        gpu_memory_fraction=settings.kvcache.gpu_memory_fraction,
    )


def tensor_parallel_options(settings: Settings) -> TensorParallel:
    """Over how many processes the model is divided, and which this is.

    Raises:
        BadSetup: there is no such rank.
    """
    engine = settings.engine
    size, rank, address = (
        engine.tensor_parallel_size,
        engine.tensor_parallel_rank,
        engine.tensor_parallel_address,
    )
    if rank >= size:
        raise BadSetup(
            f"--tensor-parallel-rank {rank} is not one of the {size} of --tensor-parallel-size {size}"
        )
    if rank and address is None:
        raise BadSetup(
            "ranks on this machine are started by rank 0; one on another machine needs the --tensor-parallel-address "
            "at which rank 0 waits for it"
        )
    host, _, port = (address or "").rpartition(":")
    return TensorParallel(
        size=size,
        rank=rank,
        address=None if address is None else (host.strip("[]"), int(port)),
        timeout_s=engine.tensor_parallel_timeout_s,
    )


def gateway_options(settings: Settings, *, api_key_hashes: tuple[str, ...] = ()) -> "GatewayOptions":
    """Options of the front door; `api_key_hashes` of stored keys join those of the keys in the settings."""
    from plait.gateway import GatewayOptions, hash_api_key

    given = tuple(hash_api_key(key.get_secret_value()) for key in settings.server.api_keys)
    hashes = given + api_key_hashes
    return GatewayOptions(
        api_key_hashes=hashes,
        # A key keeps other sites' pages out, and who serves other machines without one wants any name to do.
        local_names_only=not hashes and not settings.server.insecure_no_auth,
        tool_format=settings.server.tool_format,
    )


def served_names(settings: Settings) -> tuple[str, ...]:
    """The names clients may use: those asked for, else the model's own."""
    return settings.model.served_names or (settings.model.name,)
