"""One worker of a cluster as a Ray actor: a member of the swarm inside a process that Ray starts, and starts again."""

import os
import time
from importlib import import_module

from plait.cli.join import joined
from plait.cli.serving import run_async
from plait.cli.terminal import note, start_logging
from plait.errors import BadSetup, ServingError
from plait.settings import Settings, Tree, settings_from


class RayWorker:
    """Serves blocks as `plait join` does. Ray calls it with a class's usual means; only the ticket goes through Ray."""

    def __init__(self, tree: Tree, source: str) -> None:
        self._settings = settings_from(tree, source)
        start_logging(self._settings.log.level)
        # It takes seconds, in which the gateway starts.
        import_module("plait.worker")

    def process(self) -> int:
        """This process's number."""
        return os.getpid()

    def serve(self, ticket: str) -> str:
        """Join the swarm and serve until it is told to leave; returns what is wrong, if a new start would not help.

        Other failures end the process, so that Ray starts another, which calls this again.
        """
        try:
            run_async(_serve(self._settings, ticket))
        except BadSetup as error:
            return error.message
        except ServingError as error:
            note(f"{self._settings.swarm.name}: {error.message}")
            os._exit(1)
        return ""


async def _serve(settings: Settings, ticket: str) -> None:
    """Apart from the class: one with a coroutine Ray runs on an event loop of its own."""
    from plait.transport import Ticket

    async with joined(settings, Ticket.parse(ticket, unix_now_s=time.time())) as member:
        await member.wait_left()
        if member.failure is not None:
            raise member.failure
