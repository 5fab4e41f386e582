"""Workers of `tiny` with small pools that lend to each other, over links in memory or loopback, in real time."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count

from swarm_rig import (
    BLOCKS,
    SECRET,
    TINY,
    UNIX_NOW_S,
    Host,
    SwarmRig,
    identity_of,
    tiny_model,
    tiny_options,
)

from plait.cluster import PeerRates, PeerRecord
from plait.engine import SpanEngine, load_span_engine
from plait.engine.span_inputs import INPUTS_PER_KV_TOKEN, SpanInputs
from plait.ids import PeerId
from plait.kvcache import LendingOptions, LoanTerms
from plait.scheduling import StepLimits
from plait.transport import Carrier, Identity, MemoryNet, Network, TcpCarrier, TlsCarrier
from plait.worker.engine_thread import EngineThread
from plait.worker.lending import LendingLimits
from plait.worker.span_worker import SpanWorker, SpanWorkerOptions
from plait.worker.swarm_engine import SwarmOptions

assert TINY.exists()
QUICK = LendingOptions(heartbeat_s=0.1, answer_within_s=1.0, return_after_s=0.3, manage_s=0.4)
LIMITS = LendingLimits(
    options=QUICK,
    lend_fraction=1.0,
    keep_free_fraction=0.0,
    lease_s=3.0,
    recall_s=2.0,
    deadline_s=5.0,
    wait_s=30.0,
)


_idle: dict[tuple[int, int, str], list[SpanEngine]] = {}
_starts = count(1)


def take_lending_engine(kv_blocks: int, borrow_blocks: int, dtype: str) -> SpanEngine:
    """An engine that an earlier machine left, or a new one."""
    idle = _idle.setdefault((kv_blocks, borrow_blocks, dtype), [])
    return idle.pop() if idle else lending_engine(kv_blocks, borrow_blocks, dtype)


def give_back_lending_engine(lender: "Lender", dtype: str, engine: SpanEngine) -> None:
    """Its machine is gone: whoever borrowed from it has lost that."""
    assert engine.loans is not None
    for debtor in engine.loans.book.lent_to():
        engine.loans.book.forget(debtor)
    engine.check()
    assert engine.loans.debts.borrowed_blocks == 0 and engine.load().sessions == 0
    _idle[lender.kv_blocks, lender.borrow_blocks, dtype].append(engine)


def lending_engine(kv_blocks: int, borrow_blocks: int, dtype: str = "float32") -> SpanEngine:
    """An engine of all of tiny whose pool has so many blocks of 16 tokens."""
    options = tiny_options(dtype)
    limits = StepLimits(
        step_tokens=48, max_running_sequences=16, borrowable_blocks=borrow_blocks, watermark_fraction=0.0
    )
    options = replace(options, limits=limits)
    terms = LoanTerms(lendable_blocks=kv_blocks, lease_s=LIMITS.lease_s, recall_s=LIMITS.recall_s)
    probe = load_span_engine(replace(options, kv_cache_bytes=2**20), range(BLOCKS))
    pages = INPUTS_PER_KV_TOKEN * SpanInputs.page_bytes(16, probe.spec.hidden)
    given = kv_blocks * (probe.store.extent_bytes + math.ceil(pages))
    engine = load_span_engine(replace(options, kv_cache_bytes=given), range(BLOCKS), loan_terms=terms)
    assert engine.store.kv_blocks == kv_blocks
    return engine


@dataclass(kw_only=True)
class Lender:
    """A machine of the rig: its pool, what it may borrow, whether gateways know that it serves, how it lends."""

    kv_blocks: int
    borrow_blocks: int = 0
    serves: bool = True
    limits: LendingLimits = LIMITS


class LendingRig(SwarmRig):
    """Machines that serve all of tiny; each knows all others that are alive, as their records would say."""

    def __init__(self, net: MemoryNet, *, carrier: str = "mem", dtype: str = "float32") -> None:
        super().__init__(net, dtype=dtype)
        self.carrier = carrier

    def carriers(self, name: str, identity: Identity) -> dict[str, Carrier]:
        if self.carrier == "tls":
            return {"tls": TlsCarrier(identity, SECRET)}
        return {"tcp": TcpCarrier()} if self.carrier == "tcp" else super().carriers(name, identity)

    def address(self, name: str) -> str:
        return super().address(name) if self.carrier == "mem" else f"{self.carrier}://127.0.0.1:0"

    async def add_lender(self, name: str, lender: Lender) -> Host:
        """Start a machine."""
        identity = identity_of(name)
        stack = AsyncExitStack()
        network = Network(
            identity, secret=SECRET, carriers=self.carriers(name, identity), unix_now=lambda: UNIX_NOW_S
        )
        engine = take_lending_engine(lender.kv_blocks, lender.borrow_blocks, self.dtype)
        stack.callback(give_back_lending_engine, lender, self.dtype, engine)
        thread = await stack.enter_async_context(EngineThread())
        worker = SpanWorker(
            network,
            engine,
            model=tiny_model().fingerprint,
            run_step=thread.run,
            options=SpanWorkerOptions(lending=lender.limits),
            first_number=next(_starts) * 10**6,
        )
        assert worker.lending is not None
        worker.lending.group = self.group
        self._sequence += 1
        await stack.enter_async_context(network)
        address = await network.listen(self.address(name))
        await stack.enter_async_context(worker)
        record = PeerRecord(
            peer=identity.peer,
            name=name,
            model=tiny_model().fingerprint,
            first_block=0,
            end_block=BLOCKS if lender.serves else 0,
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

    def group(self) -> dict[PeerId, float | None]:
        return {host.peer: None for host in self.hosts.values()}

    async def check_all_home(self) -> None:
        """Everything that was lent is returned, within some time."""
        for host in self.hosts.values():
            loans = host.engine.loans
            assert loans is not None
            async with asyncio.timeout(60):
                while loans.book.lent_blocks or loans.debts.borrowed_blocks:
                    await asyncio.sleep(0.05)
            host.worker.check()


@asynccontextmanager
async def lending_swarm(
    lenders: dict[str, Lender], *, carrier: str = "mem", dtype: str = "float32"
) -> AsyncIterator[LendingRig]:
    """Machines by name and a gateway."""
    rig = LendingRig(MemoryNet(), carrier=carrier, dtype=dtype)
    try:
        for name, lender in lenders.items():
            await rig.add_lender(name, lender)
        await rig.open_gateway(SwarmOptions())
        yield rig
    finally:
        await rig.close()
