"""From settings to a place in a swarm: keys, addresses, how the member behaves."""

import asyncio
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plait import __version__
from plait.errors import BadSetup, PeerLost
from plait.settings import Settings

if TYPE_CHECKING:
    import numpy as np

    from plait.ids import PeerId
    from plait.transport import Identity, SwarmSecret, Ticket, TicketSecret
    from plait.worker import LendingLimits, MemberOptions, SpanLimits, SwarmGateway, SwarmNode

# Members of swarms that run at the same time for one user on one machine.
MAX_SEATS = 64
# A record holds for so many of its announcements, and not less than so long: others' clocks differ by seconds.
MISSED_ANNOUNCEMENTS = 6
MIN_RECORD_LIFE_S = 20.0
# How long the members that a ticket names are tried.
INTRODUCTION_S = 30.0
RETRY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """An identity that this process alone uses, and the name that people see it under."""

    identity: "Identity"
    name: str


def swarm_folder(settings: Settings) -> Path:
    """Where keys of machines and swarms are kept."""
    if settings.swarm.folder is not None:
        return settings.swarm.folder.expanduser()
    config_home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config_home).expanduser() / "plait" / "swarm"


@contextmanager
def take_seat(settings: Settings) -> Generator[Seat]:
    """The identity of this machine, or another where a process has it already: the second one's name ends in -2.

    Raises:
        BadSetup: keys cannot be kept, or the name asked for is in use.
    """
    from plait.transport import Identity

    asked = settings.swarm.name
    first = asked or _plain(socket.gethostname()) or "machine"
    names = [first] if asked else [first, *(f"{first}-{number}" for number in range(2, MAX_SEATS))]
    folder = swarm_folder(settings) / "identities"
    for name in names:
        file = folder / f"{_plain(name)}.pem"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (folder / f"{_plain(name)}.lock").open("a")
        except OSError as error:
            raise BadSetup(f"keys cannot be kept in {str(folder)!r}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield Seat(identity=Identity.load_or_make(file), name=name)
            return
    raise BadSetup(
        f"a process on this machine is in a swarm as {first!r} already; give another --name"
        if asked
        else f"{MAX_SEATS} processes on this machine are in swarms already"
    )


def own_secret(settings: Settings) -> "SwarmSecret":
    """The secret of this user's swarm, made when it is first needed: tickets outlive a restart of the server."""
    from plait.transport import SwarmSecret

    return SwarmSecret.load_or_make(swarm_folder(settings) / "secret")


def secret_for_ticket(settings: Settings, ticket: "Ticket") -> "SwarmSecret | TicketSecret":
    """The secret of a swarm that this machine was in before, or else that of the ticket."""
    from plait.transport import SwarmSecret

    file = _joined_file(settings, ticket.secret.swarm)
    return SwarmSecret.load_or_make(file) if file.exists() else ticket.secret


async def be_introduced(settings: Settings, node: "SwarmNode") -> "PeerId":
    """A link to one of the members that the node's ticket names; the swarm's secret is kept, to come back with.

    Raises:
        BadSetup: none of them lets this machine in.
    """
    from plait.transport import SwarmSecret

    problem = "the ticket names no member that can be dialled"
    try:
        async with asyncio.timeout(INTRODUCTION_S):
            while True:
                for introducer in node.introducers:
                    try:
                        await node.network.connect(introducer.peer)
                    except PeerLost as error:
                        problem = error.message
                        continue
                    secret = node.network.secret
                    if isinstance(secret, SwarmSecret):
                        file = _joined_file(settings, secret.swarm)
                        if not file.exists():
                            secret.save(file)
                    return introducer.peer
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        pass
    raise BadSetup(
        f"nobody named by the ticket lets this machine in ({problem}); check that the server runs and listens where "
        "this machine reaches it (--swarm-listen), or ask for a new ticket"
    )


def make_node(
    settings: Settings,
    seat: Seat,
    secret: "SwarmSecret | TicketSecret",
    rng: "np.random.Generator",
    *,
    ticket: "Ticket | None" = None,
) -> "SwarmNode":
    """A place in a swarm over TLS, and over iroh if that was asked for, not entered yet.

    Raises:
        BadSetup: iroh was asked for, and is not installed.
    """
    from plait.transport import Carrier, IrohCarrier, TlsCarrier
    from plait.worker import MembershipLimits, SwarmNode

    carriers: dict[str, Carrier] = {"tls": TlsCarrier(seat.identity, secret)}
    listen = [f"tls://{_listen_address(settings, seat)}"]
    if settings.swarm.iroh_listen is not None:
        carriers["iroh"] = IrohCarrier(seat.identity, secret, relay=settings.swarm.iroh_relay)
        listen.append(f"iroh://{settings.swarm.iroh_listen}")
    elif settings.swarm.iroh_relay is not None:
        raise BadSetup("--iroh-relay is of use with --iroh-listen only; 0.0.0.0:0 takes any port")
    return SwarmNode(
        seat.identity,
        secret=secret,
        carriers=carriers,
        listen=listen,
        advertise=[f"tls://{address}" for address in settings.swarm.advertise],
        introducers=() if ticket is None else ticket.peers,
        rng=rng,
        membership_limits=MembershipLimits(
            announce_s=settings.swarm.announce_s,
            life_s=max(MIN_RECORD_LIFE_S, MISSED_ANNOUNCEMENTS * settings.swarm.announce_s),
        ),
    )


def make_gateway(settings: Settings, seat: Seat) -> "SwarmGateway":
    """The gateway of this user's swarm, not entered yet.

    Raises:
        BadSetup: keys cannot be kept, or the settings do not fit together.
    """
    import numpy as np

    from plait.cli.options import served_names, undecided_options, wishes
    from plait.engine import resolve_model
    from plait.routing import RouteWish, parse_pick
    from plait.transport import Ticket
    from plait.worker import LoadProgress, SpanSource, SwarmGateway, SwarmOptions, source_of_folder

    if settings.engine.tensor_parallel_size > 1:
        raise BadSetup("a machine of a swarm serves its blocks by itself; leave out --tensor-parallel-size")

    def open_source(on_progress: Callable[[LoadProgress], None]) -> SpanSource:
        model = settings.model
        folder = resolve_model(
            model.name,
            offline=model.offline,
            on_progress=lambda done, total: on_progress(LoadProgress("downloading", done, total)),
        )
        return source_of_folder(
            model.name, undecided_options(settings, folder), wishes(settings), span_limits(settings)
        )

    ticket = None
    if settings.swarm.ticket is not None:
        ticket = Ticket.parse(settings.swarm.ticket.get_secret_value(), unix_now_s=time.time())
    secret = own_secret(settings) if ticket is None else secret_for_ticket(settings, ticket)
    return SwarmGateway(
        make_node(settings, seat, secret, np.random.default_rng(), ticket=ticket),
        names=served_names(settings),
        open_source=open_source,
        member_options=member_options(settings, seat),
        swarm_options=SwarmOptions(
            route=RouteWish(mode=settings.swarm.route_mode, pick=parse_pick(settings.swarm.route_pick)),
            draft_tokens=settings.swarm.draft_tokens,
            wire_format=settings.swarm.wire_format,
        ),
        ticket_s=settings.swarm.ticket_s,
    )


def member_options(settings: Settings, seat: Seat) -> "MemberOptions":
    """How this machine behaves as a member."""
    from plait.cluster import PeerTerms
    from plait.worker import MemberOptions

    swarm = settings.swarm
    return MemberOptions(
        name=seat.name,
        blocks=asked_blocks(swarm.blocks),
        announce_s=swarm.announce_s,
        rebalances=swarm.rebalance,
        rebalance_s=swarm.rebalance_s,
        balance_quality=swarm.balance_quality,
        drain_timeout_s=settings.server.drain_timeout_s,
        version=__version__,
        terms=PeerTerms(price_per_hour=swarm.price_per_hour, busy_watts=swarm.busy_watts),
    )


def span_limits(settings: Settings) -> "SpanLimits":
    """How much this machine's span may take."""
    from plait.worker import SpanLimits

    return SpanLimits(
        memory_bytes=settings.swarm.memory,
        context_tokens=settings.swarm.context_tokens,
        kv_cache_bytes=settings.kvcache.memory,
        lending=lending_limits(settings),
    )


def lending_limits(settings: Settings) -> "LendingLimits | None":
    """How this machine lends and borrows KV memory; None if it does not.

    Raises:
        BadSetup: it serves no blocks.
    """
    from plait.kvcache import LendingOptions, LendingRules
    from plait.worker import LendingLimits

    lending = settings.lending
    if lending.policy == "off":
        return None
    if settings.swarm.blocks == "none":
        raise BadSetup("a machine with --blocks none has no KV memory to lend; leave out --lending")
    return LendingLimits(
        options=LendingOptions(
            policy=lending.policy,
            moved_tokens_per_step=lending.moved_tokens_per_step,
            heartbeat_s=lending.heartbeat_s,
            rules=LendingRules(small_batch=lending.small_batch),
        ),
        lend_fraction=lending.lend_fraction,
        keep_free_fraction=lending.keep_free_fraction,
        borrow_tokens=lending.borrow_tokens,
        lease_s=lending.lease_s,
        recall_s=lending.recall_s,
        deadline_s=lending.deadline_s,
        wait_s=lending.wait_s,
    )


def asked_blocks(text: str) -> "range | Literal['auto', 'none']":
    """What --blocks says."""
    if text == "auto" or text == "none":
        return text
    first, _, end = text.partition(":")
    return range(int(first), int(end))


def reaches_beyond(addresses: tuple[str, ...]) -> bool:
    """Whether some of a member's addresses are not of the loopback."""
    from plait.cli.serving import is_loopback

    return any(
        not is_loopback(address.partition("?")[0].partition("://")[2].rpartition(":")[0].strip("[]"))
        for address in addresses
    )


def _listen_address(settings: Settings, seat: Seat) -> str:
    """Where to listen: port 0 is the free one that this seat had last time, so that tickets outlive a restart."""
    host, _, port = settings.swarm.listen.rpartition(":")
    if port != "0":
        return settings.swarm.listen
    file = swarm_folder(settings) / "identities" / f"{_plain(seat.name)}.port"
    try:
        last = int(file.read_text())
    except (OSError, ValueError):
        last = 0
    chosen = _free_port(host, last) or _free_port(host, 0)
    if chosen not in (0, last):
        try:
            file.write_text(f"{chosen}\n")
        except OSError as error:
            raise BadSetup(f"{str(file)!r} cannot be written: {error.strerror}") from error
    return f"{host}:{chosen}"


def _free_port(host: str, port: int) -> int:
    """This port if nobody listens there, any free one for 0; 0 if there is none."""
    if not 0 <= port < 65536:
        return 0
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            bound: int = probe.getsockname()[1]
    except OSError:
        return 0  # whoever listens in earnest says what is wrong
    return bound


def _joined_file(settings: Settings, swarm: str) -> Path:
    return swarm_folder(settings) / "joined" / swarm


def _plain(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:64]
