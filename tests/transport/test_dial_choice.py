"""Which of several ways to a peer a link takes: straight ones first, then the faster of iroh and a splice."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from rigs import Member, identity

from plait.ids import PeerId
from plait.simulator import run_virtual
from plait.transport import Link, Listener, MemoryCarrier, MemoryNet, Wire


class IrohInMemory:
    """iroh's addresses on the modelled wires: opening a link takes a round trip, which it measures."""

    def __init__(self, carrier: MemoryCarrier, rtt_s: float) -> None:
        self._carrier = carrier
        self._rtt_s = rtt_s

    async def listen(self, address: str, accept: Callable[[Link], None]) -> Listener:
        return await self._carrier.listen(address.replace("iroh", "mem"), accept)

    async def dial(self, address: str, *, peer: PeerId, timeout_s: float) -> Link:
        link = await self._carrier.dial(address.replace("iroh", "mem"), peer=peer, timeout_s=timeout_s)
        link.rtt_s, link.name = self._rtt_s, address
        return link


@asynccontextmanager
async def ways(*, splice_s: float, iroh_s: float) -> AsyncIterator[tuple[Member, Member, Member]]:
    """Two members, and a third that splices; one way takes so long over each."""
    net = MemoryNet()
    net.set_wire("near", "middle", Wire(delay_s=splice_s / 2))
    net.set_wire("middle", "far", Wire(delay_s=splice_s / 2))
    net.set_wire("near", "far", Wire(delay_s=iroh_s))
    near, far, middle = (
        Member(
            identity(number),
            {"mem": net.carrier(name), "iroh": IrohInMemory(net.carrier(name), 2 * iroh_s)},
        )
        for number, name in ((1, "near"), (2, "far"), (3, "middle"))
    )
    async with middle.network, near.network, far.network:
        await middle.network.listen("mem://middle")
        await far.network.listen("mem://far")
        for member in (near, far):
            member.network.learn(middle.peer, ["mem://middle"])
            await member.network.connect(middle.peer)
        yield near, far, middle


@pytest.mark.parametrize(
    ("splice_s", "iroh_s", "taken"),
    [(0.05, 0.01, "iroh"), (0.01, 0.05, "splice"), (0.02, 0.019, "splice"), (0.15, 0.02, "iroh")],
)
def test_the_faster_of_iroh_and_a_splice_is_taken(splice_s: float, iroh_s: float, taken: str) -> None:
    async def main() -> None:
        async with ways(splice_s=splice_s, iroh_s=iroh_s) as (near, far, middle):
            near.network.learn(far.peer, ["iroh://far"], through=[middle.peer])
            await near.tell(far, 1)
            await far.hears(1)
            assert near.connection(far).link.name.startswith(taken + "://")

    run_virtual(main())


def test_a_straight_way_is_taken_before_both(splice_s: float = 0.001, iroh_s: float = 0.04) -> None:
    async def main() -> None:
        async with ways(splice_s=splice_s, iroh_s=iroh_s) as (near, far, middle):
            near.network.learn(far.peer, ["iroh://far", "mem://far"], through=[middle.peer])
            await near.tell(far, 1)
            assert near.connection(far).link.name.startswith("mem://")

    run_virtual(main())


@pytest.mark.parametrize(("address", "taken"), [("iroh://nobody", "splice"), ("iroh://far", "iroh")])
def test_where_one_of_them_fails_the_other_is_taken(address: str, taken: str) -> None:
    async def main() -> None:
        async with ways(splice_s=0.01, iroh_s=0.01) as (near, far, middle):
            carriers = [middle.peer] if taken == "splice" else [identity(9).peer]
            near.network.learn(far.peer, [address], through=carriers)
            await near.tell(far, 1)
            assert near.connection(far).link.name.startswith(taken + "://")

    run_virtual(main())
