"""From the tree to the plain options of the packages, with nothing left to decide."""

from plait.engine import (
    BytesProgress,
    EngineOptions,
    choose_device,
    choose_dtype,
    choose_kv_cache_bytes,
    open_checkpoint,
    resolve_model,
)
from plait.gateway import GatewayOptions, hash_api_key
from plait.scheduling import StepLimits
from plait.settings import Settings


def engine_options(settings: Settings, *, on_download: BytesProgress | None = None) -> EngineOptions:
    """Find the model, look at the machine, and decide. This may download, which `on_download` follows.

    Raises:
        BadSetup: model, machine and settings do not fit together.
    """
    folder = resolve_model(settings.model.name, offline=settings.model.offline, on_progress=on_download)
    checkpoint = open_checkpoint(folder)
    device = choose_device(settings.engine.device)
    dtype = choose_dtype(settings.model.dtype, device=device, checkpoint_dtype=checkpoint.dtype)
    kvcache, scheduling = settings.kvcache, settings.scheduling
    kv_cache_bytes = kvcache.memory
    if kv_cache_bytes is None:
        kv_cache_bytes = choose_kv_cache_bytes(
            device=device,
            gpu_memory_fraction=kvcache.gpu_memory_fraction,
            weight_bytes=checkpoint.weight_bytes(dtype),
        )
    return EngineOptions(
        folder=folder,
        chat_template=str(settings.model.chat_template) if settings.model.chat_template else None,
        device=device,
        dtype=dtype,
        max_model_tokens=settings.model.max_tokens,
        kv_cache_bytes=kv_cache_bytes,
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


def gateway_options(settings: Settings, *, api_key_hashes: tuple[str, ...] = ()) -> GatewayOptions:
    """Options of the front door; `api_key_hashes` of stored keys join those of the keys in the settings."""
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
