"""Swarms in one process, for tests: workers of `tiny`, a gateway, and links in memory or over loopback."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import plait.model
from plait.cluster import PeerRates, PeerRecord
from plait.engine import EngineOptions, SpanEngine, load_engine, load_span_engine
from plait.ids import PeerId, RequestId
from plait.scheduling import StepLimits
from plait.session import GenerationRequest, RequestDelta, SamplingParams
from plait.transport import Carrier, Identity, MemoryNet, Network, SwarmSecret
from plait.wire import Message
from plait.worker.engine_thread import RunStep, run_inline
from plait.worker.lookout import Lookout
from plait.worker.span_worker import SpanWorker, SpanWorkerOptions
from plait.worker.swarm_engine import SwarmEngine, SwarmOptions
from plait.worker.swarm_model import SwarmModel, read_swarm_model

TINY = Path(plait.model.__file__).parent / "tiny"
BLOCKS = 6
SECRET = SwarmSecret(bytes(range(32)))
UNIX_NOW_S = 1.8e9


def tiny_options(dtype: str = "float32") -> EngineOptions:
    return EngineOptions(
        folder=TINY,
        dtype=dtype,
        kv_cache_bytes=8 * 2**20,
        limits=StepLimits(step_tokens=256, max_running_sequences=64),
        packed_cache=False,
        threads=1,
    )


@cache
def tiny_model() -> SwarmModel:
    return read_swarm_model(TINY)


def tiny_request(
    id: str, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = True, **sampling: Any
) -> GenerationRequest:
    return GenerationRequest(
        id=RequestId(id),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling),
    )


def some_prompt(tokens: int, seed: int = 0) -> tuple[int, ...]:
    rng = np.random.default_rng(seed)
    return tuple(int(token_id) for token_id in rng.integers(5, tiny_model().vocab_tokens, tokens))


def on_one_machine(requests: Sequence[GenerationRequest], dtype: str = "float32") -> dict[str, "Answer"]:
    """What one engine answers to all of them at once."""
    engine = load_engine(tiny_options(dtype))
    answers = {str(request.id): Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            answers[str(delta.request_id)].take(delta)
    return answers


_idle_engines: dict[tuple[str, range], list[SpanEngine]] = {}


def take_engine(dtype: str, blocks: range) -> SpanEngine:
    """An engine without sessions: one that an earlier worker left, or a new one."""
    idle = _idle_engines.setdefault((dtype, blocks), [])
    return idle.pop() if idle else load_span_engine(tiny_options(dtype), blocks)


def give_back(dtype: str, engine: SpanEngine) -> None:
    engine.check()
    assert engine.load().sessions == 0
    _idle_engines[dtype, engine.blocks].append(engine)


@dataclass
class Answer:
    """All that came for one request, by sample."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    finish: dict[int, tuple[str | None, str | int | None]] = field(default_factory=dict)
    deltas: int = 0

    def take(self, delta: RequestDelta) -> None:
        self.deltas += 1
        for part in delta.sequences:
            self.token_ids.setdefault(part.index, []).extend(part.token_ids)
            self.text[part.index] = self.text.get(part.index, "") + part.text
            if part.logprobs is not None:
                values = self.logprobs.setdefault(part.index, [])
                values += [position.chosen.logprob for position in part.logprobs]
            if part.finish_reason is not None:
                self.finish[part.index] = part.finish_reason, part.stop_reason


@dataclass
class Host:
    """One worker's machine."""

    name: str
    network: Network
    worker: SpanWorker
    engine: SpanEngine
    record: PeerRecord
    stack: AsyncExitStack
    messages: dict[str, int] = field(default_factory=dict)

    @property
    def peer(self) -> PeerId:
        return self.network.peer

    def on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        kind = type(message).__name__
        self.messages[kind] = self.messages.get(kind, 0) + 1
        self.worker.on_message(peer, message, tensors)


class SwarmRig:
    """Hosts and a gateway whose records are written by hand; all hosts know all addresses."""

    def __init__(self, net: MemoryNet, *, run_step: RunStep = run_inline, dtype: str = "float32") -> None:
        self.net = net
        self.run_step = run_step
        self.dtype = dtype
        self.hosts: dict[str, Host] = {}
        self.gateway: SwarmEngine
        self.gateway_network: Network
        self._sequence = 0
        self._stack = AsyncExitStack()

    def carriers(self, name: str, identity: Identity) -> dict[str, Carrier]:
        return {"mem": self.net.carrier(name)}

    def address(self, name: str) -> str:
        return f"mem://{name}"

    async def add(
        self, name: str, blocks: range, *, network_class: type[Network] = Network, **options: Any
    ) -> Host:
        """Start a worker."""
        identity = identity_of(name)
        stack = AsyncExitStack()
        network = network_class(
            identity, secret=SECRET, carriers=self.carriers(name, identity), unix_now=lambda: UNIX_NOW_S
        )
        engine = take_engine(self.dtype, blocks)
        stack.callback(give_back, self.dtype, engine)
        worker = SpanWorker(
            network,
            engine,
            model=tiny_model().fingerprint,
            run_step=self.run_step,
            options=SpanWorkerOptions(**options),
        )
        self._sequence += 1
        await stack.enter_async_context(network)
        address = await network.listen(self.address(name))
        await stack.enter_async_context(worker)
        record = PeerRecord(
            peer=identity.peer,
            name=name,
            model=tiny_model().fingerprint,
            first_block=blocks.start,
            end_block=blocks.stop,
            addresses=(address,),
            rates=PeerRates(decode_tokens_per_s=1000, prefill_tokens_per_s=5000, network_tokens_per_s=1000),
            load=worker.load(),
            sequence=self._sequence,
            issued_unix_s=UNIX_NOW_S,
            expires_unix_s=UNIX_NOW_S + 1e6,
        )
        host = self.hosts[name] = Host(name, network, worker, engine, record, stack)
        network.on_message = host.on_message
        network.on_lost = worker.on_lost
        self._introduce()
        return host

    async def open_gateway(self, options: SwarmOptions) -> None:
        identity = identity_of("gateway")
        network = self.gateway_network = Network(
            identity, secret=SECRET, carriers=self.carriers("gateway", identity), unix_now=lambda: UNIX_NOW_S
        )

        def look(model: SwarmModel) -> Lookout:
            return Lookout(
                network,
                lambda: [host.record for host in self.hosts.values()],
                model=model.fingerprint,
                model_blocks=model.blocks,
                unix_now=lambda: UNIX_NOW_S,
            )

        gateway = self.gateway = SwarmEngine(
            network,
            names=("tiny",),
            load=lambda on_progress: tiny_model(),
            look=look,
            rng=np.random.default_rng(11),
            options=options,
            unix_now=lambda: UNIX_NOW_S,
            run_blocking=run_inline,
        )
        network.on_message = gateway.on_message
        network.on_lost = gateway.on_lost
        await self._stack.enter_async_context(network)
        await network.listen(self.address("gateway"))
        await self._stack.enter_async_context(gateway)
        assert await gateway.wait_settled() == "ready"
        self._introduce()

    def _introduce(self) -> None:
        networks = [host.network for host in self.hosts.values()]
        if hasattr(self, "gateway_network"):
            networks.append(self.gateway_network)
        for network in networks:
            for host in self.hosts.values():
                network.learn(host.peer, host.record.addresses)
        gateway = self.gateway_network if hasattr(self, "gateway_network") else None
        if gateway is not None:
            for host in self.hosts.values():
                host.network.learn(gateway.peer, [self.address("gateway")])
            self.gateway.view_changed()

    def say(self, name: str, **changes: Any) -> None:
        """Change what a worker's record says."""
        self._sequence += 1
        host = self.hosts[name]
        host.record = replace(host.record, sequence=self._sequence, **changes)
        self.gateway.view_changed()

    async def kill(self, name: str) -> None:
        """A machine is gone: links break, nothing is said, its record stays for a while."""
        self.net.kill(name)
        await self.hosts[name].stack.aclose()

    async def revive(self, name: str) -> Host:
        """It comes back as a new process, which knows nothing."""
        self.net.revive(name)
        blocks = self.hosts[name].engine.blocks
        return await self.add(name, blocks)

    async def ask(self, request: GenerationRequest, answer: Answer | None = None) -> Answer:
        answer = answer or Answer()
        async for delta in self.gateway.generate(request):
            answer.take(delta)
        return answer

    async def settle(self) -> None:
        """Wait until no worker has a session."""
        while any(host.worker.sessions for host in self.hosts.values()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)

    def chain(self) -> list[str]:
        """The names of the workers that the latest session crosses, in order."""
        hops = list(self.gateway.chains().values())[-1]
        names = {host.peer: name for name, host in self.hosts.items()}
        return [names[hop.peer] for hop in hops]

    def check_all_free(self) -> None:
        for host in self.hosts.values():
            assert not host.worker.sessions, host.name
            host.engine.check()
            load = host.engine.load()
            assert load.sessions == 0
            assert load.kv_free_tokens == load.kv_total_tokens

    async def close(self) -> None:
        await self._stack.aclose()
        for host in self.hosts.values():
            await host.stack.aclose()


def identity_of(name: str) -> Identity:
    return Identity.from_seed(name.encode().ljust(32, b"."))


@asynccontextmanager
async def swarm(
    spans: dict[str, range],
    *,
    options: SwarmOptions | None = None,
    dtype: str = "float32",
    rig: SwarmRig | None = None,
) -> AsyncIterator[SwarmRig]:
    """Workers by name and a gateway, in virtual time unless the rig says otherwise."""
    rig = rig or SwarmRig(MemoryNet(), dtype=dtype)
    try:
        for name, blocks in spans.items():
            await rig.add(name, blocks)
        await rig.open_gateway(options or SwarmOptions())
        yield rig
    finally:
        await rig.close()


def cut_at(*cuts: int) -> dict[str, range]:
    """Workers a, b, c... of consecutive spans."""
    bounds = [0, *cuts, BLOCKS]
    return {chr(ord("a") + place): range(first, end) for place, (first, end) in enumerate(pairwise(bounds))}
