"""A member that sends anything: whatever it is, the others go on.

The slow version is for hours: `pytest -m slow tests/transport/test_fuzz.py --hypothesis-seed=random`.
"""

import asyncio
from dataclasses import replace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import SECRET, UNIX_NOW_S, Member, identity

from plait.errors import ServingError
from plait.simulator import run_virtual
from plait.transport import Link, MemoryNet, NetworkLimits
from plait.transport.handshake import greet
from plait.wire import Message, encode_frame
from plait.worker import Membership

LIMITS = replace(NetworkLimits(), credit_bytes=1 << 18, max_frame_bytes=1 << 17, max_header_bytes=1 << 14)
TAGS = [kind.__struct_config__.tag for kind in get_args(Message)]
PEERS = [identity(number).peer for number in (1, 2, 66, 9)]

small_ids = st.integers(0, 6)
field = st.one_of(
    small_ids,
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from(PEERS),
    st.sampled_from(["ab" * 16, "", "a" * 400]),
    st.binary(max_size=80),
    st.sampled_from([bytes(32), bytes(64)]),
    st.booleans(),
    st.none(),
    st.floats(),
    st.text(max_size=20),
)
nested = st.recursive(field, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
messages = st.builds(
    lambda tag, fields: msgspec.msgpack.encode([tag, *fields]),
    st.sampled_from(TAGS),
    st.lists(nested, max_size=7),
)
headers = st.one_of(messages, st.binary(max_size=60))
frames = st.builds(
    lambda header, buffers: b"".join(encode_frame(header, buffers)),
    headers,
    st.lists(st.one_of(st.binary(max_size=50), st.just(bytes(70_000))), max_size=2),
)
broken = st.builds(
    lambda frame, place, byte: frame[: place % len(frame)] + byte + frame[place % len(frame) :],
    frames,
    st.integers(0),
    st.binary(min_size=1, max_size=3),
)
acts = st.lists(
    st.one_of(
        frames,
        frames,
        frames,
        broken,
        st.binary(max_size=40),
        st.sampled_from(["wait", "long wait", "again"]),
    ),
    min_size=1,
    max_size=25,
)


async def _survive(script: list[bytes | str], introduced: bool) -> None:
    net = MemoryNet()
    victim, witness = (Member(identity(n), {"mem": net.carrier(str(n))}, limits=LIMITS) for n in (1, 2))
    member = Membership(
        victim.network, victim.identity, rng=np.random.default_rng(0), unix_now=lambda: UNIX_NOW_S
    )
    async with victim.network, witness.network, member:
        await victim.network.listen("mem://1")
        witness.network.learn(victim.peer, ["mem://1"])
        await witness.tell(victim, 1)
        rogues = 0

        async def rogue() -> Link:
            nonlocal rogues
            rogues += 1
            link = await net.carrier(f"rogue {rogues}").dial("mem://1", peer=victim.peer, timeout_s=5)
            if introduced:
                await greet(
                    link,
                    victim.peer,
                    identity=identity(66 + rogues),
                    secret=SECRET,
                    incarnation=bytes(32),
                    last_link=bytes(32),
                )
                link.limits = LIMITS.frames
            return link

        link = await rogue()
        for act in script:
            match act:
                case "wait":
                    await asyncio.sleep(0.3)
                case "long wait":
                    await asyncio.sleep(4)
                case "again":
                    link = await rogue()
                case _:
                    if link._transport is not None and not link.closed:
                        link._transport.write(act)  # type: ignore[arg-type]
        await asyncio.sleep(1)
        before = len(victim.heard)
        await witness.tell(victim, 2)
        await victim.hears(before + 1)
        assert witness.lost == [] and witness.peer in victim.network.connected()
        await asyncio.sleep(10)
        assert not victim.network._doorkeeper.strangers
        assert victim.network.connected() == {witness.peer}  # the rogue never answers a ping
        assert not victim.network._splices._carried and not victim.network._splices._ends


def survive(script: list[Any], introduced: bool) -> None:
    try:
        run_virtual(_survive(script, introduced))
    except ServingError as error:
        raise AssertionError(f"somebody else was hit: {error}") from error


@settings(max_examples=60)
@given(acts, st.booleans())
def test_whatever_one_sends_the_others_go_on(script: list[bytes | str], introduced: bool) -> None:
    survive(script, introduced)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=5000)
@given(acts, st.booleans())
def test_whatever_one_sends_for_long_the_others_go_on(script: list[bytes | str], introduced: bool) -> None:
    survive(script, introduced)
