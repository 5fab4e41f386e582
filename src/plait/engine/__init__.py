"""Tensors, tokens and text: from a checkpoint folder and requests to generated tokens.

hub.py             a model's name to a folder: shipped, local, cached or downloaded
checkpoint.py      what a folder holds, before any tensor is read
loader.py          the weights of a span of blocks
decoder.py         one configurable forward pass; attention.py, moe.py, rotary.py are its parts
kv_store.py        the memory of KV blocks
tokenizer.py       text to tokens; chat_template.py, detokenizer.py
sampling.py        logits to tokens; beam.py, constraints.py
live.py            a request in the works: what a new token means for it
engine.py          the loop over all of these, one step at a time
build.py           an engine from options.py
"""

from plait.engine.build import load_engine
from plait.engine.checkpoint import open_checkpoint
from plait.engine.constraints import Matcher
from plait.engine.engine import Engine, EngineStatus
from plait.engine.hub import BytesProgress, CachedModel, cached_models, download_model, resolve_model
from plait.engine.options import (
    EngineOptions,
    available_memory_bytes,
    choose_device,
    choose_dtype,
    choose_kv_cache_bytes,
    usable_cores,
)
from plait.engine.tokenizer import Tokenizer

__all__ = [
    "BytesProgress",
    "CachedModel",
    "Engine",
    "EngineOptions",
    "EngineStatus",
    "Matcher",
    "Tokenizer",
    "available_memory_bytes",
    "cached_models",
    "choose_device",
    "choose_dtype",
    "choose_kv_cache_bytes",
    "download_model",
    "load_engine",
    "open_checkpoint",
    "resolve_model",
    "usable_cores",
]
