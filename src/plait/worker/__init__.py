"""The real-machine drivers of the engine.

async_engine.py   a thread that runs the engine for asyncio callers: what the gateway serves from
llm.py            `LLM`: the same engine driven by a script
"""

from plait.worker.async_engine import AsyncEngine, EngineState, LoadProgress, ServedModel
from plait.worker.llm import LLM, CompletionOutput, Logprob, RequestOutput

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineState",
    "LoadProgress",
    "Logprob",
    "RequestOutput",
    "ServedModel",
]
