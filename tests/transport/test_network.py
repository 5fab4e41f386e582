"""What the network promises, whatever carries it: one suite over every carrier, and over a spliced stream."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from rigs import KINDS, MESSAGE, QUICK, Member, Rig, SplicedRig, identity, make_rig, until

from plait.errors import BadFrame, PeerLost
from plait.transport.estimate import LEAST_RTT_S, LEAST_TRANSFER_S
from plait.transport.network import PROBE_BYTES
from plait.wire import Ping

AnyRig = Rig | SplicedRig


@pytest.fixture(params=(*KINDS, "splice"))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AnyRig:
    return make_rig(request.param, tmp_path)


def test_messages_arrive_in_order_both_ways_over_one_link(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            for number in range(50):
                await near.tell(far, number, padding_bytes=number * 1000)
            await far.hears(50)
            for number in range(50):
                await far.tell(near, number)
            await near.hears(50)
            assert near.numbers == far.numbers == list(range(50))
            assert all(peer == near.peer and message == MESSAGE for peer, message, _ in far.heard)
            assert [len(tensors[1]) for _, _, tensors in far.heard] == [number * 1000 for number in range(50)]
            assert far.linked.count(near.peer) == near.linked.count(far.peer) == 1
            assert near.peer in far.network.connected() and far.peer in near.network.connected()

    rig.run(main())


def test_messages_sent_before_there_is_a_link_keep_their_order(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            sending = [asyncio.create_task(near.tell(far, number)) for number in range(20)]
            while not near.network.connected():  # some of these wait already, some come while the link opens
                await asyncio.sleep(0)
                sending.append(asyncio.create_task(near.tell(far, len(sending))))
                await asyncio.sleep(0.001)
            sending += [asyncio.create_task(near.tell(far, len(sending) + number)) for number in range(20)]
            await asyncio.gather(*sending)
            await far.hears(len(sending))
            assert far.numbers == list(range(len(sending)))

    rig.run(main())


def test_both_may_dial_at_once(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            if isinstance(rig, Rig):
                address = rig.address.replace("far", "near")
                far.network.learn(near.peer, [await near.network.listen(address)])
            else:
                far.network.learn(near.peer, [], through=near.network._peers[far.peer].through)
                await near.network.connect(near.network._peers[far.peer].through[0])
            await asyncio.gather(
                *(near.tell(far, number) for number in range(10)),
                *(far.tell(near, number) for number in range(10)),
            )
            await asyncio.gather(near.hears(10), far.hears(10))
            assert near.numbers == far.numbers == list(range(10))
            assert near.connection(far).greeted.link_id == far.connection(near).greeted.link_id
            await asyncio.sleep(3 * QUICK.dead_after_s)
            assert (near.lost, far.lost) == ([], [])
            assert near.linked.count(far.peer) == far.linked.count(near.peer) == 1

    rig.run(main())


def test_little_credit_slows_down_and_loses_nothing(rig: AnyRig) -> None:
    limits = replace(QUICK, credit_bytes=20_000, max_frame_bytes=20_000, max_header_bytes=10_000)

    async def main() -> None:
        async with rig.members(limits) as (near, far):
            await asyncio.gather(*(near.tell(far, number, padding_bytes=6000) for number in range(100)))
            await far.hears(100)
            assert far.numbers == list(range(100))
            with pytest.raises(BadFrame, match="at most"):
                await near.tell(far, 0, padding_bytes=20_000)
            await near.tell(far, 100)
            await far.hears(101)

    rig.run(main())


def test_large_messages_pass(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            await asyncio.gather(*(near.tell(far, number, padding_bytes=5 << 20) for number in range(4)))
            await far.hears(4)
            assert far.numbers == [0, 1, 2, 3]
            assert all(len(tensors[1]) == 5 << 20 for _, _, tensors in far.heard)

    rig.run(main())


def test_a_message_to_oneself_is_delivered_later_and_in_order(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, _):
            for number in range(3):
                await near.tell(near, number)
            assert near.heard == [] or rig.kind != "memory"
            await near.hears(3)
            assert near.numbers == [0, 1, 2]

    rig.run(main())


def test_a_peer_that_stops_is_lost_with_its_reason(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            await near.tell(far, 1)
            await far.network.__aexit__(None, None, None)
            await until(lambda: near.lost)
            assert (far.peer, "it left: it is stopping") in near.lost or rig.kind == "splice"
            assert far.peer not in near.network.connected()
            assert far.lost == []  # it knows that it stops
            with pytest.raises(PeerLost, match=far.peer[:8]):
                await near.tell(far, 2)

    rig.run(main())


def test_a_link_that_breaks_is_noticed_at_both_ends_and_made_again(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            await near.tell(far, 1)
            await far.hears(1)
            near.connection(far).link.abort()
            await until(lambda: near.lost and far.lost)
            assert [peer for peer, _ in near.lost] == [far.peer]
            assert [peer for peer, _ in far.lost] == [near.peer]
            await near.tell(far, 2)
            await far.hears(2)
            assert far.numbers == [1, 2]

    rig.run(main())


def test_round_trip_and_bandwidth_are_estimated(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            assert near.network.estimate(far.peer) is None
            estimate = await near.network.probe(far.peer)
            assert 0 < estimate.bandwidth_bytes_per_s <= 2 * PROBE_BYTES / LEAST_TRANSFER_S
            await asyncio.sleep(2 * QUICK.heartbeat_s)
            for member, other in ((near, far), (far, near)):
                later = member.network.estimate(other.peer)
                assert later is not None and later.rtt_s >= LEAST_RTT_S
            assert far.heard == []

    rig.run(main())


def test_who_cannot_be_reached_fails_soon_and_not_for_ever(rig: AnyRig) -> None:
    nobody = identity(9).peer

    async def main() -> None:
        async with rig.members(replace(QUICK, dial_timeout_s=0.5)) as (near, far):
            with pytest.raises(PeerLost, match="no address of it is known"):
                await near.network.send(nobody, MESSAGE)
            near.network.learn(nobody, ["gopher://there"])
            with pytest.raises(PeerLost, match="no scheme known here"):
                await near.network.send(nobody, MESSAGE)
            with pytest.raises(PeerLost, match="it is dialled again in"):
                await near.network.send(nobody, MESSAGE)
            await near.tell(far, 1)
            await far.hears(1)

    rig.run(main())


def test_a_message_of_the_link_in_the_wrong_place_cuts_its_sender_off(
    rig: AnyRig, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            await near.tell(far, 1)
            await far.hears(1)
            near.connection(far).link.write(b"\xc1 is no message")
            await until(lambda: far.lost and near.lost)
            for _ in range(3):
                with pytest.raises(PeerLost):
                    await near.tell(far, 2)
            with pytest.raises(PeerLost, match="was cut off"):
                await far.tell(near, 3)
            assert far.numbers == [1]

    rig.run(main())
    lines = [record.message for record in caplog.records if "cut off for" in record.message]
    assert len(lines) == 1 and "not a message" in lines[0] and identity(1).peer in lines[0]


def test_a_handler_that_fails_ends_one_peer_only(rig: AnyRig) -> None:
    async def main() -> None:
        async with rig.members() as (near, far):
            near.network.route((Ping,), lambda *_: None)
            await near.tell(far, 1)
            await far.hears(1)

            def fail(*_: object) -> None:
                raise RuntimeError("a bug")

            far.network.on_message = fail
            await near.tell(far, 2)
            await until(lambda: far.lost)
            assert far.lost[0][0] == near.peer
            await far.tell(far, 3)  # its network goes on

    rig.run(main())


def test_cancelled_and_late_messages_leave_the_queue(rig: AnyRig) -> None:
    limits = replace(QUICK, credit_bytes=20_000, max_frame_bytes=20_000, max_header_bytes=10_000)

    async def main() -> None:
        async with rig.members(limits) as (near, far):
            await near.tell(far, 0)
            await far.hears(1)
            connection = near.connection(far)
            credit, connection._credit_bytes = connection._credit_bytes, 0  # as if all of it were in flight
            first = asyncio.create_task(near.tell(far, 1))
            second = asyncio.create_task(near.tell(far, 2))
            third = asyncio.create_task(near.tell(far, 3))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(PeerLost, match="has not taken a message within"):
                await near.network.send(far.peer, MESSAGE, [b"4", b""], timeout_s=0.05)
            connection._credit_bytes = credit
            connection.flush()
            await asyncio.gather(first, third)
            await far.hears(3)
            assert far.numbers == [0, 1, 3]

    rig.run(main())


def test_nothing_is_left_behind(rig: AnyRig) -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        async with rig.members() as (near, far):
            await near.tell(far, 1)
            await far.hears(1)
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() <= before
        member: Member
        for member in (near, far):
            assert member.network.connected() == frozenset()
            assert not member.network._splices._ends and not member.network._splices._carried
            with pytest.raises(PeerLost, match="is stopping"):
                await member.network.send(identity(8).peer, MESSAGE)

    rig.run(main())
