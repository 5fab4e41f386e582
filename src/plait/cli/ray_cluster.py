"""Workers on Ray: a placement group with room for each, and an actor in each place.

Ray is loaded here only, when a cluster is started. Its processes speak to each other as Ray does, which runs what it
is sent: whoever reaches a Ray cluster owns it. Nothing that comes from a swarm's members goes through it.
"""

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from plait.cli.ray_worker import RayWorker
from plait.cli.serving import is_loopback
from plait.errors import BadSetup
from plait.settings import Cluster

# The least that Ray takes for the memory that its objects share; no tensor of ours is among them.
OBJECT_STORE_BYTES = 80 << 20
# How long the address of a Ray cluster may take to answer.
ANSWER_S = 5.0


class RayCluster:
    """The workers of a cluster file; enter it to have Ray keep a place for each and start their processes.

    Leaving it ends them, and Ray itself if it was started here.

    Raises (on entering):
        BadSetup: Ray is not installed, does not answer, or has no room for the workers.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._actors: list[Any] = []

    def __enter__(self) -> Self:
        if self._cluster.is_local:
            # Ray listens on all addresses of the machine: nobody but its own processes is to know what it asks for.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._ray = _load_ray()  # which looks at these variables
        self._connect()
        try:
            self._check_reachable()
            self._place()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Actors and their places belong to this process: Ray ends them with it.
        self._ray.shutdown()

    async def processes(self) -> Sequence[int]:
        """The first process of each worker, once it can join; on whichever node Ray put it."""
        return await asyncio.gather(
            *(asyncio.wrap_future(actor.process.remote().future()) for actor in self._actors)
        )

    async def serve(self, ticket: str, on_end: Callable[[str, str], None]) -> None:
        """Have the workers join and serve; `on_end` gets the name of each that ends for good, and why."""

        async def watch(name: str, actor: Any) -> None:
            try:
                reason: str = await asyncio.wrap_future(actor.serve.remote(ticket).future())
            except self._ray.exceptions.RayError as error:
                reason = f"Ray gave it up: {error}".splitlines()[0]
            on_end(name, reason)

        workers = self._cluster.workers
        await asyncio.gather(
            *(watch(worker.name, actor) for worker, actor in zip(workers, self._actors, strict=True))
        )

    def _connect(self) -> None:
        cluster, options = self._cluster, {}
        if cluster.is_local:
            asked = sum(worker.bundle.get("CPU", 0.0) for worker in cluster.workers)
            options = {
                # It counts processors, and does not share them out; on one machine any number of workers may try.
                "num_cpus": max(os.cpu_count() or 1, int(asked) + 1),
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        try:
            host, _, port = cluster.ray.address.rpartition(":")
            if host:  # Ray itself asks for a quarter of an hour
                socket.create_connection((host, int(port)), ANSWER_S).close()
            self._ray.init(address=cluster.ray.address, logging_level="WARNING", **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise BadSetup(
                f"no Ray at 'ray.address' {cluster.ray.address!r} of {cluster.source}: {said[0]}; start one with "
                "'ray start --head', or leave the address out to have one on this machine"
            ) from error

    def _check_reachable(self) -> None:
        """Workers on other nodes must find the gateway."""
        listen = self._cluster.gateway.swarm.listen
        own = {"127.0.0.1", self._ray.util.get_node_ip_address(), socket.gethostname()}
        others = [
            node["NodeManagerAddress"]
            for node in self._ray.nodes()
            if node["Alive"] and node["NodeManagerAddress"] not in own
        ]
        if others and is_loopback(listen.rpartition(":")[0].strip("[]")):
            raise BadSetup(
                f"Ray's nodes are on other machines ({', '.join(others[:3])}), and only this one reaches the gateway "
                f"at {listen}; set 'gateway.listen' of {self._cluster.source} to an address of its network"
            )

    def _place(self) -> None:
        cluster = self._cluster
        bundles = [worker.bundle for worker in cluster.workers]
        scheduling = import_module("ray.util.scheduling_strategies")
        group = import_module("ray.util.placement_group").placement_group(
            bundles, strategy=cluster.ray.strategy, name=cluster.name
        )
        if not group.wait(cluster.ray.wait_s):
            free: dict[str, float] = self._ray.available_resources()
            has = ", ".join(f"{name} {amount:g}" for name, amount in free.items() if ":" not in name)
            raise BadSetup(
                f"Ray had no room for the {len(bundles)} workers of {cluster.source} within {cluster.ray.wait_s:g} s "
                f"(strategy {cluster.ray.strategy}); free are {has}; ask for less, or let nodes join it"
            )
        actor_class = self._ray.remote(RayWorker)
        for number, worker in enumerate(cluster.workers):
            amounts = dict(worker.bundle)
            options = {
                "num_cpus": amounts.pop("CPU", 0),
                "num_gpus": amounts.pop("GPU", 0),
                "memory": amounts.pop("memory", None),
                "resources": amounts,
                "max_restarts": cluster.ray.restarts,
                "max_task_retries": cluster.ray.restarts,
                "scheduling_strategy": scheduling.PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=number
                ),
            }
            self._actors.append(actor_class.options(**options).remote(worker.tree, cluster.source))


def _load_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise BadSetup(
            "plait up runs its workers on Ray, which is not installed: pip install 'plait[ray]'"
        ) from None
