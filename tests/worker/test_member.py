"""Members of a swarm, in virtual time: which blocks they take, what they announce, how they move and leave."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from swarm_rig import (
    SECRET,
    UNIX_NOW_S,
    Answer,
    give_back,
    on_one_machine,
    some_prompt,
    take_engine,
    tiny_model,
    tiny_request,
)

from plait.cluster import PeerRates, PeerRecord
from plait.errors import BadSetup
from plait.ids import PeerId
from plait.session import GenerationRequest
from plait.simulator import run_virtual
from plait.transport import Identity, MemoryNet, TicketPeer, Wire
from plait.wire import LeaveAsk
from plait.worker.engine_thread import run_inline
from plait.worker.member import Member, MemberOptions
from plait.worker.span_source import LoadedSpan, StageProgress
from plait.worker.swarm_engine import SwarmEngine
from plait.worker.swarm_node import SwarmNode

BLOCKS = 6
RATES = PeerRates(decode_tokens_per_s=1000, prefill_tokens_per_s=5000)


@dataclass
class InlineSupply:
    """Spans of tiny, computed on the event loop; a load takes virtual time."""

    length: int = 3
    load_s: float = 1.0
    rates: PeerRates = RATES
    fails: bool = False
    loads: list[range] = field(default_factory=list)
    model: str = field(default_factory=lambda: tiny_model().fingerprint)
    model_blocks: int = BLOCKS
    hidden_bytes: int = 1024
    weight_format: str = "torch-float32"
    kv_format: str = "float32"
    memory_bytes: int = 2**30

    def longest_span(self) -> int:
        return self.length

    def known_rates(self) -> PeerRates:
        return PeerRates()

    async def load(
        self, blocks: range, holders: Callable[[], Sequence[PeerId]], on_progress: StageProgress
    ) -> LoadedSpan:
        self.loads.append(blocks)
        on_progress("reading weights", 0, 1)
        await asyncio.sleep(self.load_s)
        if self.fails:
            raise BadSetup("the disk is empty")
        engine = take_engine("float32", blocks)

        async def close() -> None:
            give_back("float32", engine)

        return LoadedSpan(engine=engine, rates=self.rates, run_step=run_inline, close=close)


class Swarm:
    """Machines in memory, the first of which the others are introduced by, and their gateway."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.net = MemoryNet(Wire(delay_s=0.02, bandwidth_bytes_per_s=1e8))
        self.members: dict[str, Member] = {}
        self._stack = stack

    async def node(self, name: str) -> SwarmNode:
        first = next(iter(self.members.values()), None)
        introducers = () if first is None else (TicketPeer(first.node.peer, first.node.addresses),)
        loop = asyncio.get_running_loop()
        node = SwarmNode(
            Identity.from_seed(name.ljust(32).encode()),
            secret=SECRET,
            carriers={"mem": self.net.carrier(name)},
            listen=[f"mem://{name}"],
            introducers=introducers,
            rng=np.random.default_rng(len(self.members)),
            unix_now=lambda: UNIX_NOW_S + loop.time(),
        )
        await self._stack.enter_async_context(node)
        return node

    async def add(self, name: str, supply: InlineSupply | None = None, **options: object) -> Member:
        node = await self.node(name)
        if self.members:
            await node.network.connect(node.introducers[0].peer)
            await asyncio.sleep(1.0)  # records come
        member = Member(
            node,
            supply or InlineSupply(),
            MemberOptions(name=name, **options),  # type: ignore[arg-type]
            run_blocking=run_inline,
        )
        self.members[name] = member
        return await self._stack.enter_async_context(member)

    async def gateway(self) -> SwarmEngine:
        node = await self.node("gateway")
        engine = SwarmEngine(
            node.network,
            names=("tiny",),
            load=lambda on_progress: tiny_model(),
            look=lambda model: node.look(model.fingerprint, model.blocks),
            rng=node.rng,
            unix_now=node.unix_now,
            run_blocking=run_inline,
        )
        node.add_hearer(engine)
        node.watch(engine.view_changed)
        await self._stack.enter_async_context(engine)
        assert await engine.wait_settled() == "ready"
        return engine

    def record(self, of: str, seen_by: str) -> PeerRecord | None:
        peer = self.members[of].node.peer
        return next((r for r in self.members[seen_by].node.membership.records() if r.peer == peer), None)


@asynccontextmanager
async def swarm() -> AsyncIterator[Swarm]:
    async with AsyncExitStack() as stack:
        yield Swarm(stack)


async def until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.05)


def test_machines_take_what_the_swarm_lacks() -> None:
    async def run() -> None:
        async with swarm() as it:
            first = await it.add("first")
            await first.wait_settled()
            second = await it.add("second")
            await second.wait_settled()
            assert sorted((first.blocks.start, second.blocks.start)) == [0, 3]
            assert it.record("second", "first") is not None
            third = await it.add("third", InlineSupply(length=6))
            await third.wait_settled()
            assert third.blocks == range(6)

    run_virtual(run())


def test_a_span_is_claimed_before_it_is_loaded() -> None:
    async def run() -> None:
        async with swarm() as it:
            first = await it.add("first")
            await first.wait_settled()
            slow = await it.add("slow", InlineSupply(load_s=30.0))
            await until(lambda: slow.state == "joining")
            await asyncio.sleep(2.0)
            claimed = it.record("slow", "first")
            assert claimed is not None and claimed.state == "joining" and claimed.span == range(3, 6)
            assert claimed.progress.stage == "reading weights" and claimed.progress.total_bytes == 1
            third = await it.add("third", InlineSupply(load_s=0.1))
            await third.wait_settled()
            assert third.blocks.start in (0, 3)
            await slow.wait_settled()
            assert slow.state == "online"
            await asyncio.sleep(2.0)
            serving = it.record("slow", "first")
            assert serving is not None and not serving.progress.stage

    run_virtual(run())


def test_machines_that_start_together_end_up_covering_the_model() -> None:
    async def run() -> None:
        async with swarm() as it:
            founder = await it.add("founder", blocks="none")
            await founder.wait_settled()
            assert founder.blocks == range(0) and founder.state == "online"
            for number in range(4):
                await it.add(f"machine-{number}", choose_wait_s=5.0, rebalance_s=5.0)
            await until(lambda: founder.view().missing_blocks(range(BLOCKS)) == ())

    run_virtual(run())


def test_blocks_that_were_asked_for_are_served_and_kept() -> None:
    async def run() -> None:
        async with swarm() as it:
            supply = InlineSupply()
            member = await it.add("one", supply, blocks=range(2, 5), rebalance_s=0.5)
            await member.wait_settled()
            await asyncio.sleep(20.0)
            assert member.blocks == range(2, 5) and supply.loads == [range(2, 5)]

    run_virtual(run())


def test_a_record_says_what_was_measured_and_how_busy_it_is() -> None:
    async def run() -> None:
        async with swarm() as it:
            first = await it.add("first")
            await first.wait_settled()
            second = await it.add("second", announce_s=1.0, ping_s=1.0)
            await second.wait_settled()
            await asyncio.sleep(10.0)
            record = it.record("second", "first")
            assert record is not None
            assert (record.name, record.state, record.span) == ("second", "online", range(3, 6))
            assert record.rates.decode_tokens_per_s == 1000
            assert record.rates.network_tokens_per_s > 0
            assert record.load.kv_total_tokens > 0
            assert first.node.peer in record.rtts_s
            assert record.addresses == ("mem://second",)

    run_virtual(run())


def test_a_gateway_measures_the_way_to_those_that_end_chains() -> None:
    async def run() -> None:
        async with swarm() as it:
            for number in range(8):
                await (await it.add(f"front-{number}", blocks=range(3))).wait_settled()
            back = await it.add("back", blocks=range(3, 6))
            await back.wait_settled()
            gateway = await it.add("gateway", blocks="none", ping_s=1.0, is_gateway=True)
            await asyncio.sleep(20.0)
            assert gateway.view().rtts_s[back.node.peer] == pytest.approx(0.04, rel=0.5)

    run_virtual(run())


def test_a_machine_moves_when_others_leave_blocks_unserved() -> None:
    async def run() -> None:
        async with swarm() as it:
            for name, blocks in (("a", range(3)), ("b", "auto"), ("c", "auto"), ("d", "auto")):
                await (await it.add(name, blocks=blocks, rebalance_s=5.0)).wait_settled()
            late = [member for member in it.members.values() if member.blocks == range(3, 6)]
            assert late
            for member in late:
                member.leave()
                await member.wait_left()
            watcher = it.members["a"]
            await until(lambda: watcher.view().missing_blocks(range(BLOCKS)) != ())
            await until(lambda: watcher.view().missing_blocks(range(BLOCKS)) == ())
            assert sum(member.moves_total for member in it.members.values()) >= 1

    run_virtual(run())


def test_a_swarm_in_balance_stays_as_it_is() -> None:
    async def run() -> None:
        async with swarm() as it:
            for name in ("a", "b", "c", "d"):
                await (await it.add(name, rebalance_s=2.0)).wait_settled()
            await asyncio.sleep(10.0)
            moves = sum(member.moves_total for member in it.members.values())
            await asyncio.sleep(60.0)
            assert sum(member.moves_total for member in it.members.values()) == moves

    run_virtual(run())


@pytest.mark.parametrize("how", ["told", "asked"])
def test_an_answer_goes_on_when_a_machine_leaves(how: str) -> None:
    request = tiny_request("one", some_prompt(40), 48, temperature=0.8, seed=3)
    expected = on_one_machine([request])["one"]

    async def run() -> None:
        async with swarm() as it:
            await (await it.add("front", blocks=range(3))).wait_settled()
            for name in ("back", "spare"):
                await (await it.add(name, blocks=range(3, 6))).wait_settled()
            gateway = await it.gateway()
            await asyncio.sleep(3.0)
            answer = Answer()
            async for delta in gateway.generate(request):
                answer.take(delta)
                if len(answer.token_ids[0]) == 8:
                    (used,) = (
                        member
                        for name, member in it.members.items()
                        if name != "front" and member.load.sessions
                    )
                    if how == "told":
                        used.leave()
                    else:
                        await it.members["front"].node.network.send(used.node.peer, LeaveAsk())
                    left = asyncio.ensure_future(used.wait_left())
            assert answer.token_ids == expected.token_ids
            await left
            assert used.state == "offline" and used.failure is None
            assert gateway.counts().recoveries_total == 1

    run_virtual(run())


@pytest.mark.slow
def test_a_move_to_other_blocks_stops_no_answer() -> None:
    requests = [
        tiny_request(f"r{n}", some_prompt(30, seed=n), 100, temperature=0.7, seed=n) for n in range(3)
    ]
    expected = on_one_machine(requests)

    async def run() -> None:
        async with swarm() as it:
            await (await it.add("front", blocks=range(3))).wait_settled()
            for name in ("back", "back-too"):
                await (await it.add(name, blocks=range(3, 6))).wait_settled()
            mover = await it.add("mover", rebalance_s=1.0)
            await mover.wait_settled()
            assert mover.blocks == range(3)
            await (await it.add("front-too", blocks=range(3))).wait_settled()
            gateway = await it.gateway()
            await asyncio.sleep(2.0)

            async def ask(request: GenerationRequest) -> Answer:
                answer = Answer()
                async for delta in gateway.generate(request):
                    answer.take(delta)
                return answer

            asked = [asyncio.ensure_future(ask(request)) for request in requests]
            await asyncio.sleep(0.5)
            it.members["back"].leave()
            answers = await asyncio.gather(*asked)
            for request, answer in zip(requests, answers, strict=True):
                assert answer.token_ids == expected[request.id].token_ids
            assert mover.moves_total == 1 and gateway.counts().recoveries_total >= 2
            await until(lambda: mover.blocks == range(3, 6) and mover.state == "online")

    run_virtual(run())


def test_the_last_machine_with_some_blocks_serves_its_sessions_to_their_end_before_it_leaves() -> None:
    request = tiny_request("one", some_prompt(40), 48, temperature=0.0)
    expected = on_one_machine([request])["one"]

    async def run() -> None:
        async with swarm() as it:
            await (await it.add("front", blocks=range(3))).wait_settled()
            back = await it.add("back", blocks=range(3, 6))
            await back.wait_settled()
            gateway = await it.gateway()
            await asyncio.sleep(3.0)
            answer = Answer()
            async for delta in gateway.generate(request):
                answer.take(delta)
                if len(answer.token_ids[0]) == 8:
                    back.leave()
            assert answer.token_ids == expected.token_ids
            await back.wait_left()

    run_virtual(run())


def test_a_machine_that_is_told_to_leave_while_it_loads_does_so_at_once() -> None:
    async def run() -> None:
        async with swarm() as it:
            member = await it.add("one", InlineSupply(load_s=1000.0))
            await until(lambda: member.state == "joining")
            member.leave()
            await member.wait_left()
            assert asyncio.get_running_loop().time() < 10
            assert member.state == "offline" and member.failure is None

    run_virtual(run())


def test_a_span_that_cannot_be_loaded_ends_the_member_with_the_reason() -> None:
    async def run() -> None:
        async with swarm() as it:
            member = await it.add("one", InlineSupply(fails=True))
            await member.wait_left()
            assert member.failure is not None and "disk is empty" in member.failure.message
            assert member.state == "offline"

    run_virtual(run())


def test_a_broken_engine_ends_the_member(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with swarm() as it:
            member = await it.add("one", blocks=range(6))
            await member.wait_settled()
            assert member.worker is not None
            member.worker._stop("the device is gone")
            await member.wait_left()
            assert member.failure is not None and "device is gone" in member.failure.message

    run_virtual(run())
