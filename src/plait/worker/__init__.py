"""The real-machine drivers of the engine.

async_engine.py   a thread that runs the engine for asyncio callers: what the gateway serves from
llm.py            `LLM`: the same engine driven by a script

A model divided over several processes (ranks), of which the first has the engine:

tensor_parallel.py   the engine's side: starts the others, runs every step on all of them
follower.py          the others' side; rank_process.py: as a process on this host
rank_links.py        how they reach each other on one host; gloo_link.py: on several
step_message.py      what the others are told of a step; rank_results.py: what comes of it

One machine of a swarm:

swarm_node.py        its place there: membership.py: who else is; weight_exchange.py, weight_folder.py: weights
member.py            which blocks it serves, when it moves, how it leaves
span_source.py       the model on this machine: files, sizes, loaded engines; measure.py: how fast they are
lending.py           KV memory lent and borrowed; remote_blocks.py: queries to creditors; lent_attention.py: answers
span_worker.py       sessions over its blocks; engine_thread.py runs the steps, outbox.py sends what comes of them
swarm_engine.py      requests as sessions over the swarm, as `AsyncEngine` serves them; session_driver.py, lookout.py,
                     swarm_model.py are its parts
swarm_gateway.py     that, a member, and what the gateway's HTTP side asks
"""

from plait.worker.async_engine import AsyncEngine, EngineState, LoadProgress, ServedModel
from plait.worker.follower import follow_elsewhere
from plait.worker.lending import LendingLimits
from plait.worker.llm import LLM, CompletionOutput, Logprob, RequestOutput
from plait.worker.lookout import Lookout
from plait.worker.member import Member, MemberOptions
from plait.worker.membership import Membership, MembershipLimits
from plait.worker.span_source import SpanLimits, SpanSource, WeightSource, source_of_folder, source_of_swarm
from plait.worker.span_worker import SpanWorker, SpanWorkerOptions
from plait.worker.swarm_engine import SwarmEngine, SwarmOptions
from plait.worker.swarm_gateway import SwarmGateway
from plait.worker.swarm_model import SwarmModel
from plait.worker.swarm_node import SwarmNode

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineState",
    "LendingLimits",
    "LoadProgress",
    "Logprob",
    "Lookout",
    "Member",
    "MemberOptions",
    "Membership",
    "MembershipLimits",
    "RequestOutput",
    "ServedModel",
    "SpanLimits",
    "SpanSource",
    "SpanWorker",
    "SpanWorkerOptions",
    "SwarmEngine",
    "SwarmGateway",
    "SwarmModel",
    "SwarmNode",
    "SwarmOptions",
    "WeightSource",
    "follow_elsewhere",
    "source_of_folder",
    "source_of_swarm",
]
