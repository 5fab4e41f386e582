"""The real-machine drivers of the engine.

async_engine.py   a thread that runs the engine for asyncio callers: what the gateway serves from
llm.py            `LLM`: the same engine driven by a script

A model divided over several processes (ranks), of which the first has the engine:

tensor_parallel.py   the engine's side: starts the others, runs every step on all of them
follower.py          the others' side; rank_process.py: as a process on this host
rank_links.py        how they reach each other on one host; gloo_link.py: on several
step_message.py      what the others are told of a step; rank_results.py: what comes of it
"""

from plait.worker.async_engine import AsyncEngine, EngineState, LoadProgress, ServedModel
from plait.worker.follower import follow_elsewhere
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
    "follow_elsewhere",
]
