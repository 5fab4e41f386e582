"""`plait join`: this machine serves blocks of a swarm's model until it is told to stop."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from plait import __version__
from plait.cli.flags import with_settings
from plait.cli.leash import end_with_input, read_line
from plait.cli.serving import LOOK_S, run_async
from plait.cli.terminal import JsonFlag, bytes_bar, note, print_json, say
from plait.errors import BadSetup, EngineFailure
from plait.settings import Settings

if TYPE_CHECKING:
    from plait.ids import PeerId
    from plait.transport import Ticket
    from plait.wire import ModelTold
    from plait.worker import Member, SpanSource, SwarmNode

# How long the swarm is asked for its model, which the member that is asked may still be loading.
MODEL_S = 600.0
RETRY_S = 0.5


@with_settings(sections=("swarm", "lending", "engine", "kvcache", "scheduling", "log"), model=False)
def join(
    ticket: Annotated[
        str,
        typer.Argument(
            help="What `plait serve --swarm` printed; - takes it from standard input.", metavar="TICKET"
        ),
    ],
    until_input_ends: Annotated[
        bool,
        typer.Option(
            "--until-input-ends",
            help="End at once when standard input closes, so that a program that starts machines leaves none behind.",
        ),
    ] = False,
    json: JsonFlag = False,
    *,
    settings: Settings,
) -> None:
    """Serve blocks of a swarm's model from this machine.

    The ticket says where the swarm is and lets this machine in. The model's files are found on this machine, or come
    from the swarm. Ctrl-C or `plait leave` hands the sessions over and leaves; a second Ctrl-C ends at once.
    """
    if ticket == "-":
        # Imports take seconds, so they come first: who starts machines can do so before there is a ticket.
        import_module("plait.worker")
        ticket = read_line()
        if not ticket and until_input_ends:
            return
    if until_input_ends:
        end_with_input()
    run_async(_join(settings, ticket, json=json))
    if not json:
        say("left")


async def _join(settings: Settings, text: str, *, json: bool) -> None:
    from plait.transport import Ticket

    ticket = Ticket.parse(text, unix_now_s=time.time())
    leaving = _on_signals()
    async with AsyncExitStack() as stack:
        joining = asyncio.ensure_future(stack.enter_async_context(joined(settings, ticket)))
        stopped = asyncio.ensure_future(leaving.wait())
        await asyncio.wait({joining, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            return
        member = joining.result()
        ready = asyncio.ensure_future(_show_until_settled(member))
        left = asyncio.ensure_future(member.wait_left())
        await asyncio.wait({ready, left, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and member.failure is None and not stopped.done():
            _say_ready(member, json=json)
        await asyncio.wait({left, stopped}, return_when=asyncio.FIRST_COMPLETED)
        member.leave()
        await left
        ready.cancel()
        stopped.cancel()
        if member.failure is not None:
            raise member.failure


@asynccontextmanager
async def joined(settings: Settings, ticket: "Ticket") -> "AsyncGenerator[Member]":
    """Be a member of a ticket's swarm.

    Raises:
        BadSetup: nobody of the ticket lets this machine in, or the swarm's model cannot be served here.
    """
    import numpy as np

    # Imported before there are links: it takes seconds, in which no other machine would be answered.
    from plait.cli.swarm_setup import (
        be_introduced,
        make_node,
        member_options,
        secret_for_ticket,
        take_seat,
    )
    from plait.worker import Member

    async with AsyncExitStack() as stack:
        seat = stack.enter_context(take_seat(settings))
        secret = secret_for_ticket(settings, ticket)
        node = make_node(settings, seat, secret, np.random.default_rng(), ticket=ticket)
        await stack.enter_async_context(node)
        introducer = await be_introduced(settings, node)
        told = await _ask_model(node, introducer)
        source = await _source(settings, node, told, introducer, stack)
        node.exchange.offer = source.offer
        yield await stack.enter_async_context(Member(node, source, member_options(settings, seat)))


async def _ask_model(node: "SwarmNode", introducer: "PeerId") -> "ModelTold":
    problem = ""
    try:
        async with asyncio.timeout(MODEL_S):
            while True:
                try:
                    return await node.exchange.ask_model(introducer)
                except EngineFailure as error:  # it is loading itself, or the link broke
                    problem = error.message
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        pass
    raise BadSetup(f"the swarm does not say which model it serves: {problem}")


async def _source(
    settings: Settings, node: "SwarmNode", told: "ModelTold", introducer: "PeerId", stack: AsyncExitStack
) -> "SpanSource":
    """The swarm's model on this machine; its folder, if it is one that is being filled, is left with the stack."""
    from plait.cli.options import undecided_options, wishes
    from plait.cli.swarm_setup import span_limits
    from plait.engine import resolve_model, user_cache_folder
    from plait.worker import source_of_folder, source_of_swarm

    if "name" in settings.model.model_fields_set:
        folder = await asyncio.to_thread(resolve_model, settings.model.name, offline=settings.model.offline)
        return source_of_folder(
            settings.model.name,
            undecided_options(settings, folder),
            wishes(settings),
            span_limits(settings),
            told=told,
        )
    with bytes_bar() as show:
        source, filling = await source_of_swarm(
            told,
            node.exchange,
            lambda: [introducer],
            undecided_options(settings, user_cache_folder()),
            wishes(settings),
            span_limits(settings),
            weights=settings.swarm.weights,
            root=user_cache_folder().parent / "weights",
            offline=settings.model.offline,
            on_progress=show,
        )
    if filling is not None:
        stack.callback(filling.__exit__)
    return source


async def _show_until_settled(member: "Member") -> None:
    settled = asyncio.ensure_future(member.wait_settled())
    try:
        with bytes_bar() as show:
            while not settled.done():
                progress = member.progress
                show(progress.stage, progress.done_bytes, progress.total_bytes)
                await asyncio.sleep(LOOK_S)
    finally:
        settled.cancel()


def _say_ready(member: "Member", *, json: bool) -> None:
    node, blocks = member.node, member.blocks
    if json:
        print_json(
            {
                "peer": node.peer,
                "name": member.options.name,
                "first_block": blocks.start,
                "end_block": blocks.stop,
                "model_blocks": member.supply.model_blocks,
                "addresses": list(node.addresses),
                "process": os.getpid(),
            }
        )
        return
    served = f"blocks {blocks.start}:{blocks.stop} of {member.supply.model_blocks}" if blocks else "no blocks"
    reached = ", ".join(node.addresses) or "the links it makes itself"
    say(f"ready: plait {__version__} serves {served} as {member.options.name!r}, reached by {reached}")
    say("Ctrl-C leaves")


def _on_signals() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; a second one ends the process at once."""
    leaving = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if leaving.is_set():
            os._exit(128 + number)
        note("leaving: sessions go to other machines; once more stops at once")
        leaving.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    return leaving
