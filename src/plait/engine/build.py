"""Putting an engine together from a checkpoint folder and options."""

from collections.abc import Callable

import torch

from plait.engine.checkpoint import open_checkpoint
from plait.engine.decoder import Decoder
from plait.engine.engine import Engine
from plait.engine.kv_store import KvStore, kv_extent_bytes
from plait.engine.loader import load_weights
from plait.engine.options import DTYPES, EngineOptions, usable_cores
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadSetup
from plait.kvcache import KvBlockPool, PrefixNamespace
from plait.scheduling import Scheduler, policy_named
from plait.session import GenerationRequest
from plait.units import format_bytes


def load_engine(options: EngineOptions, *, on_progress: Callable[[int, int], None] | None = None) -> Engine:
    """Read a checkpoint, take the KV memory and return an engine that can serve.

    `on_progress` is told the bytes read and the bytes to read.

    Raises:
        BadSetup: checkpoint, tokenizer, memory and options do not fit together; nothing stays loaded.
    """
    torch.set_num_threads(options.threads or usable_cores())
    policy = policy_named(options.policy)
    checkpoint = open_checkpoint(options.folder)
    spec, dtype = checkpoint.spec, DTYPES[options.dtype]
    tokenizer = Tokenizer(
        options.folder, model_vocab_tokens=spec.vocab_tokens, chat_template=options.chat_template
    )
    blocks = range(len(spec.blocks))
    extent_bytes = kv_extent_bytes(spec, blocks, options.block_tokens, dtype)
    kv_blocks = options.kv_cache_bytes // extent_bytes
    if kv_blocks < 2:
        raise BadSetup(
            f"a KV cache of {format_bytes(options.kv_cache_bytes)} holds {kv_blocks} blocks of "
            f"{options.block_tokens} tokens ({format_bytes(extent_bytes)} each) and at least 2 are needed; "
            "raise --kv-cache-memory"
        )
    max_model_tokens = _max_model_tokens(options, spec.max_model_tokens, kv_blocks)
    weights = load_weights(
        checkpoint, blocks=None, dtype=dtype, device=options.device, on_progress=on_progress
    )
    decoder = Decoder(spec, weights, device=options.device, dtype=dtype)
    store = KvStore(spec, blocks, kv_blocks, options.block_tokens, dtype=dtype, device=options.device)
    host_kv_blocks = options.swap_bytes // extent_bytes
    host_store = None
    if host_kv_blocks:
        host_store = KvStore(spec, blocks, host_kv_blocks, options.block_tokens, dtype=dtype, device="cpu")
    scheduler = Scheduler(
        policy,
        KvBlockPool(kv_blocks, options.block_tokens),
        KvBlockPool(host_kv_blocks, options.block_tokens) if host_store is not None else None,
        options.limits,
    )

    def namespace_of(request: GenerationRequest, max_sequence_tokens: int) -> bytes:
        """What the content of a request's KV blocks depends on, besides its tokens."""
        rope = spec.rope_variant(max_sequence_tokens)
        model = f"{checkpoint.fingerprint} {rope}"
        return PrefixNamespace(model=model, kv_format=options.dtype, salt=request.cache_salt).root_key

    return Engine(
        decoder=decoder,
        store=store,
        host_store=host_store,
        scheduler=scheduler,
        tokenizer=tokenizer,
        eos_token_ids=frozenset(checkpoint.eos_token_ids),
        max_model_tokens=max_model_tokens,
        namespace_of=namespace_of,
        prefix_caching=options.prefix_caching,
        seed=options.seed,
    )


def _max_model_tokens(options: EngineOptions, model_tokens: int, kv_blocks: int) -> int:
    """The context to serve: what was asked for must fit; what was not is lowered to what the cache holds."""
    held_tokens = kv_blocks * options.block_tokens
    asked_tokens = options.max_model_tokens
    if asked_tokens is None:
        return min(model_tokens, held_tokens)
    if not 1 < asked_tokens <= model_tokens:
        raise BadSetup(
            f"--max-model-len {asked_tokens} must be between 2 and this model's own limit of {model_tokens} tokens"
        )
    if asked_tokens > held_tokens:
        raise BadSetup(
            f"--max-model-len {asked_tokens} needs more KV cache than there is: {kv_blocks} blocks hold "
            f"{held_tokens} tokens; raise --kv-cache-memory, or lower --max-model-len"
        )
    return asked_tokens
