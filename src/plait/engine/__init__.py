"""Tensors, tokens and text: from a checkpoint folder and requests to generated tokens.

hub.py             a model's name to a folder: shipped, local, cached or downloaded
checkpoint.py      what a folder holds, before any tensor is read
loader.py          the weights of a span of blocks; stored.py reads one tensor
packed.py          the same for the CPU kernels; packed_layout.py says what goes where, packed_cache.py keeps it on disk
decoder.py         one configurable forward pass; attention.py, moe.py, rotary.py are its parts
native.py          the same forward pass on the CPU kernels
kv_store.py        the memory of KV blocks; kernel_kv.py that of the kernels; kv_loans.py lends and borrows some of them
split_attention.py attention over blocks here and on other machines; partial.py merges the parts
tokenizer.py       text to tokens; chat_template.py, detokenizer.py
sampling.py        logits to tokens; beam.py, constraints.py
live.py            a request in the works: what a new token means for it
engine.py          the loop over all of these, one step at a time
span_engine.py     the same for a span of blocks that sessions cross
                   (span_session.py, span_sampling.py, span_inputs.py are its parts)
ranks.py           one rank of a model that is divided over several processes
build.py           an engine from options.py; wishes.py makes options of what a user would like
"""

from plait.engine.build import load_engine, load_span_engine
from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.constraints import Matcher
from plait.engine.decoder import SpanDecoder
from plait.engine.engine import Engine, EngineStatus
from plait.engine.hub import (
    PARTIAL_MARKER,
    BytesProgress,
    CachedModel,
    cached_models,
    download_model,
    find_in_cache,
    resolve_model,
    side_files,
)
from plait.engine.kv_loans import HolderShare, KvLoans, OutgoingBlock
from plait.engine.kv_store import KvExtents
from plait.engine.live import LiveRequest, check_prompt, new_sequence
from plait.engine.options import (
    EngineOptions,
    TensorParallel,
    available_memory_bytes,
    usable_cores,
)
from plait.engine.packed_cache import KeptWeights, folder_beside, kept_weights, user_cache_folder
from plait.engine.partial import Partial
from plait.engine.ranks import Rank, RankGroup, RankPlan, load_rank, vocabularies
from plait.engine.remote_kv import PartialAsk, PendingParts, RemoteKv
from plait.engine.sampling import SampledToken
from plait.engine.span_engine import SpanEngine, SpanLoad
from plait.engine.span_inputs import SpanInputs
from plait.engine.span_session import SpanOutput, SpanSession
from plait.engine.span_sizes import SpanSizes, computing_format, read_span_sizes
from plait.engine.step import SequenceChunk
from plait.engine.tokenizer import Tokenizer
from plait.engine.wishes import Wishes, decide_options

__all__ = [
    "PARTIAL_MARKER",
    "BytesProgress",
    "CachedModel",
    "Checkpoint",
    "Engine",
    "EngineOptions",
    "EngineStatus",
    "HolderShare",
    "KeptWeights",
    "KvExtents",
    "KvLoans",
    "LiveRequest",
    "Matcher",
    "OutgoingBlock",
    "Partial",
    "PartialAsk",
    "PendingParts",
    "Rank",
    "RankGroup",
    "RankPlan",
    "RemoteKv",
    "SampledToken",
    "SequenceChunk",
    "SpanDecoder",
    "SpanEngine",
    "SpanInputs",
    "SpanLoad",
    "SpanOutput",
    "SpanSession",
    "SpanSizes",
    "TensorParallel",
    "Tokenizer",
    "Wishes",
    "available_memory_bytes",
    "cached_models",
    "check_prompt",
    "computing_format",
    "decide_options",
    "download_model",
    "find_in_cache",
    "folder_beside",
    "kept_weights",
    "load_engine",
    "load_rank",
    "load_span_engine",
    "new_sequence",
    "open_checkpoint",
    "read_span_sizes",
    "resolve_model",
    "side_files",
    "usable_cores",
    "user_cache_folder",
    "vocabularies",
]
