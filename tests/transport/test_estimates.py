"""Round trip and bandwidth come out as the wires are."""

import asyncio

import pytest
from rigs import Member, identity

from plait.simulator import run_virtual
from plait.transport import MemoryNet, NetworkLimits, Wire


@pytest.mark.parametrize("delay_s", [0.0005, 0.025, 0.15])
@pytest.mark.parametrize("bandwidth_bytes_per_s", [1e6, 12.5e6, 125e6])
def test_a_probe_measures_the_wire(delay_s: float, bandwidth_bytes_per_s: float) -> None:
    async def main() -> None:
        net = MemoryNet(Wire(delay_s=delay_s, bandwidth_bytes_per_s=bandwidth_bytes_per_s))
        near, far = (
            Member(identity(n), {"mem": net.carrier(str(n))}, limits=NetworkLimits()) for n in (1, 2)
        )
        async with near.network, far.network:
            await far.network.listen("mem://2")
            near.network.learn(far.peer, ["mem://2"])
            await near.network.connect(far.peer)
            await asyncio.sleep(5)
            measured = await near.network.probe(far.peer, payload_bytes=2 << 20)
            assert measured.rtt_s == pytest.approx(2 * delay_s, rel=0.1)
            assert measured.bandwidth_bytes_per_s == pytest.approx(bandwidth_bytes_per_s, rel=0.2)
            assert far.network.estimate(near.peer).rtt_s == pytest.approx(2 * delay_s, rel=0.1)  # type: ignore[union-attr]

    run_virtual(main())


def test_long_messages_measure_it_too_and_do_not_disturb_the_round_trip() -> None:
    async def main() -> None:
        net = MemoryNet(Wire(delay_s=0.05, bandwidth_bytes_per_s=10e6))
        near, far = (
            Member(identity(n), {"mem": net.carrier(str(n))}, limits=NetworkLimits()) for n in (1, 2)
        )
        async with near.network, far.network:
            await far.network.listen("mem://2")
            near.network.learn(far.peer, ["mem://2"])
            await asyncio.gather(*(near.tell(far, number, padding_bytes=1_000_000) for number in range(50)))
            await far.hears(50)
            estimate = near.network.estimate(far.peer)
            assert estimate is not None
            assert estimate.bandwidth_bytes_per_s == pytest.approx(10e6, rel=0.2)
            assert estimate.rtt_s == pytest.approx(0.1, rel=0.2)

    run_virtual(main())


def test_estimates_outlive_a_link() -> None:
    async def main() -> None:
        net = MemoryNet(Wire(delay_s=0.02))
        near, far = (
            Member(identity(n), {"mem": net.carrier(str(n))}, limits=NetworkLimits()) for n in (1, 2)
        )
        async with near.network, far.network:
            await far.network.listen("mem://2")
            near.network.learn(far.peer, ["mem://2"])
            await near.network.connect(far.peer)
            await asyncio.sleep(2)
            net.cut("1", "2")
            await asyncio.sleep(1)
            assert near.network.connected() == frozenset()
            estimate = near.network.estimate(far.peer)
            assert estimate is not None and estimate.rtt_s == pytest.approx(0.04, rel=0.1)

    run_virtual(main())
