"""Who gets in: members, and holders of a ticket until it expires; nobody else, and those learn nothing."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rigs import KINDS, MESSAGE, QUICK, SECRET, UNIX_NOW_S, Member, Rig, identity

from plait.errors import PeerLost
from plait.simulator import run_virtual
from plait.transport import (
    Carrier,
    Identity,
    Link,
    MemoryNet,
    SwarmSecret,
    TcpCarrier,
    Ticket,
    TicketPeer,
    TlsCarrier,
)
from plait.transport.handshake import greet
from plait.transport.identity import peer_of
from plait.wire import Challenge, Frame, Goodbye, Hello, Proof, Welcome, decode_message, encode_message

FOREIGN = SwarmSecret(b"f" * 32)
LIMITS = replace(QUICK, dial_timeout_s=20.0, handshake_timeout_s=20.0, ban_s=1.0)


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return Rig(request.param, tmp_path)


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "refused a link" in record.getMessage()]


def carriers(rig: Rig, owner: Identity, secret: object, node: str) -> dict[str, Carrier]:
    scheme = rig.address.partition("://")[0]
    match rig.kind:
        case "memory":
            return {scheme: rig.net.carrier(node)}
        case "tls":
            return {scheme: TlsCarrier(owner, secret)}  # type: ignore[arg-type]
        case _:
            return {scheme: rig.carrier(owner)}


async def refused(rig: Rig, secret: object, *, times: int = 1) -> str:
    """Let somebody with this secret try to reach a member; returns the reason that it is given."""
    stranger = Member(
        identity(7),
        carriers(rig, identity(7), secret, "stranger"),
        secret=secret,  # type: ignore[arg-type]
        limits=LIMITS,
    )
    async with rig.members(LIMITS) as (near, far), stranger.network:
        stranger.network.learn(far.peer, near.network._peers[far.peer].addresses)
        reason = ""
        for _ in range(times):
            with pytest.raises(PeerLost) as error:
                await stranger.tell(far, 1)
            reason = error.value.message
            await asyncio.sleep(LIMITS.longest_backoff_s * 1.3)
        await near.tell(far, 2)
        await far.hears(1)
        assert far.numbers == [2] and far.linked == [near.peer] and stranger.linked == []
        assert stranger.network.secret == secret
    return reason


def test_another_swarms_secret_is_refused_and_logged_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        reason = await refused(rig, FOREIGN, times=3)
        assert SECRET.swarm not in reason

    rig.run(main())
    assert len(refusals(caplog)) == 1
    for secret in (SECRET.key, SECRET.door, FOREIGN.key, FOREIGN.door):
        assert secret.hex() not in caplog.text


def test_a_ticket_lets_in_once_and_for_all(rig: Rig) -> None:
    async def main() -> None:
        issued = Ticket.issue(SECRET, [TicketPeer(identity(2).peer)], expires_unix_s=UNIX_NOW_S + 5)
        ticket = Ticket.parse(issued.text, unix_now_s=UNIX_NOW_S)
        now_s = UNIX_NOW_S
        newcomer = Member(
            identity(7),
            carriers(rig, identity(7), ticket.secret, "newcomer"),
            secret=ticket.secret,
            limits=LIMITS,
        )
        async with rig.members(LIMITS) as (near, far), newcomer.network:
            far.network._credentials.unix_now = near.network._credentials.unix_now = lambda: now_s
            addresses = near.network._peers[far.peer].addresses
            newcomer.network.learn(far.peer, addresses)
            await newcomer.tell(far, 1)
            await far.tell(newcomer, 2)
            await asyncio.gather(far.hears(1), newcomer.hears(1))
            assert newcomer.network.secret == SECRET
            now_s += 10  # the ticket has expired, its holder is a member
            newcomer.connection(far).link.abort()
            await asyncio.sleep(0.1)
            await newcomer.tell(far, 3)
            await far.hears(2)

    rig.run(main())


def test_an_expired_ticket_is_refused_by_the_acceptor(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    expired = SECRET.for_ticket(int(UNIX_NOW_S) - 1)
    rig.run(refused(rig, expired, times=2))
    assert len(refusals(caplog)) == 1 and "expired" in refusals(caplog)[0]


def test_a_ticket_whose_expiry_was_changed_is_refused(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    expired = SECRET.for_ticket(int(UNIX_NOW_S) - 1)
    forged = replace(expired, expires_unix_s=int(UNIX_NOW_S) + 3600)
    rig.run(refused(rig, forged))
    assert len(refusals(caplog)) == 1 and "does not know the secret" in refusals(caplog)[0]


def test_a_newcomer_lets_nobody_in_before_it_is_in_itself(rig: Rig) -> None:
    ticket = SECRET.for_ticket(int(UNIX_NOW_S) + 3600)

    async def main() -> None:
        async with rig.members(LIMITS) as (near, far):
            far.network._credentials.secret = ticket
            with pytest.raises(PeerLost):
                await near.tell(far, 1)
            assert far.linked == []

    rig.run(main())


def test_another_identity_at_the_address_is_refused_by_the_dialler(rig: Rig) -> None:
    async def main() -> None:
        async with rig.members(LIMITS) as (near, far):
            expected = identity(5).peer
            near.network.learn(expected, near.network._peers[far.peer].addresses)
            with pytest.raises(PeerLost):
                await near.network.send(expected, MESSAGE)
            assert far.heard == [] and expected not in near.network.connected()
            await near.tell(far, 1)

    rig.run(main())


# -- over plain links, byte by byte -----------------------------------------------------------------------------


class Thief(Identity):
    """Claims another identity, whose key it does not have."""

    def __init__(self, claimed: Identity) -> None:
        super().__init__(identity(66).key)
        self.peer = claimed.peer


def conversation(talk: Callable[[Link, Member], object], **options: object) -> Member:
    """Talk to a member over memory, and let some time pass."""
    net = MemoryNet()
    member = Member(identity(2), {"mem": net.carrier("far")}, limits=LIMITS, **options)  # type: ignore[arg-type]

    async def main() -> None:
        async with member.network:
            await member.network.listen("mem://far")
            link = await net.carrier("stranger").dial("mem://far", peer=member.peer, timeout_s=5)
            await talk(link, member)  # type: ignore[misc]
            await asyncio.sleep(1)

    run_virtual(main())
    return member


def greeting(who: Identity, **options: object) -> Callable[[Link, Member], object]:
    async def talk(link: Link, member: Member) -> None:
        await greet(
            link,
            member.peer,
            identity=who,
            **{"secret": SECRET, "incarnation": bytes(32), "last_link": bytes(32), **options},  # type: ignore[arg-type]
        )

    return talk


def test_a_member_may_greet() -> None:
    assert conversation(greeting(identity(7))).linked == [identity(7).peer]


def test_nobody_can_claim_another_identity(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PeerLost):
        conversation(greeting(Thief(identity(3))))
    assert "not who it claims to be" in refusals(caplog)[0]


def test_nobody_can_be_the_member_itself(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PeerLost):
        conversation(greeting(identity(2)))
    assert "own identity" in refusals(caplog)[0]


def test_a_recorded_handshake_is_worth_nothing(caplog: pytest.LogCaptureFixture) -> None:
    recorded: list[bytes] = []

    async def record(link: Link, member: Member) -> None:
        write = link.write

        def spy(header: bytes, *rest: object) -> None:
            recorded.append(header)
            write(header)

        link.write = spy  # type: ignore[method-assign]
        await greet(
            link, member.peer, identity=identity(7), secret=SECRET, incarnation=bytes(32), last_link=bytes(32)
        )

    async def replay(link: Link, member: Member) -> None:
        for header in recorded:
            link.write(header)
            await asyncio.sleep(0.1)
        with pytest.raises(PeerLost):
            while True:
                await link.recv()

    assert conversation(record).linked == [identity(7).peer]
    assert [type(decode_message(header)) for header in recorded] == [Hello, Proof]
    assert conversation(replay).linked == []
    assert len(refusals(caplog)) == 1 and "does not know the secret" in refusals(caplog)[0]


def test_a_handshake_passed_on_to_another_member_names_the_wrong_one() -> None:
    """Somebody between A and C lets A's greeting of C be answered by B, who is a member as well."""

    async def talk(link: Link, member: Member) -> None:
        await greet(
            link,
            identity(4).peer,
            identity=identity(7),
            secret=SECRET,
            incarnation=bytes(32),
            last_link=bytes(32),
        )

    with pytest.raises(PeerLost):
        conversation(talk)


def test_a_stranger_is_told_a_random_number_and_nothing_else() -> None:
    received: list[Frame] = []

    async def talk(link: Link, member: Member) -> None:
        hello = Hello(
            first_version=1,
            last_version=1,
            peer=identity(7).peer,
            nonce=bytes(32),
            incarnation=bytes(32),
            last_link=bytes(32),
            ticket_expires_unix_s=0,
        )
        link.write(encode_message(hello))
        link.write(encode_message(Proof(bytes(32), bytes(64))))
        with pytest.raises(PeerLost):
            while True:
                received.append(await link.recv())

    member = conversation(talk)
    assert member.linked == [] and len(received) == 1
    said = received[0].header
    assert len(said) < 60
    assert bytes.fromhex(member.peer) not in said and member.peer.encode() not in said
    assert SECRET.swarm.encode() not in said


def test_a_foreign_version_is_named_to_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    received: list[object] = []

    async def talk(link: Link, member: Member) -> None:
        hello = Hello(
            first_version=2,
            last_version=9,
            peer=identity(7).peer,
            nonce=bytes(32),
            incarnation=bytes(32),
            last_link=bytes(32),
            ticket_expires_unix_s=0,
        )
        link.write(encode_message(hello))
        with pytest.raises(PeerLost):
            while True:
                received.append(decode_message((await link.recv()).header))

    conversation(talk)
    assert received == [Goodbye("this member speaks version 1 of the protocol")]
    assert "versions 2 to 9" in refusals(caplog)[0]


def test_an_impostor_without_the_secret_learns_nothing_useful_from_a_dialler() -> None:
    """What a dialler proves, it proves to one acceptor and nonce; an impostor's welcome is not believed."""

    async def main() -> None:
        net = MemoryNet()
        near = Member(identity(1), {"mem": net.carrier("near")}, limits=LIMITS)

        async def pretend(link: Link) -> None:
            await link.recv()
            link.write(encode_message(Challenge(1, bytes(32))))
            await link.recv()
            link.write(encode_message(Welcome(bytes(32), bytes(32), bytes(64), b"")))

        tasks: list[asyncio.Task[None]] = []
        await net.carrier("far").listen(
            "mem://far", lambda link: tasks.append(asyncio.ensure_future(pretend(link)))
        )
        async with near.network:
            near.network.learn(identity(2).peer, ["mem://far"])
            with pytest.raises(PeerLost, match="does not know the secret"):
                await near.network.send(identity(2).peer, MESSAGE)

    run_virtual(main())


def test_over_tls_a_proof_must_be_of_the_channels_own_identity(caplog: pytest.LogCaptureFixture) -> None:
    """A member with TLS keys of its own greets with the (stolen) identity key of another one."""

    async def main() -> None:
        far = Member(identity(2), {"tls": TlsCarrier(identity(2), SECRET)}, limits=LIMITS)
        async with far.network:
            address = await far.network.listen("tls://127.0.0.1:0")
            link = await TlsCarrier(identity(7), SECRET).dial(address, peer=far.peer, timeout_s=20)
            with pytest.raises(PeerLost):
                await greet(
                    link,
                    far.peer,
                    identity=identity(3),
                    secret=SECRET,
                    incarnation=bytes(32),
                    last_link=bytes(32),
                )

    asyncio.run(main())
    assert "and its link is that of" in refusals(caplog)[0]


def test_plain_tcp_to_a_tls_port_gets_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        far = Member(identity(2), {"tls": TlsCarrier(identity(2), SECRET)}, limits=LIMITS)
        async with far.network:
            address = await far.network.listen("tls://127.0.0.1:0")
            link = await TcpCarrier().dial(address.replace("tls", "tcp"), peer=far.peer, timeout_s=20)
            link.write(b"hello")
            with pytest.raises(Exception, match=r"frame|closed|broken"):
                await link.recv()
            await asyncio.sleep(0.1)
            assert not far.network._doorkeeper.strangers

    asyncio.run(main())
    assert len(refusals(caplog)) == 1


def test_an_identity_is_its_key() -> None:
    assert identity(1).peer == peer_of(identity(1).key.public_key()) != identity(2).peer
