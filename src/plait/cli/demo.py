"""`plait demo`: what a newcomer sees first. Serves the embedded model and asks it one question."""

import asyncio
import threading
import time
from contextlib import closing

from plait.cli.flags import with_settings
from plait.cli.serve import print_addresses
from plait.cli.serving import Listener, is_loopback, listen, run_async, run_server
from plait.cli.terminal import note, say, say_piece
from plait.errors import BadSetup, EngineFailure
from plait.settings import Settings
from plait.units import format_s

QUESTION = "What is plait?"
MAX_ANSWER_TOKENS = 80
# Ports tried after the one asked for.
NEXT_PORTS = 20


@with_settings(quiet=True)
def demo(*, settings: Settings) -> None:
    """Serve a model to this machine alone, ask it one question, and stay up."""
    keys = settings.server.api_keys
    api_key = keys[0].get_secret_value() if keys else None
    listener = _listen_nearby(settings)

    async def on_ready() -> None:
        enough = threading.Event()
        try:
            await asyncio.to_thread(_ask, listener, api_key, enough)
        finally:
            # Ctrl-C in the middle of the answer: nobody waits for the rest of it.
            enough.set()
        print_addresses(listener, has_keys=bool(keys))
        with_key = " --api-key YOUR_KEY" if keys else ""
        say(f"open {listener.origin}/ or talk with: plait chat --base-url {listener.base_url}{with_key}")
        say("Ctrl-C stops")

    run_async(run_server(settings, listener, on_ready=on_ready))
    say("stopped")


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
