"""Who a machine is in a swarm, and what it tells others to dial."""

import asyncio
import socket
import stat
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from plait.cli.swarm_setup import (
    _listen_address,  # pyright: ignore[reportPrivateUsage]
    asked_blocks,
    lending_limits,
    make_node,
    member_options,
    own_secret,
    reaches_beyond,
    take_seat,
)
from plait.errors import BadSetup
from plait.settings import Settings, load_settings
from plait.worker import SwarmNode


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(flags={"swarm.folder": tmp_path})


def test_a_machine_is_the_same_after_a_restart(settings: Settings) -> None:
    with take_seat(settings) as first:
        peer = first.identity.peer
    with take_seat(settings) as again:
        assert again.identity.peer == peer and again.name == first.name


def test_two_processes_at_once_are_two_machines(settings: Settings) -> None:
    with take_seat(settings) as first, take_seat(settings) as second, take_seat(settings) as third:
        assert len({seat.identity.peer for seat in (first, second, third)}) == 3
        assert second.name == first.name + "-2" and third.name == first.name + "-3"


def test_a_name_that_was_asked_for_is_not_taken_twice(tmp_path: Path) -> None:
    named = load_settings(flags={"swarm.folder": tmp_path, "swarm.name": "attic pi/4"})
    with take_seat(named) as seat:
        assert seat.name == "attic pi/4"
        with pytest.raises(BadSetup, match="is in a swarm as 'attic pi/4' already"), take_seat(named):
            pass


def test_keys_are_for_their_owner_alone(settings: Settings, tmp_path: Path) -> None:
    with take_seat(settings):
        own_secret(settings)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert len(files) == 2  # no port: nobody has listened
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert own_secret(settings).swarm == own_secret(settings).swarm


def test_seats_end(settings: Settings) -> None:
    with ExitStack() as stack, pytest.raises(BadSetup, match="processes on this machine are in swarms"):
        for _ in range(100):
            stack.enter_context(take_seat(settings))


@pytest.mark.parametrize(("text", "blocks"), [("3:6", range(3, 6)), ("auto", "auto"), ("none", "none")])
def test_blocks_are_read(text: str, blocks: object, tmp_path: Path) -> None:
    assert asked_blocks(text) == blocks
    settings = load_settings(flags={"swarm.blocks": text, "swarm.folder": tmp_path})
    with take_seat(settings) as seat:
        assert member_options(settings, seat).blocks == blocks


def test_loopback_is_known_from_what_others_reach() -> None:
    assert not reaches_beyond(("tls://127.0.0.1:7000", "tls://[::1]:7000"))
    assert reaches_beyond(("tls://127.0.0.1:7000", "tls://192.0.2.1:7000"))


def test_a_seat_listens_where_it_did_before_if_it_can(settings: Settings) -> None:
    def address() -> str:
        with take_seat(settings) as seat:
            return _listen_address(settings, seat)

    first = address()
    assert first.startswith("127.0.0.1:") and not first.endswith(":0")
    assert address() == first
    with socket.create_server(("127.0.0.1", int(first.rpartition(":")[2]))):
        assert address() != first
    with take_seat(settings), take_seat(settings) as second:
        assert _listen_address(settings, second) != address()


def test_a_port_that_was_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    asked = load_settings(flags={"swarm.folder": tmp_path, "swarm.listen": "0.0.0.0:7000"})
    with take_seat(asked) as seat:
        assert _listen_address(asked, seat) == "0.0.0.0:7000"


def make_iroh_node(folder: Path, **swarm: str) -> SwarmNode:
    flags = {f"swarm.{name}": value for name, value in swarm.items()}
    settings = load_settings(flags={"swarm.folder": folder, **flags})
    with take_seat(settings) as seat:
        return make_node(settings, seat, own_secret(settings), np.random.default_rng(0))


@pytest.mark.skipif(find_spec("iroh") is None, reason="iroh is not installed: pip install 'plait[iroh]'")
def test_a_machine_tells_both_of_its_addresses(tmp_path: Path) -> None:
    async def main() -> None:
        async with make_iroh_node(tmp_path, iroh_listen="127.0.0.1:0") as node:
            assert [address.partition("://")[0] for address in node.addresses] == ["tls", "iroh"]

    asyncio.run(main())


@pytest.mark.skipif(find_spec("iroh") is not None, reason="iroh is installed: pip uninstall iroh")
def test_iroh_that_is_not_installed_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"pip install 'plait\[iroh\]'"):
        make_iroh_node(tmp_path, iroh_listen="127.0.0.1:0")


def test_a_relay_without_iroh_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="with --iroh-listen only"):
        make_iroh_node(tmp_path, iroh_relay="https://relay.example")


def test_lending_is_off_unless_asked_for_and_then_as_the_settings_say() -> None:
    assert lending_limits(Settings()) is None
    asked = {"lending.policy": "plan", "lending.lend_fraction": 0.25, "lending.moved_tokens_per_step": 0}
    limits = lending_limits(load_settings(flags=asked))
    assert (
        limits is not None and limits.options.policy == "plan" and limits.options.moved_tokens_per_step == 0
    )
    assert limits.terms(100).lendable_blocks == 25 and limits.terms(100).keep_free_blocks == 5


def test_a_machine_without_blocks_lends_none() -> None:
    with pytest.raises(BadSetup, match="no KV memory to lend"):
        lending_limits(load_settings(flags={"lending.policy": "pull", "swarm.blocks": "none"}))
