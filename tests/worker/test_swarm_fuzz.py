"""Members that make up messages of sessions: whatever they send, answers stay right or end with a named error.

`pytest -m slow tests/worker/test_swarm_fuzz.py` goes on for ten minutes and more.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_rig import (
    SECRET,
    UNIX_NOW_S,
    Answer,
    SwarmRig,
    cut_at,
    identity_of,
    on_one_machine,
    some_prompt,
    swarm,
    tiny_model,
    tiny_request,
)
from test_swarm_abuse import TamperingNetwork

from plait.errors import ServingError
from plait.ids import PeerId, SessionId
from plait.kernels import native_available
from plait.session import SamplingParams, to_wire_sampling
from plait.simulator import run_virtual
from plait.transport import MemoryNet, Network, Wire
from plait.wire import (
    Buffer,
    ChainHop,
    CloseSession,
    Fault,
    Fence,
    Fenced,
    Message,
    Opened,
    OpenSession,
    Refused,
    Resume,
    Step,
    Taken,
    Tokens,
)
from plait.wire.session_messages import FaultCode, RefusalCode, WireSampling
from plait.worker.swarm_engine import SwarmOptions

DTYPE = "bfloat16" if native_available else "float64"  # a replay must give the same bits
PROMPT_TOKENS, TOKENS = 40, 12
REQUEST = tiny_request("x", some_prompt(PROMPT_TOKENS, 1), TOKENS, temperature=1.0, seed=4)
NAMES = ("a", "b", "c", "gateway", "rogue")
OWN_SESSION = SessionId("0" * 32)
HIDDEN = 256
LONGEST_WAIT_S = 600.0
"""An answer that takes longer, on the virtual clock, hangs."""


@cache
def expected() -> list[int]:
    return on_one_machine([REQUEST], DTYPE)["x"].token_ids[0]


def peer_of(name: str) -> PeerId:
    return identity_of(name).peer


# Fields are drawn near what is right, so that messages get past the first checks.
epochs = st.integers(1, 4)
numbers = st.one_of(st.integers(1, 6), st.just(2**40))
positions = st.one_of(
    st.integers(0, 6), st.integers(PROMPT_TOKENS - 2, PROMPT_TOKENS + TOKENS + 2), st.just(2**20)
)
token_ids = st.one_of(st.integers(0, 9), st.just(2**31 - 1))
peers = st.sampled_from(NAMES).map(peer_of)
hops = st.one_of(
    st.permutations(["a", "b", "c"]).map(
        lambda names: tuple(
            ChainHop(peer_of(name), 2 * place, 2 * place + 2) for place, name in enumerate(names)
        )
    ),
    st.lists(st.builds(ChainHop, peers, st.integers(0, 6), st.integers(0, 7)), min_size=1, max_size=4).map(
        tuple
    ),
)


def greedy(**wrong: float) -> WireSampling:
    sampling = to_wire_sampling(SamplingParams(temperature=0.0), seed=0, sample_index=0, end_token_ids=())
    return msgspec.structs.replace(sampling, **wrong)


sampling = st.sampled_from([None, greedy(), greedy(temperature=1.0), greedy(top_p=float("nan"))])
sessions = st.just(OWN_SESSION)
made_up: dict[type, st.SearchStrategy[Any]] = {
    OpenSession: st.builds(
        OpenSession,
        session=sessions,
        epoch=epochs,
        index=st.integers(0, 3),
        hops=hops,
        model=st.sampled_from([tiny_model().fingerprint, "another"]),
        prompt_tokens=positions,
        max_tokens=positions,
        wire_format=st.sampled_from(["float32", "bfloat16", "int8"]),
        sampling=sampling,
        draft_tokens=st.integers(0, 32),
        arrived_unix_s=st.sampled_from([0.0, UNIX_NOW_S]),
        held=st.booleans(),
    ),
    Opened: st.builds(Opened, sessions, epochs),
    Refused: st.builds(Refused, sessions, epochs, st.sampled_from(get_args(RefusalCode)), st.just("no")),
    Step: st.builds(
        Step,
        sessions,
        epochs,
        numbers,
        positions,
        st.lists(token_ids, min_size=1, max_size=50).map(tuple),
        st.integers(0, 33),
        st.integers(0, 32),
    ),
    Taken: st.builds(Taken, sessions, epochs, positions),
    Tokens: st.builds(
        Tokens,
        sessions,
        epochs,
        numbers,
        positions,
        st.lists(token_ids, min_size=1, max_size=3).map(tuple),
        st.one_of(st.none(), st.just(())),
        st.sampled_from(["", "stop", "length"]),
    ),
    Fence: st.builds(Fence, sessions, epochs, positions, token_ids),
    Fenced: st.builds(Fenced, sessions, epochs, positions, positions),
    Resume: st.builds(Resume, sessions, epochs, st.integers(0, 3), hops, positions, positions, positions),
    Fault: st.builds(
        Fault, sessions, epochs, peers, st.sampled_from(get_args(FaultCode)), st.just("so they say")
    ),
    CloseSession: st.builds(CloseSession, sessions, epochs),
}
tensors = st.sampled_from(["none", "right", "nan", "short", "two"])


@dataclass(frozen=True, slots=True)
class Act:
    """What the rogue sends to whom, for a session of its own or for the one that runs, and how long it waits after."""

    target: str
    message: Message
    tensors: str
    of_running_session: bool
    wait_s: float


acts = st.lists(
    st.builds(
        Act,
        st.sampled_from(NAMES[:4]),
        st.one_of(*made_up.values()),
        tensors,
        st.booleans(),
        st.sampled_from([0.0, 0.0, 0.01, 0.05, 3.0, 40.0]),
    ),
    min_size=1,
    max_size=30,
)


def buffers(how: str, rows: int) -> tuple[Buffer, ...]:
    hidden = np.zeros((rows, HIDDEN), np.float32)
    match how:
        case "right":
            return (hidden.tobytes(),)
        case "nan":
            return ((hidden + np.nan).tobytes(),)
        case "short":
            return (hidden.tobytes()[:-4],)
        case "two":
            return (hidden.tobytes(), hidden.tobytes())
        case _:
            return ()


def slow_wires() -> SwarmRig:
    """Links of 10 ms, so that the answer is still under way while messages come."""
    return SwarmRig(MemoryNet(Wire(delay_s=0.01)), dtype=DTYPE)


async def ends_right(rig: SwarmRig, asking: "asyncio.Task[Answer]") -> bool:
    """Wait for the answer: true if it came whole, false if an error with a name ended it."""
    async with asyncio.timeout(LONGEST_WAIT_S):
        try:
            answer = await asking
        except ServingError as error:
            assert str(error)
            return False
    assert answer.token_ids[0] == expected()
    return True


async def _outlive(script: list[Act]) -> None:
    async with swarm(cut_at(2, 4), rig=slow_wires()) as rig:
        rogue = Network(
            identity_of("rogue"),
            secret=SECRET,
            carriers=rig.carriers("rogue", identity_of("rogue")),
            unix_now=lambda: UNIX_NOW_S,
        )
        async with rogue:
            for name in NAMES[:4]:
                rogue.learn(peer_of(name), [rig.address(name)])
            asking = asyncio.create_task(rig.ask(REQUEST))
            while not rig.gateway.chains():
                await asyncio.sleep(0)
            running = next(iter(rig.gateway.chains()))
            await asyncio.sleep(0.015)  # nobody can name a session before its machines know it
            for act in script:
                message = act.message
                if act.of_running_session:
                    message = msgspec.structs.replace(message, session=running)  # type: ignore[type-var]
                rows = len(message.token_ids) if isinstance(message, Step) else 1
                with suppress(ServingError):  # it was cut off
                    await rogue.send(peer_of(act.target), message, buffers(act.tensors, rows), timeout_s=1)
                await asyncio.sleep(act.wait_s)
            assert await ends_right(rig, asking), "a stranger ended somebody's answer"
            again = asyncio.create_task(rig.ask(REQUEST))
            assert await ends_right(rig, again)
        async with asyncio.timeout(LONGEST_WAIT_S):
            await rig.settle()
        rig.check_all_free()


@settings(max_examples=25)
@given(acts)
def test_no_member_can_disturb_others_by_messages_it_makes_up(script: list[Act]) -> None:
    run_virtual(_outlive(script))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000)
@given(acts)
def test_no_member_can_disturb_others_for_long(script: list[Act]) -> None:
    run_virtual(_outlive(script))


Sent = tuple[PeerId, Message, Sequence[Buffer]]


def _spoil(how: str, sent: Sent, held: list[Sent]) -> list[Sent]:
    """What a hop sends instead of a message; not wrong values that are possible: members are trusted to compute."""
    peer, message, data = sent
    if how == "drop":
        return []
    if how == "twice":
        return [sent, sent]
    if how == "later":
        held.append(sent)
        return []
    if how == "release":
        late = list(held)
        held.clear()
        return [sent, *late]
    if not isinstance(message, Step):
        return [sent]
    what, value = how.split()
    if what == "tensor":
        return [(peer, message, buffers(value, len(message.token_ids)))]
    if what == "token_ids":
        return [(peer, msgspec.structs.replace(message, token_ids=message.token_ids[:-1] or (10**6,)), data)]
    changed = max(0, getattr(message, what) + int(value))
    return [(peer, msgspec.structs.replace(message, **{what: changed}), data)]


spoilt = st.dictionaries(
    st.integers(0, 40),
    st.sampled_from(
        [
            *("drop", "twice", "later", "release", "tensor nan", "tensor short", "tensor none", "tensor two"),
            *("start 1", "start -1", "number 1", "number -1", "epoch 1", "epoch -1", "token_ids fewer"),
            *("sample_rows 1", "sample_rows -1", "draft_tokens 1"),
        ]
    ),
    min_size=1,
    max_size=8,
)


async def _with_spoilt(where: dict[int, str], drafts: int, spare: bool) -> None:
    sent_so_far = 0
    held: list[Sent] = []

    def tamper(sent: Sent) -> list[Sent]:
        nonlocal sent_so_far
        sent_so_far += 1
        how = where.get(sent_so_far - 1)
        return _spoil(how, sent, held) if how else [sent]

    spans = {name: blocks for name, blocks in cut_at(2, 4).items() if name != "b"}
    options = SwarmOptions(draft_tokens=drafts)
    async with swarm(spans, options=options, rig=slow_wires()) as rig:
        host = await rig.add("b", range(2, 4), network_class=TamperingNetwork)
        assert isinstance(host.network, TamperingNetwork)
        host.network.tamper = tamper  # type: ignore[method-assign]
        asking = asyncio.create_task(rig.ask(REQUEST))
        while not rig.gateway.chains() or len(rig.chain()) < 3:
            await asyncio.sleep(0)
        if spare:
            await rig.add("B", range(2, 4))
        await ends_right(rig, asking)
        async with asyncio.timeout(LONGEST_WAIT_S):
            await rig.settle()
        rig.check_all_free()


@settings(max_examples=25)
@given(spoilt, st.sampled_from([0, 3]), st.booleans())
def test_a_hop_that_spoils_messages_changes_no_answer(
    where: dict[int, str], drafts: int, spare: bool
) -> None:
    run_virtual(_with_spoilt(where, drafts, spare))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=2000)
@given(spoilt, st.sampled_from([0, 3]), st.booleans())
def test_a_hop_that_spoils_messages_for_long_changes_no_answer(
    where: dict[int, str], drafts: int, spare: bool
) -> None:
    run_virtual(_with_spoilt(where, drafts, spare))
