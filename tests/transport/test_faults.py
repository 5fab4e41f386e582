"""Hostile and failing peers, over memory in virtual time: who does it is cut off or lost, and nobody else notices."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from rigs import MESSAGE, SECRET, Member, identity

from plait.errors import PeerLost
from plait.simulator import VirtualLoop, run_virtual
from plait.transport import Link, MemoryNet, NetworkLimits, Wire, draw_faults
from plait.transport.handshake import greet
from plait.wire import (
    Challenge,
    Credit,
    Goodbye,
    Message,
    Ping,
    Pong,
    SpliceBytes,
    SpliceOffer,
    encode_message,
)

DEFAULT = NetworkLimits()


def alarms(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


@asynccontextmanager
async def swarm(
    count: int, *, net: MemoryNet | None = None, limits: NetworkLimits = DEFAULT
) -> AsyncIterator[tuple[MemoryNet, list[Member]]]:
    """Members that know each other's addresses: the first is node "0" and listens at mem://0."""
    net = net or MemoryNet()
    async with AsyncExitStack() as stack:
        members = [Member(identity(n + 1), {"mem": net.carrier(str(n))}, limits=limits) for n in range(count)]
        for number, member in enumerate(members):
            await stack.enter_async_context(member.network)
            await member.network.listen(f"mem://{number}")
        for member in members:
            for number, other in enumerate(members):
                member.network.learn(other.peer, [f"mem://{number}"])
        yield net, members


# -- silence, partitions, death ----------------------------------------------------------------------------


def test_a_frozen_peer_is_lost_within_four_seconds() -> None:
    async def main() -> None:
        async with swarm(3) as (net, (near, far, other)):
            for member in (far, other):
                await near.tell(member, 1)
            await asyncio.sleep(10)
            frozen_s = asyncio.get_running_loop().time()
            net.freeze("1")
            while not near.lost:
                await asyncio.sleep(0.01)
            # It was last heard within the heartbeat before it froze.
            assert 2 <= asyncio.get_running_loop().time() - frozen_s <= 4
            assert near.lost == [(far.peer, "it has been silent for 3 s")]
            assert other.lost == [] and near.network.connected() == {other.peer}

    run_virtual(main())


def test_a_killed_peer_is_lost_at_once() -> None:
    async def main() -> None:
        async with swarm(2, net=MemoryNet(Wire(delay_s=0.02))) as (net, (near, far)):
            await near.tell(far, 1)
            await far.hears(1)
            killed_s = asyncio.get_running_loop().time()
            net.kill("1")
            while not near.lost:
                await asyncio.sleep(0.001)
            assert asyncio.get_running_loop().time() - killed_s < 0.1
            with pytest.raises(PeerLost, match="refused"):
                await near.tell(far, 2)

    run_virtual(main())


def test_a_short_partition_is_not_noticed() -> None:
    async def main() -> None:
        async with swarm(2) as (net, (near, far)):
            await near.tell(far, 1)
            net.partition({"0"})
            await near.tell(far, 2)
            await asyncio.sleep(2)
            assert far.numbers == [1] or far.numbers == []
            net.heal({"0"})
            await far.hears(2)
            await asyncio.sleep(10)
            assert far.numbers == [1, 2] and near.lost == far.lost == []

    run_virtual(main())


def test_a_kept_peer_comes_back_after_a_long_partition() -> None:
    async def main() -> None:
        async with swarm(2) as (net, (near, far)):
            near.network.keep(far.peer)
            await near.tell(far, 1)
            net.partition({"0"})
            await asyncio.sleep(60)
            assert [peer for peer, _ in near.lost] == [far.peer]
            assert [peer for peer, _ in far.lost] == [near.peer]
            with pytest.raises(PeerLost):
                await near.network.send(far.peer, MESSAGE, timeout_s=5)
            net.heal({"0"})
            await asyncio.sleep(DEFAULT.longest_backoff_s * 1.25 + DEFAULT.dial_timeout_s)
            assert near.network.connected() == {far.peer}
            await far.tell(near, 2)
            await near.hears(1)

    run_virtual(main())


def test_a_machine_that_slept_itself_blames_nobody() -> None:
    async def main() -> None:
        async with swarm(2) as (_, (near, far)):
            await near.tell(far, 1)
            await asyncio.sleep(10)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop._now_s += 3600  # all timers are due, and nothing was read for an hour
            await asyncio.sleep(10)
            assert near.lost == far.lost == []
            await near.tell(far, 2)
            await far.hears(2)

    run_virtual(main())


def test_dials_back_off_and_start_again_when_something_new_is_known() -> None:
    async def main() -> None:
        async with swarm(1) as (_, (near,)):
            nobody = identity(7).peer
            dials: list[float] = []
            carrier = near.network._dialler._carriers["mem"]
            dial = carrier.dial

            async def counted(address: str, **options: object) -> Link:
                dials.append(asyncio.get_running_loop().time())
                return await dial(address, **options)  # type: ignore[arg-type]

            carrier.dial = counted  # type: ignore[method-assign]
            near.network.learn(nobody, ["mem://nobody"])
            near.network.keep(nobody)
            await asyncio.sleep(200)
            gaps = np.diff(dials)
            assert 10 < len(dials) < 25
            assert (gaps[:5] < 10).all() and (gaps[-3:] > 0.7 * DEFAULT.longest_backoff_s).all()
            near.network.learn(nobody, ["mem://elsewhere"])
            count = len(dials)
            await asyncio.sleep(1)
            assert len(dials) > count

    run_virtual(main())


def test_a_restarted_peer_replaces_the_link_that_nobody_has_closed() -> None:
    async def main() -> None:
        async with swarm(2) as (net, (near, far)):
            await near.tell(far, 1)
            await far.hears(1)
            net.freeze("1")  # its machine has lost power
            again = Member(far.identity, {"mem": net.carrier("again")})
            async with again.network:
                again.network.learn(near.peer, ["mem://0"])
                await again.tell(near, 2)
                await near.hears(1)
                assert near.lost == [(far.peer, "it has restarted")]
                await near.tell(again, 3)
                await again.hears(1)
            net.thaw("1")

    run_virtual(main())


@pytest.mark.parametrize("dialler", [0, 1])
def test_a_link_that_only_one_end_has_lost_is_replaced(dialler: int) -> None:
    async def main() -> None:
        async with swarm(2) as (net, members):
            near, far = members[dialler], members[1 - dialler]
            await near.tell(far, 1)
            await far.hears(1)
            await asyncio.sleep(1)
            # A middle box forgets the connection: one end is told, the other is not.
            end = far.connection(near).link
            transport = end._transport
            net.partition({"0"})
            far.network._lose(far.network._peers[near.peer], far.connection(near), "the cable was pulled")
            transport.other._queue.clear()  # type: ignore[union-attr]
            transport._queue.clear()  # type: ignore[union-attr]
            net.heal({"0"})
            await far.tell(near, 2)
            await near.hears(1)
            assert near.lost == [(far.peer, "it has lost the link")]
            await near.tell(far, 3)
            await far.hears(2)

    run_virtual(main())


# -- peers that break the protocol ---------------------------------------------------------------------------


async def _rogue(net: MemoryNet, number: int, victim: Member, address: str) -> Link:
    """A member of the swarm, by its own means, with a link to the victim."""
    link = await net.carrier(f"rogue {number}").dial(address, peer=victim.peer, timeout_s=5)
    await greet(
        link,
        victim.peer,
        identity=identity(100 + number),
        secret=SECRET,
        incarnation=bytes(32),
        last_link=bytes(32),
    )
    link.limits = DEFAULT.frames
    return link


def _say(link: Link, message: Message, *buffers: bytes) -> None:
    link.write(encode_message(message), buffers)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda link: _say(link, Pong(77, False)), "a ping that it was not sent"),
        (lambda link: _say(link, Credit(2**53)), "gives credit"),
        (lambda link: _say(link, Challenge(1, bytes(32))), "Challenge after the handshake"),
        (lambda link: link.write(b"\x93\xa4ping"), "not a message"),
        (lambda link: link.write(encode_message(Ping(1))[:-1]), "not a message"),
        (lambda link: link.write(b"", [b""] * 65), "65 buffers"),
        (lambda link: link.write(bytes((1 << 20) + 1)), "header of"),
        (lambda link: _say(link, SpliceBytes(3)), "in 0 buffers"),
        (lambda link: _say(link, SpliceOffer(1, identity(1).peer)), "not its to choose"),
    ],
)
def test_a_member_that_breaks_the_protocol_is_cut_off_alone(
    caplog: pytest.LogCaptureFixture, wrong: object, reason: str
) -> None:
    async def main() -> None:
        async with swarm(2) as (net, (near, far)):
            await near.tell(far, 1)
            rogue = await _rogue(net, 0, far, "mem://1")
            await asyncio.sleep(1)
            wrong(rogue)  # type: ignore[operator]
            await asyncio.sleep(1)
            assert rogue.closed
            assert [peer for peer, _ in far.lost] == [identity(100).peer]
            with pytest.raises(PeerLost):  # nor is it let in again
                await _rogue(net, 0, far, "mem://1")
            await near.tell(far, 2)
            await far.hears(2)
            assert far.numbers == [1, 2] and near.lost == []
            await asyncio.sleep(DEFAULT.ban_s)
            await _rogue(net, 0, far, "mem://1")  # in the end it is

    run_virtual(main())
    cut_off = [line for line in alarms(caplog) if "cut off for" in line]
    assert len(cut_off) == 1 and reason in cut_off[0]


def test_whoever_sends_more_than_its_credit_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    limits = replace(DEFAULT, credit_bytes=1 << 20, max_frame_bytes=1 << 20)

    async def main() -> None:
        async with swarm(1, limits=limits) as (net, (victim,)):
            seen = 0
            stopped = asyncio.Event()

            def never_returns_credit(*_: object) -> None:
                nonlocal seen
                seen += 1
                stopped.set()

            victim.network.on_message = never_returns_credit
            rogue = await _rogue(net, 0, victim, "mem://0")
            victim_end = next(iter(victim.network._peers.values())).connection
            assert victim_end is not None
            victim_end._take = lambda frame: None  # type: ignore[method-assign]
            for _ in range(5):
                _say(rogue, MESSAGE, bytes(300_000))
            await asyncio.sleep(0.1)
            assert seen == 3 and rogue.closed

    run_virtual(main())
    assert any("more than it may" in line for line in alarms(caplog))


def test_whoever_does_not_read_its_answers_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    limits = replace(DEFAULT, credit_bytes=1 << 16, max_frame_bytes=1 << 16)

    async def main() -> None:
        async with swarm(1, limits=limits) as (net, (victim,)):
            rogue = await _rogue(net, 0, victim, "mem://0")
            assert rogue._transport is not None
            rogue._transport.pause_reading()
            ping = encode_message(Ping(1))
            for _ in range(400):
                for _ in range(500):
                    rogue.write(ping)
                await asyncio.sleep(0.001)
                if victim.lost:
                    break
            assert victim.lost

    run_virtual(main())
    assert any("does not read what it is sent" in line for line in alarms(caplog))


def test_a_slow_reader_holds_up_only_those_who_send_to_it() -> None:
    async def main() -> None:
        async with swarm(3) as (net, (near, slow, quick)):
            net.set_wire("0", "1", Wire(delay_s=0.01, bandwidth_bytes_per_s=100_000))
            sending = asyncio.create_task(
                asyncio.wait(
                    [asyncio.create_task(near.tell(slow, n, padding_bytes=50_000)) for n in range(10)]
                )
            )
            start_s = asyncio.get_running_loop().time()
            for number in range(100):
                await near.tell(quick, number)
            await quick.hears(100)
            assert asyncio.get_running_loop().time() - start_s < 0.5
            await sending
            await slow.hears(10)
            assert slow.numbers == list(range(10)) and near.lost == []

    run_virtual(main())


# -- strangers -------------------------------------------------------------------------------------------------


def test_strangers_that_say_nothing_are_closed_and_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        limits = replace(DEFAULT, max_strangers=20, max_strangers_per_host=10)
        async with swarm(2, limits=limits) as (net, (near, far)):
            crowd = [
                await net.carrier("crowd").dial("mem://1", peer=far.peer, timeout_s=5) for _ in range(30)
            ]
            await asyncio.sleep(0.1)
            assert sum(not link.closed for link in crowd) <= 10
            await near.tell(far, 1)  # another place is still heard
            await far.hears(1)
            await asyncio.sleep(DEFAULT.handshake_timeout_s + 1)
            assert all(link.closed for link in crowd)
            assert not far.network._doorkeeper.strangers

    run_virtual(main())
    lines = alarms(caplog)
    assert len(lines) == 2 and all("mem://crowd" in line for line in lines)


def test_a_stranger_that_drips_bytes_is_closed() -> None:
    async def main() -> None:
        async with swarm(1) as (net, (victim,)):
            link = await net.carrier("stranger").dial("mem://0", peer=victim.peer, timeout_s=5)
            assert link._transport is not None
            for byte in b"plt\x01\0\0\0\0\xff\0\0\0":
                link._transport.write(bytes([byte]))
                await asyncio.sleep(1)
            assert link.closed

    run_virtual(main())


def test_what_a_stranger_sends_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with swarm(1) as (net, (victim,)):
            for _ in range(20):
                link = await net.carrier("stranger").dial("mem://0", peer=victim.peer, timeout_s=5)
                assert link._transport is not None
                link._transport.write(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n")
                with pytest.raises(PeerLost):
                    await link.recv()

    run_virtual(main())
    assert len(alarms(caplog)) == 1


def test_goodbyes_are_printed_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        async with swarm(1) as (net, (victim,)):
            rogue = await _rogue(net, 0, victim, "mem://0")
            _say(rogue, Goodbye("bye\r\n2026-01-01 CRITICAL all is lost\x1b[2J"))
            await asyncio.sleep(1)
            assert victim.lost[0][1] == "it left: bye??2026-01-01 CRITICAL all is lost?[2J"

    run_virtual(main())
    assert all(record.getMessage().isprintable() for record in caplog.records)


# -- all of it at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 100))]
)
def test_under_drawn_faults_order_holds_and_everybody_comes_back(seed: int) -> None:
    """Five members send to each other all the time while links are cut, nodes freeze and the net falls apart."""
    rng = np.random.default_rng(seed)
    names = [str(number) for number in range(5)]
    faults = draw_faults(rng, names, until_s=40, mean_gap_s=2, mean_duration_s=4)

    async def main() -> list[tuple[int, ...]]:
        net = MemoryNet(Wire(delay_s=0.02, bandwidth_bytes_per_s=10e6, jitter_s=0.01), seed=seed)
        async with swarm(5, net=net) as (_, members):
            sent = 0

            async def chat(sender: Member, receiver: Member) -> None:
                nonlocal sent
                while asyncio.get_running_loop().time() < 40:
                    sent += 1
                    try:
                        async with asyncio.timeout(20):
                            await sender.tell(receiver, sent, padding_bytes=int(rng.integers(100_000)))
                    except PeerLost:
                        await asyncio.sleep(0.1)
                    await asyncio.sleep(float(rng.exponential(0.3)))

            net.play(faults)
            async with asyncio.TaskGroup() as group:
                for sender in members:
                    for receiver in members:
                        if sender is not receiver:
                            group.create_task(chat(sender, receiver))
            await asyncio.sleep(60)
            for sender in members:
                for receiver in members:
                    if sender is not receiver:
                        await sender.tell(receiver, 10**9)
            await asyncio.sleep(10)
            for receiver in members:
                for sender in members:
                    if sender is not receiver:
                        numbers = [
                            int(tensors[0]) for peer, _, tensors in receiver.heard if peer == sender.peer
                        ]
                        assert numbers == sorted(set(numbers)) and numbers[-1] == 10**9
                assert len(receiver.network.connected()) == 4
                ids = {
                    other.connection(receiver).greeted.link_id for other in members if other is not receiver
                }
                assert ids == {
                    receiver.connection(other).greeted.link_id for other in members if other is not receiver
                }
            assert sum(len(member.lost) for member in members) > 0
            return [tuple(member.numbers) for member in members]

    heard = run_virtual(main())
    gc.collect()
    assert sum(map(len, heard)) > 100
