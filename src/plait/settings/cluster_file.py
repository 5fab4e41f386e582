"""A cluster that one person administers, in one file: the model, its gateway, and the workers that Ray is to run.

    model: Qwen/Qwen3-8B
    gateway: {host: 127.0.0.1, port: 8000, listen: "10.0.0.1:7000"}
    ray: {address: auto, strategy: SPREAD}
    workers:
      - {count: 4, cpus: 8, memory: 20GB}
      - {cpus: 16, gpus: 1, device: cuda, blocks: "0:16", resources: {rack_1: 1}}
    settings: {swarm: {wire_format: int8}}

What has no field of its own goes into `settings`, which is a settings file for the gateway and all workers.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import ConfigDict, Field, ValidationError

from plait.errors import BadSetup
from plait.settings.load import Tree, settings_from
from plait.settings.tree import Blocks, Device, Listen, Section, Settings, SizeBytes

MAX_WORKERS = 1000
_LOOPBACK = "127.0.0.1:0"
_EVERYWHERE = "0.0.0.0:0"


class Gateway(Section):
    """The process that reads the file: where clients and workers reach it, and which blocks it serves itself."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    listen: Listen = _LOOPBACK
    blocks: Blocks = "none"


class Ray(Section):
    """`address` is local (one that starts and ends with the gateway), auto, or host:port of one that runs.

    `strategy` says how workers lie on Ray's nodes. Each is started again up to `restarts` times. The nodes may take
    `wait_s` until they have room for all.
    """

    address: str = Field(default="local", pattern=r"^(local|auto|[^/:]+:\d{1,5})$")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "SPREAD"
    restarts: int = Field(default=1000, ge=0)
    wait_s: float = Field(default=60.0, gt=0, le=86400)


class Workers(Section):
    """`count` equal workers. What Ray keeps for each: `cpus`, `gpus`, `resources` by their names, and `memory`, which
    is also how much weights and cache may take. What each serves, and with how many threads: by default `cpus`.
    """

    count: int = Field(default=1, ge=1, le=MAX_WORKERS)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    memory: SizeBytes | None = Field(default=None, ge=1)
    resources: dict[str, float] = Field(default_factory=dict[str, float])
    blocks: Blocks = "auto"
    threads: int | None = Field(default=None, ge=1)
    device: Device | None = None
    listen: Listen | None = None


class _Written(Section):
    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    name: str = Field(default="", max_length=48, pattern=r"^[A-Za-z0-9_-]*$")
    gateway: Gateway = Gateway()
    ray: Ray = Ray()
    workers: tuple[Workers, ...] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])


class ClusterWorker(Section):
    """One worker: its name, what Ray keeps for it, and its settings as a tree (`settings_from`)."""

    name: str
    bundle: dict[str, float]
    tree: dict[str, Any]


class Cluster(Section):
    """What a file says, with nothing left to decide. `source` is how errors name the file."""

    name: str
    source: str
    ray: Ray
    gateway: Settings
    workers: tuple[ClusterWorker, ...]

    @property
    def is_local(self) -> bool:
        """Its Ray is one of its own, on this machine."""
        return self.ray.address == "local"


def read_cluster(file: Path) -> Cluster:
    """Read and check a file; the settings of the gateway and of every worker too.

    Raises:
        BadSetup: it cannot be read, or something in it is wrong; the message says where, and what is.
    """
    source = f"the cluster file {str(file)!r}"
    try:
        read: object = yaml.safe_load(file.read_text())
    except OSError as error:
        raise BadSetup(f"{source} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSetup(f"{source} is not YAML: {error}".replace("\n", " ")) from error
    if not isinstance(read, dict):
        raise BadSetup(
            f"{source} must map names to values: 'model: tiny' and 'workers: [{{count: 2}}]' at least"
        )
    try:
        written = _Written.model_validate(read)
    except ValidationError as error:
        raise BadSetup(_explain(error, source)) from error
    return _decided(written, written.name or re.sub(r"[^A-Za-z0-9_-]", "-", file.stem)[:48], source)


def _decided(written: _Written, name: str, source: str) -> Cluster:
    gateway = written.gateway
    model = written.settings.get("model")
    if isinstance(model, dict) and "name" in model:
        raise BadSetup(
            f"{source} names the model twice: in 'model' and in 'settings.model.name'; leave out the latter"
        )
    own: Tree = {
        "model": {"name": written.model},
        "server": {"host": gateway.host, "port": gateway.port, "swarm": True},
        "swarm": {"name": f"{name}-gateway", "listen": gateway.listen, "blocks": gateway.blocks},
    }
    nearby = gateway.listen.startswith(("127.", "localhost:", "[::1]:"))
    workers: list[ClusterWorker] = []
    for index, group in enumerate(written.workers):
        for _ in range(group.count):
            tree = _worker_tree(group, f"{name}-{len(workers) + 1}", _LOOPBACK if nearby else _EVERYWHERE)
            bundle = {
                "CPU": group.cpus,
                "GPU": group.gpus,
                "memory": float(group.memory or 0),
                **group.resources,
            }
            workers.append(
                ClusterWorker(
                    name=tree["swarm"]["name"],
                    bundle={resource: amount for resource, amount in bundle.items() if amount},
                    tree=_merged(written.settings, tree),
                )
            )
        if not workers[-1].bundle:
            raise BadSetup(f"{source} lets Ray keep nothing for 'workers[{index}]'; give it some cpus")
        settings_from(workers[-1].tree, source)
    if len(workers) > MAX_WORKERS:
        raise BadSetup(f"{source} asks for {len(workers)} workers; the most are {MAX_WORKERS}")
    return Cluster(
        name=name,
        source=source,
        ray=written.ray,
        gateway=settings_from(_merged(written.settings, own), source),
        workers=tuple(workers),
    )


def _worker_tree(group: Workers, name: str, listen: str) -> Tree:
    engine: Tree = {"threads": group.threads or max(1, int(group.cpus))}
    swarm: Tree = {"name": name, "listen": group.listen or listen, "blocks": group.blocks}
    if group.device is not None:
        engine["device"] = group.device
    if group.memory is not None:
        swarm["memory"] = group.memory
    return {"engine": engine, "swarm": swarm}


def _merged(tree: Mapping[str, Any], over: Tree) -> Tree:
    """Two trees of sections; what `over` says counts."""
    merged = dict(tree)
    for section, values in over.items():
        below = merged.get(section)
        # What is no mapping is left as it is, for `settings_from` to refuse.
        merged[section] = {**cast(Tree, below), **values} if isinstance(below, dict) else below or values
    return merged


def _explain(error: ValidationError, source: str) -> str:
    """One sentence for the first mistake."""
    first = error.errors()[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    if first["type"] == "missing":
        return f"{source} has no {path!r}, and needs one"
    if first["type"] == "extra_forbidden":
        known = _fields_beside(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{source} has {path!r}, which is no field; {hint}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{source} has {path!r} as {first['input']!r}: {reason[0].lower()}{reason[1:]}"


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    parts: dict[int | str, type[Section]] = {"gateway": Gateway, "ray": Ray, "workers": Workers}
    return list(parts.get(location[0], _Written).model_fields if len(location) > 1 else _Written.model_fields)
