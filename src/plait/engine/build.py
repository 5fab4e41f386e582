"""Putting an engine together from a checkpoint folder and options."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from plait.engine import kernel_kv, native
from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.decoder import Decoder, SpanDecoder
from plait.engine.engine import Engine
from plait.engine.kv_loans import KvLoans
from plait.engine.kv_store import KvExtents, KvStore, kv_extent_bytes
from plait.engine.loader import Progress, load_weights
from plait.engine.options import DTYPES, EngineOptions, usable_cores
from plait.engine.packed import load_packed, packed_cache_folder
from plait.engine.ranks import RankGroup, lead_ranks
from plait.engine.span_engine import SpanEngine
from plait.engine.span_inputs import INPUTS_PER_KV_TOKEN, SpanInputs
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadSetup
from plait.kvcache import KvBlockPool, LoanTerms, PrefixNamespace
from plait.scheduling import Scheduler, policy_named
from plait.session import GenerationRequest
from plait.units import format_bytes


def load_engine(
    options: EngineOptions,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    group: RankGroup | None = None,
) -> Engine:
    """Read a checkpoint, take the KV memory and return an engine that can serve.

    `on_progress` is told the bytes read and the bytes to read. The model is divided over the ranks of `group`, of which
    this process is the first.

    Raises:
        BadSetup: checkpoint, tokenizer, memory and options do not fit together; nothing stays loaded.
    """
    torch.set_num_threads(options.threads or usable_cores())
    policy = policy_named(options.policy)
    checkpoint = open_checkpoint(options.folder)
    spec = checkpoint.spec
    tokenizer = Tokenizer(
        options.folder, model_vocab_tokens=spec.vocab_tokens, chat_template=options.chat_template
    )
    build = _parts(options, checkpoint, spec.all_blocks, tokenizer.vocab_tokens)
    kv_blocks = _kv_blocks(options, build.extent_bytes)
    max_model_tokens = _max_model_tokens(options, spec.max_model_tokens, kv_blocks)
    host_kv_blocks = options.swap_bytes // build.extent_bytes
    if group is None:
        decoder = build.load_decoder(on_progress)
        store = build.make_store(kv_blocks, options.device)
        host_store = build.make_store(host_kv_blocks, "cpu") if host_kv_blocks else None
    else:
        rank = lead_ranks(
            group,
            options,
            checkpoint,
            kv_blocks=kv_blocks,
            host_kv_blocks=host_kv_blocks,
            token_limit=tokenizer.vocab_tokens,
            on_progress=on_progress,
        )
        decoder, store, host_store = rank.decoder, rank.store, rank.host_store
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
        return PrefixNamespace(model=model, kv_format=build.kv_format, salt=request.cache_salt).root_key

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


def load_span_engine(
    options: EngineOptions,
    blocks: range,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    loan_terms: LoanTerms | None = None,
) -> SpanEngine:
    """Read the tensors of a span of blocks, and no others, and return an engine for the sessions that cross it.

    `options.kv_cache_bytes` pays for the KV blocks and for the inputs that are kept beside them (`SpanInputs`), which
    on a CPU is the same memory; on a GPU the inputs are in the host's, and not counted. `on_progress` is told the bytes
    read and the bytes to read. With `loan_terms` it lends and borrows KV blocks (`SpanEngine.loans`).

    Raises:
        BadSetup: as for `load_engine`; the blocks are not the model's; the policy cannot take blocks back.
    """
    torch.set_num_threads(options.threads or usable_cores())
    policy = policy_named(options.policy)
    if policy.reserves:
        raise BadSetup(
            f"--policy {options.policy} keeps what it gave, and sessions over several machines then wait for "
            "each other; choose paged"
        )
    checkpoint = open_checkpoint(options.folder)
    spec = checkpoint.spec
    checkpoint.plan(blocks)  # refuses blocks that are not the model's
    tokenizer = None
    if blocks.stop == len(spec.blocks):
        tokenizer = Tokenizer(options.folder, model_vocab_tokens=spec.vocab_tokens)
    token_limit = tokenizer.vocab_tokens if tokenizer else spec.vocab_tokens
    build = _parts(options, checkpoint, blocks, token_limit, lends=loan_terms is not None)
    # A chain may also enter a span behind its first block: then what comes are hidden states.
    hidden = None if blocks == range(1) else spec.hidden
    on_cpu = torch.device(options.device).type == "cpu"
    input_bytes = SpanInputs.page_bytes(options.block_tokens, hidden) if on_cpu else 0
    kv_blocks = _kv_blocks(options, build.extent_bytes + math.ceil(INPUTS_PER_KV_TOKEN * input_bytes))
    host_kv_blocks = options.swap_bytes // build.extent_bytes
    host_store = build.make_store(host_kv_blocks, "cpu") if host_kv_blocks else None
    store = build.make_store(kv_blocks, options.device)
    pool = KvBlockPool(kv_blocks, options.block_tokens)
    scheduler = Scheduler(
        policy,
        pool,
        KvBlockPool(host_kv_blocks, options.block_tokens) if host_store is not None else None,
        options.limits,
    )
    loans = None
    if loan_terms is not None:
        assert isinstance(store, KvStore | kernel_kv.KernelKvStore)
        loans = KvLoans(spec, scheduler, pool, store, loan_terms)
    borrowable_blocks = options.limits.borrowable_blocks if loans is not None else 0
    held_blocks = kv_blocks + borrowable_blocks
    return SpanEngine(
        decoder=build.load_decoder(on_progress),
        store=store,
        host_store=host_store,
        scheduler=scheduler,
        inputs=SpanInputs(int(INPUTS_PER_KV_TOKEN * held_blocks), options.block_tokens, hidden),
        tokenizer=tokenizer,
        eos_token_ids=frozenset(checkpoint.eos_token_ids),
        max_model_tokens=_max_model_tokens(options, spec.max_model_tokens, held_blocks),
        loans=loans,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """How one way to compute gets its decoder and its KV memory; nothing large is taken before it is asked for."""

    extent_bytes: int
    kv_format: str
    load_decoder: Callable[[Progress | None], SpanDecoder]
    make_store: Callable[[int, str], KvExtents]


def _parts(
    options: EngineOptions, checkpoint: Checkpoint, blocks: range, token_limit: int, *, lends: bool = False
) -> _Parts:
    """`lends`: KV blocks will be lent and borrowed."""
    if native.uses_kernels(options, checkpoint.spec):
        return _kernel_parts(options, checkpoint, blocks, token_limit, lends)
    return _torch_parts(options, checkpoint, blocks, token_limit)


def _torch_parts(options: EngineOptions, checkpoint: Checkpoint, blocks: range, token_limit: int) -> _Parts:
    spec, dtype, block_tokens = checkpoint.spec, DTYPES[options.dtype], options.block_tokens

    def load_decoder(on_progress: Progress | None) -> Decoder:
        weights = load_weights(
            checkpoint, blocks=blocks, dtype=dtype, device=options.device, on_progress=on_progress
        )
        return Decoder(spec, weights, device=options.device, dtype=dtype)

    def make_store(kv_blocks: int, device: str) -> KvExtents:
        return KvStore(spec, blocks, kv_blocks, block_tokens, dtype=dtype, device=device)

    return _Parts(
        extent_bytes=kv_extent_bytes(spec, blocks, block_tokens, dtype),
        kv_format=options.dtype,
        load_decoder=load_decoder,
        make_store=make_store,
    )


def _kernel_parts(
    options: EngineOptions, checkpoint: Checkpoint, blocks: range, token_limit: int, lends: bool
) -> _Parts:
    spec, block_tokens = checkpoint.spec, options.block_tokens
    format, kv_format = native.weight_format(options), native.kernel_kv_format(options)
    threads = options.threads or usable_cores()

    def load_decoder(on_progress: Progress | None) -> SpanDecoder:
        weights = load_packed(
            checkpoint,
            blocks=blocks,
            format=format,
            threads=threads,
            cache=packed_cache_folder(checkpoint) if options.packed_cache else None,
            on_progress=on_progress,
        )
        return native.NativeDecoder(
            spec,
            weights,
            threads=threads,
            kv_format=kv_format,
            block_tokens=block_tokens,
            token_limit=token_limit,
            pool=kernel_kv.make_pool(threads),
            by_parts=lends,
        )

    def make_store(kv_blocks: int, device: str) -> KvExtents:
        return kernel_kv.KernelKvStore(spec, blocks, kv_blocks, block_tokens, kv_format)

    return _Parts(
        extent_bytes=kernel_kv.kv_extent_bytes(spec, blocks, block_tokens, kv_format),
        kv_format=f"{format} {kv_format}",
        load_decoder=load_decoder,
        make_store=make_store,
    )


def _kv_blocks(options: EngineOptions, bytes_each: int) -> int:
    """KV blocks that the memory set aside for them holds, with what belongs to each."""
    kv_blocks = options.kv_cache_bytes // bytes_each
    if kv_blocks < 2:
        raise BadSetup(
            f"a KV cache of {format_bytes(options.kv_cache_bytes)} holds {kv_blocks} blocks of "
            f"{options.block_tokens} tokens ({format_bytes(bytes_each)} each) and at least 2 are needed; "
            "raise --kv-cache-memory"
        )
    return kv_blocks


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
