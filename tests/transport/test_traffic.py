"""What the network counts of its links: bytes, heartbeats that did not come, losses; over memory in virtual time."""

import asyncio
from pathlib import Path

from rigs import QUICK, Rig, until


def test_bytes_are_those_of_the_frames_and_add_up_over_links(tmp_path: Path) -> None:
    rig = Rig("memory", tmp_path)

    async def main() -> None:
        async with rig.members() as (near, far):
            await near.tell(far, 1, padding_bytes=50_000)
            await far.hears(1)
            first = near.network.traffic(far.peer)
            assert 50_000 < first.sent_bytes < 52_000
            assert 0 < first.received_bytes < 2000 and first.losses == 0
            received = far.network.traffic(near.peer).received_bytes
            assert first.sent_bytes - 200 < received <= first.sent_bytes
            rig.net.cut("near", "far")
            await until(lambda: near.lost and far.lost)
            assert near.network.traffic(far.peer).losses == 1
            await near.tell(far, 2, padding_bytes=50_000)
            await far.hears(2)
            second = near.network.traffic(far.peer)
            assert second.sent_bytes > 100_000 and second.losses == 1
            assert near.network.total_traffic() == second
            near.network.forget(far.peer)
            rig.net.cut("near", "far")
            await until(lambda: len(near.lost) == 2)
            assert near.network.traffic(far.peer).sent_bytes == 0
            assert near.network.total_traffic().sent_bytes >= second.sent_bytes

    rig.run(main())


def test_heartbeats_that_do_not_come_are_counted(tmp_path: Path) -> None:
    rig = Rig("memory", tmp_path)

    async def main() -> None:
        async with rig.members() as (near, far):
            await near.tell(far, 1)
            await asyncio.sleep(20 * QUICK.heartbeat_s)
            assert near.network.traffic(far.peer).missed_heartbeats == 0
            rig.net.freeze("far")
            await until(lambda: near.lost)
            missed = near.network.traffic(far.peer).missed_heartbeats
            assert missed == round(QUICK.dead_after_s / QUICK.heartbeat_s) - 1  # the last one is the loss

    rig.run(main())


def test_nothing_is_known_of_strangers(tmp_path: Path) -> None:
    rig = Rig("memory", tmp_path)

    async def main() -> None:
        async with rig.members() as (near, far):
            traffic = near.network.traffic(far.peer)
            assert (traffic.sent_bytes, traffic.received_bytes, traffic.losses) == (0, 0, 0)

    rig.run(main())
