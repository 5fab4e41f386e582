"""What a member tells others to dial, and who hears what comes."""

import asyncio
import ipaddress
from collections.abc import Callable

import numpy as np
import pytest
from swarm_rig import SECRET

from plait.ids import PeerId
from plait.transport import Identity, Link, TcpCarrier, TicketPeer
from plait.transport.sockets import SocketListener
from plait.wire import Fence, Message
from plait.worker.swarm_node import SwarmNode, own_addresses

ELSEWHERE = TicketPeer(Identity.make().peer, ("tcp://192.0.2.7:7000",))
HERE = TicketPeer(Identity.make().peer, ("tcp://127.0.0.1:1",))


def node(
    *listen: str, advertise: tuple[str, ...] = (), introducers: tuple[TicketPeer, ...] = ()
) -> SwarmNode:
    return SwarmNode(
        Identity.make(),
        secret=SECRET,
        carriers={"tcp": TcpCarrier(), "iroh": OwnCarrier()},
        listen=listen,
        advertise=advertise,
        introducers=introducers,
        rng=np.random.default_rng(0),
    )


def addresses_of(made: SwarmNode) -> tuple[str, ...]:
    async def run() -> tuple[str, ...]:
        async with made as it:
            return it.addresses

    return asyncio.run(run())


def test_a_bound_port_is_told() -> None:
    (address,) = addresses_of(node("tcp://127.0.0.1:0"))
    assert address.startswith("tcp://127.0.0.1:") and not address.endswith(":0")


def test_loopback_is_told_only_where_the_swarm_is_on_this_machine() -> None:
    assert addresses_of(node("tcp://127.0.0.1:0", introducers=(HERE,)))
    assert addresses_of(node("tcp://127.0.0.1:0", introducers=(ELSEWHERE,))) == ()


def test_listening_everywhere_tells_this_hosts_own_address() -> None:
    (address,) = addresses_of(node("tcp://0.0.0.0:0", introducers=(ELSEWHERE,)))
    host = ipaddress.ip_address(address.removeprefix("tcp://").rpartition(":")[0])
    assert not host.is_unspecified


def test_what_is_to_be_advertised_is_told_instead() -> None:
    assert addresses_of(node("tcp://127.0.0.1:0", advertise=("tcp://home.example:7000",))) == (
        "tcp://home.example:7000",
    )


@pytest.mark.parametrize("version", [4, 6])
def test_own_addresses_are_addresses(version: int) -> None:
    for address in own_addresses(version):
        assert ipaddress.ip_address(address.strip("[]")).version == version


class Listener:
    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.lost: list[PeerId] = []

    def on_message(self, peer: PeerId, message: Message, tensors: tuple[memoryview, ...]) -> None:
        self.heard.append(message)

    def on_lost(self, peer: PeerId, reason: str) -> None:
        self.lost.append(peer)


def test_all_hearers_hear_what_comes_and_who_is_lost() -> None:
    async def run() -> None:
        first, second = Listener(), Listener()
        async with node("tcp://127.0.0.1:0") as near:
            near.add_hearer(first)
            near.add_hearer(second)
            async with node("tcp://127.0.0.1:0", introducers=(TicketPeer(near.peer, near.addresses),)) as far:
                fence = Fence(session="0" * 32, epoch=1, tokens=1, last_token_id=0)
                await far.network.send(near.peer, fence)
                while not second.heard:
                    await asyncio.sleep(0.001)
                assert first.heard == second.heard == [fence]
                gone = far.peer
                near.remove_hearer(second)
            while not first.lost:
                await asyncio.sleep(0.001)
            assert first.lost == [gone] and second.lost == []

    asyncio.run(run())


class OwnCarrier(TcpCarrier):
    """The same under another scheme, with what iroh's addresses say besides."""

    scheme = "iroh"

    async def listen(self, address: str, accept: Callable[[Link], None]) -> SocketListener:
        listener = await super().listen(address, accept)
        listener.address += "?relay=http://192.0.2.1:3340"
        return listener


def test_an_address_keeps_the_relay_that_it_names() -> None:
    (told,) = addresses_of(node("iroh://0.0.0.0:0", introducers=(ELSEWHERE,)))
    place, _, relay = told.partition("?")
    host, _, port = place.removeprefix("iroh://").rpartition(":")
    assert relay == "relay=http://192.0.2.1:3340" and int(port) > 0
    assert not ipaddress.ip_address(host).is_unspecified


def test_what_is_advertised_for_one_scheme_is_not_all_that_is_told() -> None:
    told = addresses_of(
        node("tcp://127.0.0.1:0", "iroh://127.0.0.1:0", advertise=("tcp://home.example:7000",))
    )
    assert told[0] == "tcp://home.example:7000"
    assert [address.partition("://")[0] for address in told] == ["tcp", "iroh"]
