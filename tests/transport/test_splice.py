"""A member that nobody can dial, and the one in the middle: it carries bytes, and can do nothing else with them."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from rigs import MESSAGE, QUICK, SECRET, Member, SplicedRig, identity

from plait.errors import PeerLost
from plait.simulator import run_virtual
from plait.transport import MemoryNet, NetworkLimits, TlsCarrier, Wire
from plait.transport.link import Link
from plait.transport.tls import TlsContexts
from plait.wire import (
    SpliceAccept,
    SpliceBytes,
    SpliceClose,
    SpliceCredit,
    SpliceMessage,
    SpliceOpen,
    encode_message,
)

Carried = list[tuple[SpliceMessage, bytes]]


def overhear(middle: Member, change: Callable[[SpliceMessage, bytes], bytes] | None = None) -> Carried:
    """All that the member in the middle is given to carry; `change` alters the bytes that it passes on."""
    heard: Carried = []
    handle = middle.network._splices.handle

    def spy(connection: object, message: SpliceMessage, buffers: tuple[memoryview, ...]) -> None:
        data = bytes(buffers[0]) if buffers else b""
        heard.append((message, data))
        if change is not None and buffers:
            buffers = (memoryview(change(message, data)),)
        handle(connection, message, buffers)  # type: ignore[arg-type]

    middle.network._splices.handle = spy  # type: ignore[method-assign, assignment]
    return heard


def test_the_member_in_the_middle_cannot_read_what_it_carries() -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            heard = overhear(middle)
            await near.network.send(far.peer, MESSAGE, [b"a secret that nobody else may read" * 10])
            await far.hears(1)
            assert far.heard[0][2] == (b"a secret that nobody else may read" * 10,)
            carried = b"".join(data for _, data in heard)
            assert len(carried) > 1000
            assert b"secret" not in carried and MESSAGE.session.encode() not in carried
            assert near.network.connected_directly() == {middle.peer}
            assert near.network.connected() == {middle.peer, far.peer}
            assert middle.heard == []

    run_virtual(main())


@pytest.mark.parametrize("place", ["in the handshake", "in a message"])
def test_the_member_in_the_middle_cannot_change_what_it_carries(place: str) -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            altering = place == "in the handshake"

            def change(message: SpliceMessage, data: bytes) -> bytes:
                return data[:-1] + bytes([data[-1] ^ 1]) if altering else data

            overhear(middle, change)
            if altering:
                with pytest.raises(PeerLost):
                    await near.tell(far, 1)
                assert far.linked == [middle.peer]
            else:
                await near.tell(far, 1)
                await far.hears(1)
                altering = True
                await near.tell(far, 2)
                await asyncio.sleep(QUICK.heartbeat_s)
                assert far.numbers == [1]
                assert [peer for peer, _ in far.lost] == [near.peer]
                assert far.peer in [peer for peer, _ in near.lost]
            assert middle.lost == []

    run_virtual(main())


def test_the_member_in_the_middle_cannot_be_taken_for_the_other_end() -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            contexts = TlsContexts(middle.identity, SECRET.door)
            splices = middle.network._splices
            tried: list[Link] = []

            def answer_oneself(connection: object, request: SpliceOpen) -> None:
                stream = splices._add_end(connection, request.splice)  # type: ignore[arg-type]
                connection.post(encode_message(SpliceAccept(request.splice)))  # type: ignore[attr-defined]
                tried.append(Link("pretending"))
                stream.start(contexts.accept(tried[-1]))

            splices._carry = answer_oneself  # type: ignore[method-assign, assignment]
            with pytest.raises(PeerLost, match="another peer answers there"):
                await near.tell(far, 1)
            assert len(tried) == 1 and far.linked == [middle.peer]

    run_virtual(main())


def test_when_the_middle_dies_another_one_carries() -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            net = middle.network._dialler._carriers["mem"]._net  # type: ignore[attr-defined]
            other = Member(identity(4), {"mem": net.carrier("other")}, limits=QUICK)
            async with other.network:
                await other.network.listen("mem://other")
                far.network.learn(other.peer, ["mem://other"])
                far.network.keep(other.peer)
                await far.network.connect(other.peer)
                near.network.learn(other.peer, ["mem://other"])
                near.network.learn(far.peer, [], through=[middle.peer, other.peer])
                await near.tell(far, 1)
                await far.hears(1)
                assert near.connection(far).middle == middle.peer
                net.kill("middle")
                await asyncio.sleep(0.01)
                assert {peer for peer, _ in near.lost} == {far.peer, middle.peer}
                assert {peer for peer, _ in far.lost} == {near.peer, middle.peer}
                await near.tell(far, 2)
                assert near.connection(far).middle == other.peer
                await far.hears(2)

    run_virtual(main())


def test_an_end_that_dies_ends_the_stream() -> None:
    async def main() -> None:
        rig = SplicedRig()
        async with rig.three() as (near, far, middle):
            await near.tell(far, 1)
            await far.hears(1)
            rig.net.kill("far")
            await asyncio.sleep(0.01)
            assert [peer for peer, _ in near.lost] == [far.peer]
            assert not middle.network._splices._carried
            assert not near.network._splices._ends
            with pytest.raises(PeerLost, match="no link to that peer"):
                await near.tell(far, 2)

    run_virtual(main())


def test_a_frozen_end_is_noticed_through_the_middle() -> None:
    async def main() -> None:
        rig = SplicedRig()
        async with rig.three(NetworkLimits()) as (near, far, _):
            await near.tell(far, 1)
            rig.net.freeze("far")
            await asyncio.sleep(5)
            assert [peer for peer, _ in near.lost] == [far.peer]

    run_virtual(main())


def test_a_direct_address_is_preferred() -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            await far.network.listen("mem://far")
            near.network.learn(far.peer, ["mem://gone", "mem://far"], through=[middle.peer])
            await near.tell(far, 1)
            assert near.connection(far).middle is None

    run_virtual(main())


def test_a_slow_end_holds_up_neither_the_middle_nor_others() -> None:
    limits = replace(NetworkLimits(), splice_window_bytes=100_000, send_timeout_s=300.0)

    async def main() -> None:
        rig = SplicedRig()
        async with rig.three(limits) as (near, far, middle):
            rig.net.set_wire("middle", "far", Wire(delay_s=0.01, bandwidth_bytes_per_s=200_000))
            await near.tell(far, 0)
            sending = asyncio.gather(*(near.tell(far, n, padding_bytes=1_000_000) for n in range(1, 6)))
            most_bytes = 0
            for _ in range(100):
                await asyncio.sleep(0.1)
                connection = middle.connection(far)
                waiting = sum(entry.size_bytes for entry in connection._queue) + connection.link.unsent_bytes
                most_bytes = max(most_bytes, waiting)
            assert 0 < most_bytes < 150_000
            before_s = asyncio.get_running_loop().time()
            await near.tell(middle, 1)
            await middle.hears(1)
            assert asyncio.get_running_loop().time() - before_s < 0.1
            await sending
            await far.hears(6)
            assert far.numbers == list(range(6)) and near.lost == []

    run_virtual(main())


def test_many_small_messages_pass_in_both_directions() -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, _):
            await near.tell(far, -1)
            await asyncio.gather(
                *(near.tell(far, number) for number in range(500)),
                *(far.tell(near, number) for number in range(500)),
            )
            await asyncio.gather(near.hears(500), far.hears(501))
            assert near.numbers == list(range(500)) and far.numbers == list(range(-1, 500))

    run_virtual(main())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([(SpliceBytes(0), bytes(2 << 20))], "overran its window"),
        ([(SpliceCredit(0, 1 << 20), None)], "more than its window"),
        ([(SpliceOpen(0, identity(2).peer), None)], "id 0"),
        ([(SpliceOpen(1, identity(2).peer), None)], "id 1"),
    ],
)
def test_an_end_that_breaks_the_rules_is_cut_off_by_the_middle(
    wrong: list[tuple[SpliceMessage, bytes | None]], reason: str
) -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            await near.tell(far, 1)
            await far.hears(1)
            for message, data in wrong:
                near.connection(middle).post(encode_message(message), [] if data is None else [data])
            await asyncio.sleep(QUICK.heartbeat_s)
            assert [peer for peer, _ in middle.lost] == [near.peer]
            assert reason in middle.lost[0][1]
            assert [peer for peer, _ in far.lost] == [near.peer]
            assert not middle.network._splices._carried
            await far.tell(middle, 1)
            await middle.hears(1)

    run_virtual(main())


def test_streams_on_one_link_are_bounded() -> None:
    limits = replace(QUICK, max_splices=3)

    async def main() -> None:
        async with SplicedRig().three(limits) as (near, far, middle):
            await near.network.connect(middle.peer)
            streams = [near.network._splices.open(near.connection(middle), far.peer) for _ in range(5)]
            await asyncio.sleep(0.1)
            failed = [stream for stream in streams if stream.accepted.done() and stream.accepted.exception()]
            assert len(failed) == 2
            assert "too many" in str(failed[0].accepted.exception())
            await asyncio.sleep(2 * limits.handshake_timeout_s)  # nobody used the others
            assert not middle.network._splices._carried and not far.network._splices._ends

    run_virtual(main())


def test_what_comes_for_a_stream_that_is_over_is_ignored() -> None:
    async def main() -> None:
        async with SplicedRig().three() as (near, far, middle):
            await near.network.connect(middle.peer)
            connection = near.connection(middle)
            for message in (SpliceAccept(8), SpliceCredit(8, 1), SpliceClose(8, "why not")):
                connection.post(encode_message(message))
            connection.post(encode_message(SpliceBytes(8)), [b"late"])
            await near.tell(far, 1)
            await far.hears(1)
            assert near.lost == middle.lost == []

    run_virtual(main())


def test_a_flood_of_tiny_pieces_ends_its_stream_and_nothing_else() -> None:
    """Windows bound bytes; pieces of one byte to a slow end are bounded by their number."""

    async def main() -> None:
        rig = SplicedRig()
        async with rig.three() as (near, far, middle):
            await near.tell(far, 1)
            await far.hears(1)
            middle.connection(far)._credit_bytes = 0  # an end that takes nothing
            piece = encode_message(SpliceBytes(0))
            for _ in range(5000):
                near.connection(middle).post(piece, [b"x"])
            await asyncio.sleep(0.1)
            assert middle.connection(far).queued_frames <= 4100
            assert not middle.network._splices._carried
            await near.tell(middle, 2)
            await middle.hears(1)

    run_virtual(main())


def test_spliced_links_work_over_tls_links_too() -> None:
    async def main() -> None:
        near, far, middle = (
            Member(identity(number), {"tls": TlsCarrier(identity(number), SECRET)}) for number in (1, 2, 3)
        )
        async with middle.network, near.network, far.network:
            address = await middle.network.listen("tls://127.0.0.1:0")
            for member in (near, far):
                member.network.learn(middle.peer, [address])
            far.network.keep(middle.peer)
            await far.network.connect(middle.peer)
            near.network.learn(far.peer, [], through=[middle.peer])
            await asyncio.gather(*(near.tell(far, n, padding_bytes=300_000) for n in range(10)))
            await far.hears(10)
            assert far.numbers == list(range(10))

    asyncio.run(main())


def test_a_member_without_a_listener_joins_by_a_ticket_through_the_middle() -> None:
    """Neither of the two can be dialled; the newcomer's ticket names one of them, and who carries to it."""

    async def main() -> None:
        net = MemoryNet()
        ticket = SECRET.for_ticket(1_900_000_000)
        async with SplicedRig().three() as (near, far, middle):
            del near
            net = middle.network._dialler._carriers["mem"]._net  # type: ignore[attr-defined]
            newcomer = Member(identity(5), {"mem": net.carrier("newcomer")}, secret=ticket, limits=QUICK)
            async with newcomer.network:
                newcomer.network.learn(middle.peer, ["mem://middle"])
                newcomer.network.learn(far.peer, [], through=[middle.peer])
                await newcomer.tell(far, 1)
                await far.hears(1)
                assert newcomer.network.secret == SECRET

    run_virtual(main())
