"""`plait demo`: what a newcomer sees first. Serves the embedded model from a small swarm, and asks it one question."""

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.flags import with_settings
from plait.cli.miniature import Machine, Miniature, Part
from plait.cli.outlive import outlive, parse_victim
from plait.cli.serve import print_addresses
from plait.cli.serving import Listener, is_loopback, listen, run_async, run_server
from plait.cli.terminal import note, print_table, say, say_piece
from plait.errors import BadSetup, EngineFailure
from plait.settings import Settings
from plait.units import format_s

if TYPE_CHECKING:
    from plait.worker import SwarmGateway

QUESTION = "What is plait?"
MAX_ANSWER_TOKENS = 80
# Ports tried after the one asked for.
NEXT_PORTS = 20
# The two halves of `tiny`, and all of it once more: whichever machine dies, the others have every block.
PARTS = (Part("one", range(3)), Part("two", range(3, 6)), Part("spare", range(6)))
# How long round trips between the machines may take to be known.
MEASURE_S = 2.0
# Chains of the front that are printed.
SHOWN_CHAINS = 8


@with_settings(quiet=True)
def demo(
    one_process: Annotated[
        bool, typer.Option("--one-process", help="Serve from this process alone, without a swarm.")
    ] = False,
    kill: Annotated[
        str | None,
        typer.Option(
            "--kill",
            help="Ask the demo that runs for a long answer, kill one of its machines in the middle of it, and show "
            "how it goes on.",
            metavar="NAME:PROCESS",
        ),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Serve a model to this machine alone, ask it one question, and stay up.

    The embedded model is served by a swarm in miniature: two machines with half of its blocks each and a spare one with
    all, each a process that ends with this one. Another model is served from this process.
    """
    keys = settings.server.api_keys
    api_key = keys[0].get_secret_value() if keys else None
    if kill is not None:
        victim = parse_victim(kill)
        outlive(f"http://{settings.server.host}:{settings.server.port}/v1", api_key, victim)
        return
    listener = _listen_nearby(settings)
    if one_process or settings.model.name != "tiny":
        run_async(run_server(settings, listener, on_ready=lambda: _introduce(listener, api_key)))
    else:
        _serve_miniature(settings, listener, api_key)
    say("stopped")


def _serve_miniature(settings: Settings, listener: Listener, api_key: str | None) -> None:
    gateway: list[SwarmGateway] = []
    begun = threading.Event()

    def on_end(machine: Machine) -> None:
        if begun.is_set():
            _say_gone(machine, miniature.machines)
        elif gateway:
            signal.raise_signal(signal.SIGTERM)

    def on_swarm(swarm: "SwarmGateway") -> None:
        gateway.append(swarm)
        check_all_live()
        miniature.admit(swarm.ticket())

    def check_all_live() -> None:
        for machine in miniature.machines:
            if not machine.lives:
                raise EngineFailure(
                    f"machine {machine.part.name!r} of the demo ended before it served anything: {machine.last_words}"
                )

    async def on_ready() -> None:
        await miniature.wait_ready()
        begun.set()
        await _wait_measured(gateway[0])
        last = await _print_swarm(miniature.machines, gateway[0])
        victim = next(machine for machine in miniature.machines if machine.part.name == last)
        await _introduce(listener, api_key, lambda: _print_how_to_kill(victim, settings, listener))

    note("starting a swarm of three processes")
    with Miniature(PARTS, on_end=on_end) as miniature:
        own = {"name": "gateway", "blocks": "none", "folder": miniature.folder, "listen": "127.0.0.1:0"}
        own |= {"advertise": (), "ticket": None}  # a swarm of its own, whatever this user's is like
        if not {"route_mode", "route_pick"} & settings.swarm.model_fields_set:
            # A front to show, and the point of it that takes more than one machine.
            own |= {"route_mode": "exact", "route_pick": "throughput-first"}
        with_swarm = settings.model_copy(
            update={
                "swarm": settings.swarm.model_copy(update=own),
                "server": settings.server.model_copy(update={"swarm": True}),
            }
        )
        run_async(run_server(with_swarm, listener, on_swarm=on_swarm, on_ready=on_ready))
        if not begun.is_set():
            check_all_live()


async def _introduce(
    listener: Listener, api_key: str | None, also: Callable[[], None] = lambda: None
) -> None:
    """Ask the question, then say where everything is, and what `also` says."""
    enough = threading.Event()
    try:
        await asyncio.to_thread(_ask, listener, api_key, enough)
    finally:
        # Ctrl-C in the middle of the answer: nobody waits for the rest of it.
        enough.set()
    print_addresses(listener, has_keys=api_key is not None)
    with_key = " --api-key YOUR_KEY" if api_key else ""
    say(
        f"open {listener.origin}/ or talk with: {own_command()} chat --base-url {listener.base_url}{with_key}"
    )
    say()
    also()
    say("Ctrl-C stops")


def _listen_nearby(settings: Settings) -> Listener:
    """The port asked for, or the next free one after it."""
    host, first = settings.server.host, settings.server.port
    if not is_loopback(host):
        raise BadSetup(f"plait demo is for this machine alone; for --host {host} use plait serve")
    for port in range(first, min(first + NEXT_PORTS, 65535) + 1):
        try:
            listener = listen(host, port)
        except BadSetup:
            if port == min(first + NEXT_PORTS, 65535):
                raise
            continue
        if port != first:
            note(f"port {first} is taken; using {port}")
        return listener
    raise AssertionError("the loop returns or raises")


def _ask(listener: Listener, api_key: str | None, enough: threading.Event) -> None:
    """Ask through the server's own HTTP API, printing the answer as it comes until it is `enough`."""
    from plait.client import Message, ServerClient

    with ServerClient(listener.base_url, api_key=api_key) as client:
        health = client.health()
        if not health.ready:
            raise EngineFailure(f"the server has loaded its model but is not ready: {health.message}")
        model = client.models()[0]
        say(f"\nasking {model} through {listener.base_url}/chat/completions: {QUESTION}\n")
        started_s, tokens = time.monotonic(), None
        sampling = {"temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
        with closing(client.chat([Message("user", QUESTION)], model=model, sampling=sampling)) as chunks:
            for chunk in chunks:
                if enough.is_set():
                    return
                say_piece(chunk.text)
                tokens = chunk.completion_tokens or tokens
        elapsed_s = time.monotonic() - started_s
        say("\n" + (f"\n({tokens} tokens in {format_s(elapsed_s)})\n" if tokens else ""))


# -- the swarm -------------------------------------------------------------------------------------------


async def _wait_measured(swarm: "SwarmGateway") -> None:
    """Wait a moment until machines have told each other's round trips: a route counts unknown ones as long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(MEASURE_S):
            while True:
                status = swarm.status()
                serving = [machine["peer"] for machine in status["machines"] if machine["end_block"]]
                known = {(link["from"], link["to"]) for link in status["links"]}
                if known.issuperset(permutations(serving, 2)):
                    return
                await asyncio.sleep(0.05)


async def _print_swarm(machines: Sequence[Machine], swarm: "SwarmGateway") -> str:
    """Print the machines, the chain that requests get now, and the front of chains beside it; the chain's last name."""
    from plait.session import RouteAsk

    routed = await swarm.route(RouteAsk(), 0)
    chain, front = routed["chain"], routed["front"]
    say("\ntiny is served by a swarm: three machines, which here are processes\n")
    rows = [
        ("  " + machine.part.name, machine.part.blocks_text, str(machine.process.pid)) for machine in machines
    ]
    print_table(("  machine", "blocks", "process"), rows)
    say(f"\nrequests now go through {_chain_text(chain)} (mode {routed['mode']}), chosen from this front,")
    say("which counts time and rate as PETALS does:\n")
    members = front["members"][:SHOWN_CHAINS]
    print_table(
        ("  chain", *(heading for name in front["objectives"] for heading in [_OBJECTIVES[name][0]]), ""),
        [
            (
                "  " + _chain_text(member["chain"]),
                *(
                    _OBJECTIVES[name][1](value) if value is not None else "-"
                    for name, value in zip(front["objectives"], member["values"], strict=True)
                ),
                "<- chosen" if member["chain"] == chain else "",
            )
            for member in members
        ],
    )
    if len(front["members"]) > SHOWN_CHAINS:
        say(f"  and {len(front['members']) - SHOWN_CHAINS} more")
    return str(chain[-1]["name"])


_OBJECTIVES: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "step_s": ("step", format_s),
    "rate_tokens_per_s": ("tokens/s", lambda value: f"{value:.0f}"),
}
"""Headings and formats of the objectives of the default front."""


def _chain_text(chain: Sequence[Mapping[str, Any]]) -> str:
    return " -> ".join(f"{hop['name']} {hop['first_block']}:{hop['end_block']}" for hop in chain)


def _print_how_to_kill(machine: Machine, settings: Settings, listener: Listener) -> None:
    port = listener.socket.getsockname()[1]
    address = f" --port {port}" if port != 8000 else ""
    if settings.server.host != "127.0.0.1":
        address = f" --host {settings.server.host}{address}"
    process = machine.process.pid
    say("kill a machine in the middle of an answer, and watch the answer go on (in another terminal):\n")
    say(f"  {own_command()} demo --kill {machine.part.name}:{process}{address}\n")
    say(f"or by hand, whenever you like: kill -9 {process}\n")


def _say_gone(machine: Machine, machines: Sequence[Machine]) -> None:
    from plait.cluster import format_blocks

    code, part = machine.process.returncode, machine.part
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    left = [other.part for other in machines if other.lives]
    missing = set(part.blocks).difference(*(other.blocks for other in left))
    then = (
        f"nobody serves blocks {format_blocks(sorted(missing))} now; a machine that joins will (plait status --ticket)"
        if missing
        else f"answers go on with {' and '.join(other.name for other in left)}"
    )
    say(f"{part.name} (process {machine.process.pid}) is gone, {how}: {then}")


def own_command() -> str:
    """What to type for this program."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{sys.executable} -m plait"
    found = shutil.which(program.name)
    if found is not None and Path(found).resolve() == program.resolve():
        return program.name
    return os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)
