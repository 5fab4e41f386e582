"""`plait up`: a model on a cluster that its user administers, with its workers on Ray and its gateway here."""

import asyncio
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait import __version__
from plait.cli.serve import admitted_keys, print_addresses, say_event
from plait.cli.serving import listen, run_async, run_server
from plait.cli.terminal import JsonFlag, note, print_table, say, start_logging
from plait.errors import BadSetup
from plait.settings import read_cluster

if TYPE_CHECKING:
    from plait.cli.ray_cluster import RayCluster
    from plait.settings import Cluster
    from plait.worker import SwarmGateway


def up(
    file: Annotated[Path, typer.Argument(help="What is served by whom, in YAML.", metavar="FILE")],
    json: JsonFlag = False,
) -> None:
    """Serve a model from workers that Ray places on a cluster, and starts again when they die.

    The file names the model and the workers; the gateway is this process. Ctrl-C ends all of it.
    """
    from plait.cli.ray_cluster import RayCluster

    cluster = read_cluster(file)
    start_logging(cluster.gateway.log.level)
    key_hashes, has_keys = admitted_keys(cluster.gateway)
    listener = listen(cluster.gateway.server.host, cluster.gateway.server.port)
    if json:
        say_event(
            "listening", base_url=listener.base_url, model=cluster.gateway.model.name, process=os.getpid()
        )
    else:
        say(f"plait {__version__} is starting {cluster.gateway.model.name} (process {os.getpid()})")
        print_addresses(listener, has_keys=has_keys)
    note("starting Ray on this machine" if cluster.is_local else f"asking Ray at {cluster.ray.address}")
    with ExitStack() as stack:
        attended = _Attended(cluster, stack.enter_context(RayCluster(cluster)), json=json)

        async def on_ready() -> None:
            say_event("ready") if json else say(f"ready: {listener.origin}/ answers; Ctrl-C stops")
            attended.is_ready = True

        run_async(
            run_server(
                cluster.gateway,
                listener,
                api_key_hashes=key_hashes,
                on_swarm=attended.start,
                on_ready=on_ready,
            )
        )
    if attended.failure is not None:
        raise attended.failure
    say_event("stopped") if json else say("stopped")


class _Attended:
    """Lets the workers in, and watches them: one that cannot serve ends everything, unless all could before."""

    def __init__(self, cluster: "Cluster", workers: "RayCluster", *, json: bool) -> None:
        self.is_ready = False
        self.failure: BadSetup | None = None
        self._cluster = cluster
        self._workers = workers
        self._json = json
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, swarm: "SwarmGateway") -> None:
        """Have the workers join; called on the event loop."""
        for work in (self._show(), self._workers.serve(swarm.ticket(), self._on_end)):
            self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def _show(self) -> None:
        names = [worker.name for worker in self._cluster.workers]
        processes = await self._workers.processes()
        if self._json:
            say_event("workers", processes=dict(zip(names, processes, strict=True)))
        else:
            print_table(("worker", "process"), [*zip(names, map(str, processes), strict=True)])

    def _on_end(self, name: str, reason: str) -> None:
        note(f"{name} has ended: {reason}" if reason else f"{name} has left")
        if reason and not self.is_ready and self.failure is None:
            self.failure = BadSetup(f"worker {name!r} of {self._cluster.source} cannot serve: {reason}")
            signal.raise_signal(signal.SIGTERM)
