"""Peers that repeat, reorder, corrupt and invent messages: the answer stays right, and who does it is cut off."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
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

from plait.ids import PeerId, SessionId
from plait.kernels import native_available
from plait.session import SamplingParams, to_wire_sampling
from plait.simulator import run_virtual
from plait.transport import Network
from plait.wire import (
    Buffer,
    ChainHop,
    CloseSession,
    Fault,
    Fence,
    Message,
    Opened,
    OpenSession,
    Refused,
    Resume,
    Step,
    Taken,
    Tokens,
)
from plait.worker.swarm_engine import SwarmOptions

DTYPE = "bfloat16" if native_available else "float64"  # a replay must give the same bits
TOKENS = 30
REQUEST = tiny_request("x", some_prompt(600, 1), TOKENS, temperature=1.0, seed=4)
SPANS = {**cut_at(2, 4), "B": range(2, 4)}

Sent = tuple[PeerId, Message, Sequence[Buffer]]


class TamperingNetwork(Network):
    """A network whose owner does not send what it should: `tamper` makes other messages of each."""

    tamper: Callable[[Sent], list[Sent]] = staticmethod(lambda sent: [sent])  # type: ignore[assignment]

    async def send(
        self,
        peer: PeerId,
        message: Message,
        tensors: Sequence[Buffer] = (),
        *,
        timeout_s: float | None = None,
    ) -> None:
        for other in self.tamper((peer, message, tensors)):
            await super().send(*other, timeout_s=timeout_s)

    def try_send(self, peer: PeerId, message: Message, tensors: Sequence[Buffer] = ()) -> bool:
        return False


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return on_one_machine([REQUEST], DTYPE)["x"].token_ids[0]


async def with_tampering(
    name: str, tamper: Callable[[Sent], list[Sent]], expected: list[int], *, drafts: int = 0
) -> tuple[SwarmRig, set[str]]:
    """Ask while one worker tampers; returns who was cut off by anybody."""
    spans = {other: blocks for other, blocks in SPANS.items() if other not in (name, "B")}
    async with swarm(spans, dtype=DTYPE, options=SwarmOptions(draft_tokens=drafts)) as rig:
        host = await rig.add(name, SPANS[name], network_class=TamperingNetwork)
        assert isinstance(host.network, TamperingNetwork)
        host.network.tamper = tamper  # type: ignore[method-assign]
        answer = Answer()
        asking = asyncio.create_task(rig.ask(REQUEST, answer))
        while not rig.gateway.chains() or len(rig.chain()) < 3:
            await asyncio.sleep(0)
        for spare, blocks in SPANS.items():
            if blocks == SPANS[name] and spare != name:
                await rig.add(spare, blocks)
        await rig.add("C" if name != "C" else "D", SPANS["c"])
        await rig.add("A" if name != "A" else "D", SPANS["a"])
        await asking
        assert answer.token_ids[0] == expected
        await rig.settle()
        cut_off = {
            other
            for other, known in rig.hosts.items()
            for network in [rig.gateway_network, *(each.network for each in rig.hosts.values())]
            if network._peers.get(known.peer) is not None
            and network._peers[known.peer].banned_until_s > asyncio.get_running_loop().time()
        }
        rig.check_all_free()
        return rig, cut_off


def test_messages_that_come_twice_are_executed_once(expected: list[int]) -> None:
    for name in "abc":
        for drafts in (0, 4):
            rig, cut_off = run_virtual(
                with_tampering(name, lambda sent: [sent, sent], expected, drafts=drafts)
            )
            assert not cut_off
            assert not rig.gateway.counts().recoveries_total
            if not drafts:
                once = 600 + TOKENS - 1
                assert all(rig.hosts[hop].worker.block_tokens_total == 2 * once for hop in "abc")


def test_old_messages_that_come_again_later_change_nothing(expected: list[int]) -> None:
    for name in "abc":
        rng = np.random.default_rng(3)
        old: list[Sent] = []

        def again(sent: Sent, rng: np.random.Generator = rng, old: list[Sent] = old) -> list[Sent]:
            old.append(sent)
            late = [old[int(rng.integers(len(old)))]] if rng.random() < 0.3 else []
            return [*late, sent]

        rig, cut_off = run_virtual(with_tampering(name, again, expected, drafts=3))
        assert not cut_off
        assert not rig.gateway.counts().recoveries_total


def test_messages_in_the_wrong_order_or_missing_are_noticed(expected: list[int]) -> None:
    for lose in (False, True):
        held: list[Sent] = []

        def swap(sent: Sent, lose: bool = lose, held: list[Sent] = held) -> list[Sent]:
            if isinstance(sent[1], Step) and sent[1].number == 2 and sent[1].epoch == 1:
                held.append(sent)
                return []
            out = [sent, *held] if held and not lose else [sent]
            held.clear()
            return out

        rig, _ = run_virtual(with_tampering("b", swap, expected))
        assert rig.gateway.counts().recoveries_total >= 1


def bad_steps() -> dict[str, Callable[[Step, Sequence[Buffer]], tuple[Step, Sequence[Buffer]]]]:
    replace = msgspec.structs.replace

    def with_rows(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tuple[Step, Sequence[Buffer]]]:
        def changed(step: Step, tensors: Sequence[Buffer]) -> tuple[Step, Sequence[Buffer]]:
            rows = np.frombuffer(tensors[0], np.float32).reshape(len(step.token_ids), -1).copy()
            return step, (change(rows).astype(np.float32).tobytes(),)

        return changed

    def nan(rows: np.ndarray) -> np.ndarray:
        rows[-1, 3] = np.nan
        return rows

    def infinite(rows: np.ndarray) -> np.ndarray:
        rows[0, 0] = np.inf
        return rows

    return {
        "nan": with_rows(nan),
        "infinity": with_rows(infinite),
        "a row too few": with_rows(lambda rows: rows[:-1]),
        "a column too many": with_rows(lambda rows: np.pad(rows, ((0, 0), (0, 1)))),
        "no tensor": lambda step, tensors: (step, ()),
        "two tensors": lambda step, tensors: (step, (*tensors, *tensors)),
        "a gap": lambda step, tensors: (replace(step, start=step.start + 1), tensors),
        "too far": lambda step, tensors: (replace(step, start=600 + TOKENS), tensors),
        "taken back": lambda step, tensors: (replace(step, start=0), tensors),
        "no such token": lambda step, tensors: (
            replace(step, token_ids=(10**6, *step.token_ids[1:])),
            tensors,
        ),
        "more samples than inputs": lambda step, tensors: (replace(step, sample_rows=33), tensors),
        "drafts without samples": lambda step, tensors: (replace(step, draft_tokens=3), tensors),
    }


@pytest.mark.parametrize("how", bad_steps())
def test_a_hop_that_sends_nonsense_is_cut_off_and_the_answer_stays_right(
    how: str, expected: list[int]
) -> None:
    change = bad_steps()[how]

    def tamper(sent: Sent) -> list[Sent]:
        peer, message, tensors = sent
        if isinstance(message, Step) and message.start > 600 + 5:
            return [(peer, *change(message, tensors))]
        return [sent]

    rig, cut_off = run_virtual(with_tampering("b", tamper, expected))
    assert cut_off == {"b"}
    assert rig.gateway.counts().recoveries_total >= 1


def test_a_last_hop_that_sends_impossible_tokens_is_cut_off(expected: list[int]) -> None:
    replace = msgspec.structs.replace
    lies: list[Callable[[Tokens], Tokens]] = [
        lambda tokens: replace(tokens, position=tokens.position + 1),
        lambda tokens: replace(tokens, token_ids=tokens.token_ids * 2),
        lambda tokens: replace(tokens, token_ids=(10**6,)),
        lambda tokens: replace(tokens, finished="stop"),
        lambda tokens: replace(tokens, reports=()),
    ]
    for lie in lies:

        def tamper(sent: Sent, lie: Callable[[Tokens], Tokens] = lie) -> list[Sent]:
            peer, message, tensors = sent
            if isinstance(message, Tokens) and message.position == 610:
                return [(peer, lie(message), tensors)]
            return [sent]

        _, cut_off = run_virtual(with_tampering("c", tamper, expected))
        assert cut_off == {"c"}


def forged(session: SessionId, epoch: int, own: PeerId, worker: PeerId) -> list[Message]:
    """What somebody who has no part in a session may try."""
    hops = (ChainHop(worker, 2, 4),)
    sampling = to_wire_sampling(SamplingParams(), seed=1, sample_index=0, end_token_ids=())
    opening = OpenSession(
        session=session,
        epoch=epoch + 1,
        index=0,
        hops=hops,
        model=tiny_model().fingerprint,
        prompt_tokens=3,
        max_tokens=9,
        wire_format="float32",
        sampling=sampling,
        draft_tokens=0,
        arrived_unix_s=0.0,
        held=False,
    )
    return [
        Step(session, epoch, 10**6, 0, (5,), 1, 0),
        Tokens(session, epoch, 10**6, 700, (5,), None, ""),
        Taken(session, epoch, 10),
        Fence(session, epoch + 1, 5, 6),
        Resume(session, epoch, 0, hops, 5, 0, 0),
        CloseSession(session, epoch + 5),
        opening,
        Fault(session, epoch, worker, "misbehaved", "so they say"),
        Refused(session, epoch, "no_capacity", "no"),
    ]


def test_somebody_without_a_part_in_a_session_cannot_disturb_it(expected: list[int]) -> None:
    async def main() -> None:
        for number in range(9):
            async with swarm(cut_at(2, 4), dtype=DTYPE) as rig:
                identity = identity_of(f"stranger {number}")
                stranger = Network(
                    identity,
                    secret=SECRET,
                    carriers=rig.carriers("stranger", identity),
                    unix_now=lambda: UNIX_NOW_S,
                )
                async with stranger:
                    answer = Answer()
                    asking = asyncio.create_task(rig.ask(REQUEST, answer))
                    while answer.deltas < 5:
                        await asyncio.sleep(0)
                    session = next(iter(rig.gateway.chains()))
                    targets = [host.network for host in rig.hosts.values()] + [rig.gateway_network]
                    for target, name in zip(targets, [*rig.hosts, "gateway"], strict=True):
                        stranger.learn(target.peer, [rig.address(name)])
                        message = forged(session, 1, stranger.peer, target.peer)[number]
                        await stranger.send(target.peer, message)
                    await asking
                    assert answer.token_ids[0] == expected
                    assert not rig.gateway.counts().recoveries_total
                    await rig.settle()
                    rig.check_all_free()

    run_virtual(main())


def test_a_worker_refuses_what_it_does_not_serve() -> None:
    async def main() -> None:
        async with swarm(cut_at(3)) as rig:
            identity = identity_of("asker")
            asker = Network(
                identity,
                secret=SECRET,
                carriers=rig.carriers("asker", identity),
                unix_now=lambda: UNIX_NOW_S,
            )
            heard: list[Message] = []
            asker.on_message = lambda peer, message, tensors: heard.append(message)
            worker = rig.hosts["a"]
            good = forged(SessionId("a" * 32), 0, asker.peer, worker.peer)[6]
            assert isinstance(good, OpenSession)
            replace = msgspec.structs.replace
            own = ChainHop(worker.peer, 0, 3)
            good = replace(good, hops=(own, ChainHop(rig.hosts["b"].peer, 3, 6)), sampling=None)
            wrong = {
                "not_served": [
                    replace(good, model="another"),
                    replace(good, hops=(ChainHop(worker.peer, 0, 5),)),
                    replace(good, hops=(ChainHop(asker.peer, 0, 3),)),
                    replace(good, index=7),
                ],
                "bad_request": [
                    replace(good, hops=(ChainHop(worker.peer, 0, 2),)),
                    replace(good, hops=(ChainHop(worker.peer, 1, 3), ChainHop(asker.peer, 3, 6))),
                    replace(good, max_tokens=10**6),
                    replace(good, prompt_tokens=9),
                    replace(good, prompt_tokens=0),
                ],
                "unknown_session": [Fence(good.session, 3, 1, 5)],
            }
            async with asker:
                asker.learn(worker.peer, [rig.address("a")])
                for code, messages in wrong.items():
                    for message in messages:
                        await asker.send(worker.peer, message)
                        while not heard:
                            await asyncio.sleep(0.01)
                        refused = heard.pop()
                        assert isinstance(refused, Refused)
                        assert refused.code == code, refused
                await asker.send(worker.peer, good)
                while not heard:
                    await asyncio.sleep(0.01)
                assert isinstance(heard.pop(), Opened)
                assert worker.worker.sessions == 1
                await asyncio.sleep(299)
                assert worker.worker.sessions == 1
                await asyncio.sleep(30)
                assert not worker.worker.sessions, "nobody spoke of it"
                worker.worker.drain()
                good = replace(good, session=SessionId("b" * 32))
                await asker.send(worker.peer, good)
                while not heard:
                    await asyncio.sleep(0.01)
                assert isinstance(heard[0], Refused)
                assert heard[0].code == "no_capacity"
            rig.check_all_free()

    run_virtual(main())
