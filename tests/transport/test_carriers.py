"""What every carrier must do: one suite for all of them."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from rigs import KINDS, LIMITS, WAIT_S, Rig, identity

from plait.errors import BadFrame, BadSetup, PeerLost
from plait.transport import Link
from plait.transport.link import LinkClosed
from plait.wire import FrameLimits, encode_frame


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return Rig(request.param, tmp_path)


def payload(size_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size_bytes)


def test_frames_arrive_whole_and_in_order_both_ways(rig: Rig) -> None:
    sizes = ((), (0,), (1,), (100, 0, 8192), (70_000,), (5 << 20, 3))

    async def exchange(sender: Link, receiver: Link) -> None:
        sent = [
            (bytes([number]) * number, tuple(payload(size, number) for size in buffers))
            for number, buffers in enumerate(sizes)
        ]

        async def send_all() -> None:
            for header, buffers in sent:
                await sender.send(header, buffers)

        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            group.create_task(send_all())
            for header, buffers in sent:
                frame = await receiver.recv()
                assert frame.header == header
                assert tuple(map(bytes, frame.buffers)) == buffers

    async def main() -> None:
        async with rig.links() as (near, far):
            await asyncio.gather(exchange(near, far), exchange(far, near))

    rig.run(main())


def test_received_tensors_are_memory_of_their_own(rig: Rig) -> None:
    async def main() -> None:
        async with rig.links() as (near, far):
            await near.send(b"", [bytes(100_000), bytes(16)])
            await near.send(b"", [payload(100_000), payload(16)])
            first, second = await far.recv(), await far.recv()
            for buffer in first.buffers:
                buffer[:] = b"\xff" * len(buffer)
            assert tuple(map(bytes, second.buffers)) == (payload(100_000), payload(16))
            assert all(np.frombuffer(buffer, np.uint8).ctypes.data % 16 == 0 for buffer in second.buffers)

    rig.run(main())


def test_a_reader_that_stops_holds_its_sender_back(rig: Rig) -> None:
    part = payload(1 << 20)

    async def main() -> None:
        async with rig.links() as (near, far):
            sent = 0

            async def send_all() -> None:
                nonlocal sent
                for _ in range(64):
                    await near.send(b"part", [part])
                    sent += 1

            sending = asyncio.create_task(send_all())
            while True:  # until nothing moves any more
                before = sent
                await asyncio.sleep(0.05)
                if sent == before and sent > 0:
                    break
            assert sent < 64
            assert near.unsent_bytes < 16 << 20
            async with asyncio.timeout(WAIT_S):
                for _ in range(64):
                    assert bytes((await far.recv()).buffers[0]) == part
                await sending

    rig.run(main())


def test_a_closed_link_delivers_what_was_sent_and_then_ends(rig: Rig) -> None:
    async def main() -> None:
        async with rig.links() as (near, far):
            for number in range(3):
                await near.send(bytes([number]), [payload(200_000)])
            closing = asyncio.create_task(near.close())
            async with asyncio.timeout(WAIT_S):
                assert [(await far.recv()).header for _ in range(3)] == [b"\0", b"\1", b"\2"]
                with pytest.raises(LinkClosed):
                    await far.recv()
                await closing
            for link in (near, far):
                with pytest.raises(PeerLost):
                    link.write(b"more")
                with pytest.raises(PeerLost):
                    await link.send(b"more")

    rig.run(main())


def test_an_aborted_link_ends_at_the_other_side_too(rig: Rig) -> None:
    async def main() -> None:
        async with rig.links() as (near, far):
            receiving = asyncio.create_task(far.recv())
            await asyncio.sleep(0)
            near.abort()
            async with asyncio.timeout(WAIT_S):
                with pytest.raises(LinkClosed):
                    await receiving

    rig.run(main())


def test_waiting_for_a_frame_can_be_cancelled(rig: Rig) -> None:
    async def main() -> None:
        async with rig.links() as (near, far):
            receiving = asyncio.create_task(far.recv())
            await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            await near.send(b"still there")
            async with asyncio.timeout(WAIT_S):
                assert (await far.recv()).header == b"still there"

    rig.run(main())


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame"),
        (b"plt\x02" + bytes(8), "version 2"),
        (b"plt\x01" + bytes(4) + (1 << 30).to_bytes(4, "little"), "header"),
        (b"plt\x01" + (9).to_bytes(4, "little") + bytes(4), "9 buffers"),
        (b"".join(encode_frame(b"", [bytes(10)]))[:-14] + b"\xff\xff\xff\xff", "bytes"),
    ],
)
def test_what_is_no_frame_breaks_the_link_and_no_other(rig: Rig, raw: bytes, reason: str) -> None:
    async def main() -> None:
        async with rig.links() as (near, far):
            await near.send(b"good")
            assert near._transport is not None
            near._transport.write(raw)
            async with asyncio.timeout(WAIT_S):
                assert (await far.recv()).header == b"good"
                for _ in range(2):
                    with pytest.raises(BadFrame, match=reason):
                        await far.recv()
                with pytest.raises(PeerLost):
                    await near.recv()

    rig.run(main())


def test_a_stranger_may_send_little(rig: Rig) -> None:
    async def main() -> None:
        tight = FrameLimits(max_header_bytes=10, max_buffers=0, max_bytes=100)
        async with rig.links(limits=tight) as (near, far):
            await near.send(b"0123456789")
            await near.send(b"0123456789x")
            async with asyncio.timeout(WAIT_S):
                await far.recv()
                with pytest.raises(BadFrame, match="header of 11 bytes; at most 10"):
                    await far.recv()

    rig.run(main())


def test_nobody_listens_there(rig: Rig) -> None:
    async def main() -> None:
        listener = await rig.carrier(rig.far).listen(rig.address, lambda link: None)
        address = listener.address
        await listener.close()
        with pytest.raises(PeerLost, match=address.partition("://")[0]):
            await rig.carrier(rig.near).dial(address, peer=rig.far.peer, timeout_s=10)

    rig.run(main())


def test_an_address_that_is_none_is_refused(rig: Rig) -> None:
    async def main() -> None:
        carrier = rig.carrier(rig.near)
        if rig.kind != "memory":  # there, any name will do
            with pytest.raises(BadSetup, match="not an address"):
                await carrier.listen("elsewhere", lambda link: None)
        with pytest.raises(PeerLost):
            await carrier.dial("elsewhere", peer=rig.far.peer, timeout_s=10)

    rig.run(main())


def test_tls_and_iroh_prove_who_is_there(rig: Rig) -> None:
    async def main() -> None:
        async with rig.links() as (near, far):
            proven = (near.peer, far.peer)
            proves = rig.kind in {"tls", "iroh"}
            assert proven == ((rig.far.peer, rig.near.peer) if proves else (None, None))

    rig.run(main())


def test_many_links_at_once(rig: Rig) -> None:
    async def main() -> None:
        async def echo(link: Link) -> None:
            await link.opened()
            try:
                while True:
                    frame = await link.recv()
                    await link.send(frame.header, frame.buffers)
            except PeerLost:
                await link.close()

        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:

            def accept(link: Link) -> None:
                link.limits = LIMITS
                group.create_task(echo(link))

            listener = await rig.carrier(rig.far).listen(rig.address, accept)
            carrier = rig.carrier(rig.near)

            async def ask(number: int) -> None:
                link = await carrier.dial(listener.address, peer=rig.far.peer, timeout_s=WAIT_S)
                link.limits = LIMITS
                for turn in range(5):
                    await link.send(bytes([number, turn]), [payload(5000, number)])
                    frame = await link.recv()
                    assert (frame.header, bytes(frame.buffers[0])) == (
                        bytes([number, turn]),
                        payload(5000, number),
                    )
                await link.close()

            await asyncio.gather(*(ask(number) for number in range(16)))
            await listener.close()

    rig.run(main())


def test_tls_refuses_another_peer_than_the_expected_one(tmp_path: Path) -> None:
    rig = Rig("tls", tmp_path)

    async def main() -> None:
        accepted: asyncio.Queue[Link] = asyncio.Queue()
        listener = await rig.carrier(rig.far).listen(rig.address, accepted.put_nowait)
        with pytest.raises(PeerLost, match=f"another peer answers there: {rig.far.peer}"):
            await rig.carrier(rig.near).dial(listener.address, peer=identity(3).peer, timeout_s=10)
        await listener.close()

    rig.run(main())
