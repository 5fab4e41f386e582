"""Members of the swarm that ask for what is not lent to them: they read nothing, write nothing, and hold nothing up."""

import asyncio
from contextlib import AsyncExitStack

import numpy as np
import pytest
from lending_rig import Lender, LendingRig, lending_swarm
from swarm_rig import SECRET, UNIX_NOW_S, identity_of, on_one_machine, some_prompt, tiny_request

from plait.ids import PeerId
from plait.transport import Network
from plait.wire import (
    Attend,
    AttendRefused,
    BlockAsk,
    BlockContent,
    BlockGone,
    BlockStored,
    LoanNo,
    LoanRelease,
    LoanRenew,
    LoanReserve,
    Message,
    MoveOrder,
    WireBlocks,
)

REQUEST = tiny_request("x", some_prompt(100, 1), 40, temperature=0.0)


class Stranger:
    """A member that lends nothing, and says what it likes."""

    def __init__(self, rig: LendingRig) -> None:
        identity = identity_of("stranger")
        self.network = Network(
            identity, secret=SECRET, carriers=rig.carriers("stranger", identity), unix_now=lambda: UNIX_NOW_S
        )
        self.heard: asyncio.Queue[Message] = asyncio.Queue()
        self.network.on_message = lambda peer, message, tensors: self.heard.put_nowait(message)
        for host in rig.hosts.values():
            self.network.learn(host.peer, host.record.addresses)

    async def ask(self, peer: PeerId, message: Message, *tensors: bytes) -> Message:
        await self.network.send(peer, message, tensors)
        async with asyncio.timeout(30):
            return await self.heard.get()


def test_a_stranger_neither_reads_nor_writes_what_is_lent_to_another() -> None:
    async def main() -> None:
        expected = on_one_machine([REQUEST])["x"].token_ids
        lenders = {"a": Lender(kv_blocks=4, borrow_blocks=20), "b": Lender(kv_blocks=12, serves=False)}
        async with AsyncExitStack() as stack, lending_swarm(lenders) as rig:
            stranger = Stranger(rig)
            await stack.enter_async_context(stranger.network)
            asking = asyncio.ensure_future(rig.ask(REQUEST))
            creditor = rig.hosts["b"]
            loans = creditor.engine.loans
            assert loans is not None
            while not loans.book.lent_blocks:
                await asyncio.sleep(0.01)
            extent = bytes(loans.store.extent_bytes)
            kv_block = loans.book.held[0]
            name = loans.book.named(kv_block)
            for generation in (name.generation, name.generation - 1, 0):
                gone = await stranger.ask(creditor.peer, BlockAsk(kv_block, generation))
                assert isinstance(gone, BlockGone)
                content = await stranger.ask(creditor.peer, BlockContent(kv_block, generation), extent)
                assert isinstance(content, BlockStored) and not content.accepted
            attention = creditor.engine.spec.blocks[0].attention
            query = np.ones((1, attention.heads, attention.cached_dim), np.float32).tobytes()
            attend = Attend(
                request=1,
                block=0,
                position=200,
                tokens=1,
                dtype="float32",
                listing=1,
                base=0,
                blocks=WireBlocks((kv_block,), (name.generation,)),
                starts=(0,),
            )
            refused = await stranger.ask(creditor.peer, attend, query)
            assert isinstance(refused, AttendRefused) and refused.why == "lost"
            no = await stranger.ask(creditor.peer, LoanReserve(1, 1))
            assert isinstance(no, LoanNo) and no.lendable_blocks == 0
            for message in (
                LoanRelease(WireBlocks((kv_block,), (name.generation,))),
                LoanRenew(WireBlocks((), ()), 2**50),
                MoveOrder("x", creditor.peer, 5),
            ):
                await stranger.network.send(rig.hosts["a"].peer, message)
                if not isinstance(message, MoveOrder):
                    await stranger.network.send(creditor.peer, message)
            assert (await asking).token_ids == expected
            debtor = rig.hosts["a"].worker.lending
            assert debtor is not None and not debtor.told().lost_total
            await rig.check_all_home()

    asyncio.run(asyncio.wait_for(main(), 240))


SHAPELESS = WireBlocks((1, 2), (1,))


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (BlockContent(0, 1), (b"too short",)),
        (BlockContent(0, 1), ()),
        (LoanRelease(SHAPELESS), ()),
        (LoanReserve(1, 1), (b"a tensor",)),
        (
            Attend(
                request=1,
                block=0,
                position=9,
                tokens=1,
                dtype="float32",
                listing=1,
                base=0,
                blocks=SHAPELESS,
                starts=(0,),
            ),
            (bytes(4),),
        ),
        (
            Attend(
                request=1,
                block=77,
                position=9,
                tokens=4096,
                dtype="float32",
                listing=1,
                base=0,
                blocks=WireBlocks((), ()),
                starts=(),
            ),
            (bytes(4),),
        ),
    ],
)
def test_who_sends_what_cannot_be_is_cut_off(message: Message, tensors: tuple[bytes, ...]) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, lending_swarm({"a": Lender(kv_blocks=8)}) as rig:
            stranger = Stranger(rig)
            await stack.enter_async_context(stranger.network)
            host = rig.hosts["a"]
            await stranger.network.connect(host.peer)
            await stranger.network.send(host.peer, message, tensors)
            async with asyncio.timeout(60):
                while host.peer in stranger.network.connected():
                    await asyncio.sleep(0.01)
            host.worker.check()

    asyncio.run(asyncio.wait_for(main(), 240))
