"""`plait serve`: one model behind HTTP until it is told to stop."""

import json as jsonlib
import os
from typing import TYPE_CHECKING

from plait import __version__
from plait.cli.flags import with_settings
from plait.cli.keys import default_key_store
from plait.cli.serving import Listener, is_loopback, listen, run_async, run_server
from plait.cli.terminal import JsonFlag, say
from plait.errors import BadSetup
from plait.settings import Settings

if TYPE_CHECKING:
    from plait.worker import SwarmGateway


@with_settings()
def serve(json: JsonFlag = False, *, settings: Settings) -> None:
    """Serve a model to OpenAI and Anthropic clients, with a web page.

    With --swarm other machines can join it (`plait join`) and serve blocks of the model.
    """
    if settings.engine.tensor_parallel_rank:
        take_part(settings)
        return
    if settings.lending.policy != "off" and not settings.server.swarm:
        raise BadSetup("--lending is for machines of a swarm; add --swarm, or leave it out")
    key_hashes, has_keys = admitted_keys(settings)
    listener = listen(settings.server.host, settings.server.port)
    names = settings.model.served_names or (settings.model.name,)
    if json:
        say_event("listening", base_url=listener.base_url, model=names[0], process=os.getpid())
    else:
        say(f"plait {__version__} is starting {names[0]} (process {os.getpid()})")
        print_addresses(listener, has_keys=has_keys)

    def on_swarm(swarm: "SwarmGateway") -> None:
        ticket = swarm.ticket()
        if json:
            say_event(
                "swarm", ticket=ticket, join=f"plait join {ticket}", addresses=list(swarm.node.addresses)
            )
        else:
            print_ticket(ticket, swarm.node.addresses)

    async def on_ready() -> None:
        if json:
            say_event("ready")
        else:
            say(f"ready: {listener.origin}/ answers; Ctrl-C stops")

    run_async(run_server(settings, listener, api_key_hashes=key_hashes, on_swarm=on_swarm, on_ready=on_ready))
    if json:
        say_event("stopped")
    else:
        say("stopped")


def admitted_keys(settings: Settings) -> tuple[tuple[str, ...], bool]:
    """Hashes of the keys that are kept, and whether clients need one, of these or of the settings.

    Raises:
        BadSetup: others could reach the server, and would need none.
    """
    key_hashes = tuple(key.hash for key in default_key_store().load())
    has_keys = bool(key_hashes or settings.server.api_keys)
    host = settings.server.host
    if not (is_loopback(host) or has_keys or settings.server.insecure_no_auth):
        raise BadSetup(
            f"--host {host} lets other machines in, and no API key is set: create one with 'plait token new' "
            "or pass --api-key (or --insecure-no-auth, if anyone who can reach this address may use it)"
        )
    return key_hashes, has_keys


def say_event(event: str, **fields: object) -> None:
    """One line of JSON: a server says several things in its life."""
    say(jsonlib.dumps({"event": event, **fields}))


def print_ticket(ticket: str, addresses: tuple[str, ...]) -> None:
    """How other machines come in."""
    from plait.cli.swarm_setup import reaches_beyond

    say("  other machines join with this line (keep it as you would a password):")
    say()
    say(f"  plait join {ticket}")
    say()
    if not reaches_beyond(addresses):
        say("  as it is, only processes of this machine: --swarm-listen 0.0.0.0:7000 lets others reach it")
        say()


def take_part(settings: Settings) -> None:
    """Be one of the ranks that rank 0, on another machine, serves a model with."""
    from plait.cli.options import tensor_parallel_options
    from plait.engine import resolve_model
    from plait.worker import follow_elsewhere

    options = tensor_parallel_options(settings)
    folder = resolve_model(settings.model.name, offline=settings.model.offline)
    say(f"plait {__version__} takes part as rank {options.rank} of {options.size} (process {os.getpid()})")
    follow_elsewhere(options, folder, settings.engine.threads)
    say("rank 0 has stopped")


def print_addresses(listener: Listener, *, has_keys: bool) -> None:
    """Where the page is, and the lines that point a client here."""
    key = "YOUR_KEY" if has_keys else "none-needed"
    say(f"  page  {listener.origin}/")
    say(f"  API   {listener.base_url}  (documented at {listener.origin}/docs)")
    say()
    say(f"  export OPENAI_BASE_URL={listener.base_url}")
    say(f"  export OPENAI_API_KEY={key}")
    say(f"  export ANTHROPIC_BASE_URL={listener.origin}")
    say(f"  export ANTHROPIC_AUTH_TOKEN={key}")
    say()
