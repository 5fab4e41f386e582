"""What only links over iroh do; what every carrier must do is in test_carriers.py."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest
from rigs import SECRET, Rig, identity

from plait.errors import BadSetup, PeerLost
from plait.transport import IrohCarrier, Link, SwarmSecret
from plait.transport.iroh_binding import load_iroh

has_iroh = pytest.mark.skipif(
    find_spec("iroh") is None, reason="iroh is not installed: pip install 'plait[iroh]'"
)


@pytest.mark.skipif(find_spec("iroh") is not None, reason="iroh is installed: pip uninstall iroh")
def test_without_the_library_it_says_what_to_install() -> None:
    with pytest.raises(BadSetup, match=r"pip install 'plait\[iroh\]'"):
        IrohCarrier(identity(1), SECRET)


@has_iroh
@pytest.mark.parametrize("size_bytes", [0, 1, 11, 12, 13, 4096, 1 << 20])
def test_a_buffer_is_handed_over_as_it_is(size_bytes: int) -> None:
    iroh = load_iroh()
    sample = bytes(number % 251 for number in range(size_bytes))
    assert iroh._UniffiFfiConverterBytes.lift(iroh._UniffiFfiConverterBytes.lower(sample)) == sample


@has_iroh
def test_the_key_of_a_machine_is_its_key_in_iroh() -> None:
    iroh, owner = load_iroh(), identity(5)
    key = iroh.SecretKey.from_bytes(owner.key.private_bytes_raw())
    assert key.public().to_bytes().hex() == owner.peer


def refused_dial(carrier: IrohCarrier, rig: Rig, peer: str, address: str = "") -> str:
    """What a dial to a listening far end fails with."""
    said: list[str] = []

    async def main() -> None:
        accepted: asyncio.Queue[Link] = asyncio.Queue()
        listener = await rig.carrier(rig.far).listen(rig.address, accepted.put_nowait)
        with pytest.raises(PeerLost) as raised:
            await carrier.dial(address or listener.address, peer=peer, timeout_s=5)
        said.append(raised.value.message)
        await listener.close()

    rig.run(main())
    return said[0]


@has_iroh
def test_another_peer_than_the_expected_one_is_refused(tmp_path: Path) -> None:
    rig = Rig("iroh", tmp_path)
    assert "iroh://127.0.0.1:" in refused_dial(IrohCarrier(rig.near, SECRET), rig, identity(3).peer)


@has_iroh
def test_a_machine_of_another_swarm_gets_no_link(tmp_path: Path) -> None:
    rig, other = Rig("iroh", tmp_path), SwarmSecret(bytes(32))
    assert "cannot be reached" in refused_dial(IrohCarrier(rig.near, other), rig, rig.far.peer)


@has_iroh
@pytest.mark.parametrize("address", ["iroh://", "iroh://127.0.0.1", "iroh://127.0.0.1:x"])
def test_what_is_no_address_is_said(address: str, tmp_path: Path) -> None:
    rig = Rig("iroh", tmp_path)
    assert "write iroh://host:port" in refused_dial(IrohCarrier(rig.near, SECRET), rig, rig.far.peer, address)


@has_iroh
@pytest.mark.parametrize("when", ["at once", "while it opens"])
def test_a_link_that_is_refused_is_gone_at_both_ends(when: str, tmp_path: Path) -> None:
    rig = Rig("iroh", tmp_path)

    async def main() -> None:
        def accept(link: Link) -> None:
            if when == "at once":
                link.abort()
            else:
                asyncio.get_running_loop().call_later(0.001, link.abort)

        listener = await rig.carrier(rig.far).listen(rig.address, accept)
        with pytest.raises(PeerLost):
            link = await rig.carrier(rig.near).dial(listener.address, peer=rig.far.peer, timeout_s=10)
            await link.recv()
        await listener.close()

    rig.run(main())


@has_iroh
def test_the_address_names_the_relay_that_introduces(tmp_path: Path) -> None:
    rig = Rig("iroh", tmp_path)
    relay = "http://127.0.0.1:9"  # nobody is there; a direct way needs none

    async def main() -> None:
        accepted: asyncio.Queue[Link] = asyncio.Queue()
        carrier = IrohCarrier(rig.far, SECRET, relay=relay)
        listener = await carrier.listen(rig.address, accepted.put_nowait)
        assert listener.address.endswith(f"?relay={relay}")
        link = await IrohCarrier(rig.near, SECRET).dial(listener.address, peer=rig.far.peer, timeout_s=10)
        taken = await accepted.get()
        await taken.opened()
        await link.close()
        await taken.close()
        await listener.close()

    rig.run(main())
