"""Records spread to everybody, expire everywhere, and nobody can say anything in another one's name."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from plait.cluster import PeerRecord
from plait.ids import PeerId
from plait.simulator import run_virtual
from plait.transport import Identity, MemoryNet, Network, NetworkLimits, SwarmSecret, TicketPeer, Wire
from plait.wire import CloseSession, Digest, Gossip, RecordVersion, SignedRecord
from plait.worker import Membership, MembershipLimits

SECRET = SwarmSecret(bytes(range(32)))
START_UNIX_S = 1_800_000_000.0
LIMITS = MembershipLimits()


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "little"))


def record_of(owner: Identity, number: int, *, listens: bool = True, sessions: int = 0) -> PeerRecord:
    return PeerRecord(
        peer=owner.peer,
        name=f"machine {number}",
        model="tiny",
        first_block=0,
        end_block=2,
        addresses=(f"mem://{number}",) if listens else (),
        memory_bytes=sessions,
    )


class Machine:
    """One member with its membership; number 0 introduces all others."""

    def __init__(
        self,
        net: MemoryNet,
        number: int,
        *,
        listens: bool = True,
        clock_offset_s: float = 0.0,
        limits: MembershipLimits = LIMITS,
    ) -> None:
        def unix_now() -> float:
            return START_UNIX_S + asyncio.get_running_loop().time() + clock_offset_s

        self.number, self.listens = number, listens
        self.node = str(number)
        self.identity = identity(number + 1)
        self.network = Network(
            self.identity,
            secret=SECRET,
            carriers={"mem": net.carrier(self.node)},
            limits=NetworkLimits(),
            unix_now=unix_now,
        )
        first = identity(1).peer
        self.membership = Membership(
            self.network,
            self.identity,
            rng=np.random.default_rng(number),
            introducers=[] if number == 0 else [TicketPeer(first, ("mem://0",))],
            limits=limits,
            unix_now=unix_now,
        )
        self.changed: list[PeerId] = []
        self.membership.on_change = self.changed.append

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Machine"]:
        async with self.network:
            if self.listens:
                await self.network.listen(f"mem://{self.number}")
            async with self.membership:
                self.membership.announce(record_of(self.identity, self.number, listens=self.listens))
                yield self

    @property
    def peer(self) -> PeerId:
        return self.network.peer

    @property
    def present(self) -> set[PeerId]:
        return {record.peer for record in self.membership.records() if record.state != "offline"}

    def record(self, other: "Machine") -> PeerRecord:
        return next(record for record in self.membership.records() if record.peer == other.peer)


@asynccontextmanager
async def swarm(
    count: int, *, net: MemoryNet | None = None, without_address: Sequence[int] = ()
) -> AsyncIterator[tuple[MemoryNet, list[Machine]]]:
    net = net or MemoryNet(Wire(delay_s=0.02))
    async with AsyncExitStack() as stack:
        machines = [Machine(net, number, listens=number not in without_address) for number in range(count)]
        for machine in machines:
            await stack.enter_async_context(machine.running())
        yield net, machines


def everybody(machines: Sequence[Machine]) -> set[PeerId]:
    return {machine.peer for machine in machines}


@pytest.mark.parametrize("count", [2, 6, 25])
def test_everybody_soon_knows_everybody(count: int) -> None:
    async def main() -> None:
        async with swarm(count) as (_, machines):
            await asyncio.sleep(2 * LIMITS.digest_s)
            for machine in machines:
                assert machine.present == everybody(machines)
                assert len(machine.network.connected()) >= min(LIMITS.neighbours, count - 1)
                records = machine.membership.records()
                assert [record.peer for record in records] == sorted(record.peer for record in records)

    run_virtual(main())


def test_what_is_new_spreads_within_a_second() -> None:
    async def main() -> None:
        async with swarm(20) as (_, machines):
            await asyncio.sleep(30)
            for machine in machines:
                machine.changed.clear()
            speaker = machines[7]
            speaker.membership.announce(record_of(speaker.identity, 7, sessions=99))
            await asyncio.sleep(1)
            known = sum(machine.record(speaker).memory_bytes == 99 for machine in machines)
            assert known >= 18  # the others wait for a digest
            await asyncio.sleep(4 * LIMITS.digest_s)
            assert all(machine.record(speaker).memory_bytes == 99 for machine in machines)
            assert all(speaker.peer in machine.changed for machine in machines)

    run_virtual(main())


def test_records_are_issued_again_and_bring_round_trips() -> None:
    async def main() -> None:
        async with swarm(3) as (_, (first, second, third)):
            await asyncio.sleep(30)
            early = first.record(second)
            assert early.rtts_s.keys() == {first.peer, third.peer}
            assert early.rtts_s[first.peer] == pytest.approx(0.04, rel=0.1)
            await asyncio.sleep(10 * LIMITS.life_s)
            late = first.record(second)
            assert late.sequence > early.sequence
            assert late.expires_unix_s == late.issued_unix_s + LIMITS.life_s

    run_virtual(main())


def test_a_machine_that_leaves_says_so() -> None:
    async def main() -> None:
        net = MemoryNet()
        async with swarm(4, net=net) as (_, machines):
            async with Machine(net, 9).running() as leaving:
                await asyncio.sleep(10)
                assert leaving.peer in machines[2].present
            await asyncio.sleep(1)
            for machine in machines:
                assert machine.record(leaving).state == "offline"
            await asyncio.sleep(LIMITS.life_s + 2)
            for machine in machines:
                assert all(record.peer != leaving.peer for record in machine.membership.records())

    run_virtual(main())


def test_a_machine_that_dies_expires_everywhere_and_is_welcome_back() -> None:
    async def main() -> None:
        async with swarm(5) as (net, machines):
            await asyncio.sleep(10)
            dead, living = machines[3], [*machines[:3], machines[4]]
            net.freeze("3")
            await asyncio.sleep(LIMITS.life_s + LIMITS.announce_s)
            for machine in living:
                assert machine.present == everybody(living)
                assert dead.peer in machine.changed
            net.thaw("3")
            await asyncio.sleep(60)
            for machine in machines:
                assert machine.present == everybody(machines)

    run_virtual(main())


def test_halves_of_a_swarm_that_forgot_each_other_meet_again() -> None:
    async def main() -> None:
        async with swarm(8) as (net, machines):
            await asyncio.sleep(20)
            cut_off = {"4", "5", "6", "7"}  # without the one that introduced them
            net.partition(cut_off)
            await asyncio.sleep(2 * LIMITS.life_s)
            for machine in machines:
                half = [other for other in machines if (other.node in cut_off) == (machine.node in cut_off)]
                assert machine.present == everybody(half)
            net.heal(cut_off)
            await asyncio.sleep(90)
            for machine in machines:
                assert machine.present == everybody(machines)

    run_virtual(main())


def test_a_machine_that_only_iroh_reaches_also_names_those_that_carry_to_it() -> None:
    async def main() -> None:
        async with swarm(5, without_address=[4]) as (_, machines):
            await asyncio.sleep(20)
            hidden = machines[4]
            record = replace(
                hidden.record(hidden), addresses=("iroh://192.0.2.9:7001?relay=https://192.0.2.1",)
            )
            hidden.membership.announce(record)
            await asyncio.sleep(20)
            told = machines[1].record(hidden)
            assert told.addresses == record.addresses and told.through
            # Here nobody has iroh: the splice is left.
            await machines[1].network.connect(hidden.peer)

    run_virtual(main())


def test_machines_without_an_address_name_those_that_carry_to_them() -> None:
    async def main() -> None:
        async with swarm(6, without_address=[4, 5]) as (_, machines):
            await asyncio.sleep(20)
            hidden, other = machines[4], machines[5]
            record = machines[1].record(hidden)
            assert record.relayed and set(record.through) <= everybody(machines[:4])
            assert set(record.through) <= hidden.network.connected_directly()
            # They are reached, even by each other.
            heard: list[PeerId] = []
            hidden.network.on_message = lambda peer, message, tensors: heard.append(peer)
            message = CloseSession("ab" * 16, 1)  # type: ignore[arg-type]
            await other.network.send(hidden.peer, message)
            await machines[2].network.send(hidden.peer, message)
            await asyncio.sleep(1)
            assert sorted(heard) == sorted([other.peer, machines[2].peer])

    run_virtual(main())


def test_the_middle_of_a_hidden_machine_is_replaced_when_it_dies() -> None:
    async def main() -> None:
        async with swarm(5, without_address=[4]) as (net, machines):
            await asyncio.sleep(20)
            hidden = machines[4]
            through = machines[1].record(hidden).through
            dead = next(machine for machine in machines if machine.peer == through[0])
            net.kill(dead.node)
            await asyncio.sleep(10)
            seen = next(m for m in machines if m not in (dead, hidden)).record(hidden)
            assert seen.through and dead.peer not in seen.through

    run_virtual(main())


# -- liars ---------------------------------------------------------------------------------------------------


def signed(owner: Identity, record: PeerRecord) -> SignedRecord:
    body = msgspec.msgpack.encode(record)
    return SignedRecord(body, owner.sign(b"plait record\0" + body))


def valid(owner: Identity, **changes: object) -> PeerRecord:
    now_s = START_UNIX_S + asyncio.get_running_loop().time()
    record = record_of(owner, 77)
    return replace(record, **{"sequence": 1, "issued_unix_s": now_s, "expires_unix_s": now_s + 60, **changes})


@asynccontextmanager
async def liar() -> AsyncIterator[tuple[Network, Machine, Machine]]:
    """A member that says what it likes, and two honest ones."""
    net = MemoryNet()
    async with swarm(2, net=net) as (_, (first, second)):
        rogue = Network(identity(50), secret=SECRET, carriers={"mem": net.carrier("rogue")})
        async with rogue:
            rogue.learn(first.peer, ["mem://0"])
            await rogue.connect(first.peer)
            await asyncio.sleep(10)
            yield rogue, first, second


@pytest.mark.parametrize("lie", ["forged", "altered", "no record", "impossible"])
def test_a_record_that_its_peer_did_not_sign_cuts_off_who_passes_it_on(lie: str) -> None:
    async def main() -> None:
        async with liar() as (rogue, first, second):
            victim = identity(2)
            record = valid(victim, sequence=2**50, memory_bytes=666)
            match lie:
                case "forged":
                    wrong = signed(identity(50), record)
                case "altered":
                    good = signed(identity(51), valid(identity(51)))
                    wrong = SignedRecord(good.body.replace(b"machine 77", b"machine 78"), good.signature)
                case "no record":
                    wrong = signed(identity(50), valid(identity(50)))
                    wrong = SignedRecord(b"\x81" + wrong.body, wrong.signature)
                case _:
                    body = msgspec.msgpack.encode(valid(identity(50)))
                    body = body.replace(b"\xa9end_block\x02", b"\xa9end_block\xff")
                    wrong = SignedRecord(body, identity(50).sign(b"plait record\0" + body))
            await rogue.send(first.peer, Gossip((wrong,)))
            await asyncio.sleep(2)
            assert rogue.connected() == frozenset()
            assert first.record(second).memory_bytes == 0
            assert first.present == {first.peer, second.peer}
            assert first.network.connected() == {second.peer}

    run_virtual(main())


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_unix_s": START_UNIX_S - 1},
        {"issued_unix_s": START_UNIX_S + 1000, "expires_unix_s": START_UNIX_S + 1060},
        {"expires_unix_s": START_UNIX_S + 10**6},
    ],
)
def test_a_record_that_does_not_hold_now_is_not_kept(
    changes: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with liar() as (rogue, first, second):
            for _ in range(3):
                await rogue.send(first.peer, Gossip((signed(identity(50), valid(identity(50), **changes)),)))
            await asyncio.sleep(2)
            assert first.present == {first.peer, second.peer}
            assert rogue.peer in first.network.connected()  # a wrong clock is no lie

    run_virtual(main())
    clocks = [record for record in caplog.records if "its clock" in record.getMessage()]
    assert len(clocks) == (0 if changes["expires_unix_s"] > START_UNIX_S + 10**5 else 1)


def test_an_old_record_does_not_come_back() -> None:
    async def main() -> None:
        async with liar() as (rogue, first, _):
            author = identity(51)
            old = signed(author, valid(author, sequence=5, expires_unix_s=START_UNIX_S + 500))
            new = signed(author, valid(author, sequence=6, expires_unix_s=START_UNIX_S + 30))
            for record in (old, new, old):
                await rogue.send(first.peer, Gossip((record,)))
            await asyncio.sleep(1)
            assert [r.sequence for r in first.membership.records() if r.peer == author.peer] == [6]
            await asyncio.sleep(60)
            await rogue.send(first.peer, Gossip((old,)))
            await asyncio.sleep(1)
            assert author.peer not in first.present

    run_virtual(main())


def test_a_machine_outbids_its_own_earlier_life() -> None:
    async def main() -> None:
        async with liar() as (rogue, first, second):
            past = valid(second.identity, sequence=2**51, memory_bytes=666)
            await rogue.send(first.peer, Gossip((signed(second.identity, past),)))
            await asyncio.sleep(3)
            for machine in (first, second):
                assert machine.record(second).memory_bytes == 0
                assert machine.record(second).sequence > 2**51

    run_virtual(main())


def test_records_without_number_are_bounded() -> None:
    async def main() -> None:
        net = MemoryNet()
        first = Machine(net, 0, limits=replace(LIMITS, max_members=10))
        async with first.running():
            rogue = Network(identity(50), secret=SECRET, carriers={"mem": net.carrier("rogue")})
            async with rogue:
                rogue.learn(first.peer, ["mem://0"])
                crowd = [identity(number) for number in range(60, 90)]
                await rogue.send(first.peer, Gossip(tuple(signed(who, valid(who)) for who in crowd)))
                await asyncio.sleep(1)
                assert len(first.membership.records()) == 10
                await rogue.send(
                    first.peer, Digest(tuple(RecordVersion(who.peer, 2**40) for who in crowd), True)
                )
                await asyncio.sleep(1)
                assert rogue.connected() == {first.peer}

    run_virtual(main())


def test_two_clocks_that_disagree_are_named(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        net = MemoryNet()
        async with Machine(net, 0).running(), Machine(net, 1, clock_offset_s=120).running():
            await asyncio.sleep(60)

    run_virtual(main())
    lines = [record.getMessage() for record in caplog.records if "its clock" in record.getMessage()]
    assert 1 <= len(lines) <= 2 and "120 s" in lines[0]


def test_only_the_own_record_can_be_announced() -> None:
    async def main() -> None:
        net = MemoryNet()
        async with Machine(net, 0).running() as machine:
            with pytest.raises(ValueError, match="announced by"):
                machine.membership.announce(record_of(identity(9), 9))
            own = record_of(machine.identity, 0)
            with pytest.raises(ValueError, match="others accept"):
                machine.membership.announce(replace(own, addresses=("𝕏" * 256,) * 16))
            await asyncio.sleep(2 * LIMITS.announce_s)
            assert machine.record(machine).addresses == own.addresses

    run_virtual(main())


def test_nothing_is_left_behind() -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        async with swarm(4) as (_, _machines):
            await asyncio.sleep(10)
        await asyncio.sleep(1)
        assert asyncio.all_tasks() <= before

    run_virtual(main())
