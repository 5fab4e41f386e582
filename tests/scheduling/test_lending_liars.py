"""A member that says anything at all about loans: others compute right, keep their books, and get their blocks back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_lending_agents import PLAN, PULL, SIZES, Machine, World, peer_of

from plait.ids import PeerId
from plait.kvcache import LendingAction, LendingOptions, SendContent, WriteContent
from plait.wire import (
    BlockAsk,
    BlockContent,
    BlockGone,
    BlockStored,
    BlockTold,
    HomeOrder,
    LoanBeat,
    LoanBeatAsk,
    LoanBooking,
    LoanCandidates,
    LoanGrant,
    LoanKeep,
    LoanLost,
    LoanNo,
    LoanRecall,
    LoanRelease,
    LoanRenew,
    LoanReserve,
    LoanWant,
    MoveOrder,
    WireBlocks,
    WireLayerTimes,
    WirePlacement,
    YieldOrder,
)

KINDS = 18


class Liar:
    """Invents messages; what it has been told makes them likelier to matter."""

    def __init__(self, world: World, place: int, rng: np.random.Generator) -> None:
        self.peer = peer_of(place)
        self.world, self.rng = world, rng
        self.numbers = [0, 1]
        self.seen: list[tuple[int, int]] = [(0, 0)]

    def told(self, message: LoanBooking) -> None:
        """Remember what may be repeated."""
        match message:
            case LoanReserve(number, _) | LoanWant(number, _, _) | LoanGrant(number, _) | LoanNo(number, _):
                self.numbers.append(number)
            case BlockContent(kv_block, generation) | BlockAsk(kv_block, generation):
                self.seen.append((kv_block, generation))
            case _:
                pass
        if isinstance(message, LoanGrant):
            self.seen += zip(message.blocks.kv_blocks, message.blocks.generations, strict=True)

    def speak(self) -> None:
        """Say one thing to one machine."""
        machine = self._one(list(self.world.machines.values()))
        if not machine.alive:
            return
        message = self._invent()
        owners = machine.loans.book._loan_of
        lent = {kv_block for kv_block, (debtor, _) in owners.items() if debtor == self.peer}
        actions = machine.agent.on_message(self.peer, message, self.world.now_s)
        self._check_actions(message, actions, lent)
        machine.carry_out(actions, content=[-1] * 2)
        machine.check()

    def _check_actions(
        self, message: LoanBooking, actions: tuple[LendingAction, ...], lent: set[int]
    ) -> None:
        """What it writes is lent to it, or comes back from it; what it is told is lent to it."""
        for action in actions:
            match action:
                case WriteContent(kv_block) if not isinstance(message, BlockTold):
                    assert kv_block in lent, "a liar wrote over a block that was not lent to it"
                case SendContent(_, BlockTold(), kv_block):
                    assert kv_block in lent, "a liar read a block that was not lent to it"
                case _:
                    pass

    def _one(self, things: Sequence[Any]) -> Any:
        return things[int(self.rng.integers(len(things)))]

    def _blocks(self) -> WireBlocks:
        pairs = [self._pair() for _ in range(int(self.rng.integers(0, 6)))]
        return WireBlocks(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def _pair(self) -> tuple[int, int]:
        if self.rng.random() < 0.6:
            return self._one(self.seen)
        return int(self.rng.integers(0, 26)), int(self.rng.integers(0, 4)) + 10**6 * int(
            self.rng.integers(0, 2)
        )

    def _number(self) -> int:
        return self._one(self.numbers) if self.rng.random() < 0.8 else int(self.rng.integers(0, 2**50))

    def _peer(self) -> PeerId:
        return self._one([*self.world.machines, self.peer, peer_of(200)])

    def _invent(self) -> LoanBooking:
        number, pair, blocks, peer = self._number(), self._pair(), self._blocks(), self._peer()
        few, many = int(self.rng.integers(1, 6)), int(self.rng.integers(1, 16384))
        some = self._one([few, many])
        never, slow = WireLayerTimes(1, 0.0, 0.0, 0.0, 0.0), WireLayerTimes(4096, 1e6, 1e6, 0.0, 0.0)
        match int(self.rng.integers(KINDS)):
            case 0:
                return LoanBeat(
                    number=number, whole=bool(self.rng.integers(2)), kv_blocks=some, free_blocks=many,
                    lendable_blocks=many, spare_blocks=few, running=few, waiting=many, attended_tokens=many,
                    mean_request_tokens=float(few - 1), lent={peer: some}, borrowed={peer: few},
                    changes=(WirePlacement("r0", peer, some),), starving=self._one([None, -5, some]),
                    times=self._one([None, never, slow]),
                )  # fmt: skip
            case 1:
                return LoanBeatAsk(number)
            case 2:
                return LoanWant(number, some, {peer: 0.5})
            case 3:
                return LoanCandidates(number, (peer, self.peer))
            case 4:
                return LoanReserve(int(self.rng.integers(0, 2**40)), some)
            case 5:
                return LoanGrant(number, blocks)
            case 6:
                return LoanNo(number, some)
            case 7:
                return BlockContent(*pair)
            case 8:
                return BlockStored(*pair, accepted=bool(self.rng.integers(2)))
            case 9:
                return BlockAsk(*pair)
            case 10:
                return BlockTold(*pair)
            case 11:
                return BlockGone(*pair)
            case 12:
                return LoanRelease(blocks)
            case 13:
                return LoanRenew(blocks, number)
            case 14:
                return LoanLost(blocks)
            case 15:
                return LoanRecall(blocks, float(self._one([0.0, 1.0, 1e6])))
            case 16:
                return self._one([MoveOrder("r0", peer, some), LoanKeep(), YieldOrder()])
            case _:
                return HomeOrder(peer, some)


class WorldWithLiar(World):
    """Its liar speaks at every tenth of a second or so, and is a member of the group."""

    def __init__(self, seed: int, options: LendingOptions, sizes: list[tuple[int, int]], place: int) -> None:
        self.liar: Liar | None = None
        super().__init__(seed, options, sizes)
        self.liar = Liar(self, place, np.random.default_rng(seed + 1))
        group = [*self.machines, self.liar.peer]
        for machine in self.machines.values():
            machine.carry_out(machine.agent.set_group(group, {}, 0.0))

    def send(self, sender: Machine, peer: PeerId, message: LoanBooking, content: list[int] | None) -> None:
        if self.liar is not None and peer == self.liar.peer:
            self.liar.told(message)
        elif peer in self.machines:
            super().send(sender, peer, message, content)

    def run(self, seconds: float, havoc: bool = False) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            for _ in range(3 if self.liar is not None and havoc else 0):
                self.liar.speak()
            super().run(0.05)


# The liar has the smallest id, and so keeps the ledger, or the largest.
@pytest.mark.parametrize("place", [-1, 100], ids=["manager", "member"])
@pytest.mark.parametrize("options", [PULL, PLAN], ids=["pull", "plan"])
def test_nothing_that_a_member_says_of_loans_harms_the_others(options: LendingOptions, place: int) -> None:
    lie(3, options, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", [-1, 100], ids=["manager", "member"])
@pytest.mark.parametrize("options", [PULL, PLAN], ids=["pull", "plan"])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_a_member_often_says_harms_the_others(
    seed: int, options: LendingOptions, place: int
) -> None:
    lie(seed, options, place)


def lie(seed: int, options: LendingOptions, place: int) -> None:
    rng = np.random.default_rng(seed)
    world = WorldWithLiar(seed, options, SIZES, place)
    ask_some_of(world, rng)
    world.run(20.0, havoc=True)
    liar, world.liar = world.liar, None
    assert liar is not None
    for machine in world.machines.values():
        machine.carry_out(machine.agent.on_gone(liar.peer, world.now_s))
        machine.carry_out(machine.agent.set_group(list(world.machines), {}, world.now_s))
    world.settle()
    world.check_answers()


def ask_some_of(world: World, rng: np.random.Generator) -> None:
    for number in range(4):
        machine = world.machines[peer_of(int(rng.integers(3)))]
        prompt = rng.integers(0, 9, int(rng.integers(1, 20))).tolist()
        machine.ask(f"r{number}", prompt, len(prompt) + int(rng.integers(1, 50 - len(prompt))))
