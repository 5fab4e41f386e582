"""Machines whose pools of KV blocks are small, as real processes: each serves the whole model, behind one gateway."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from swarm.conditions import Conditions
from swarm.processes import PLAIT, START_S, Machine, SwarmOfProcesses
from swarm.unequal import SLOWED

from lending.model import Shape
from plait.engine import EngineOptions, open_checkpoint, read_span_sizes
from plait.transport import Identity

BLOCK_TOKENS = 16
# What a machine says is as old as its last announcement.
ANNOUNCE_S, SETTLED_S = 0.25, 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Between any two of the machines; the gateway is near all of them. `attend_times`: see `Conditions`."""

    one_way_s: float
    bytes_per_s: float


class SmallPools(SwarmOfProcesses):
    """Enter it to start all machines of `pools` (names, and their KV blocks); leaving ends them.

    `lending` goes to `plait join`, `gateway` to `plait serve`. `distance` puts machines further from each other;
    `attend_times` makes some take so many times as long to attend for others.
    """

    def __init__(
        self,
        model: Path,
        shape: Shape,
        pools: Mapping[str, int],
        lending: Sequence[str],
        *,
        gateway: Sequence[str] = (),
        distance: Distance | None = None,
        attend_times: Mapping[str, float] | None = None,
    ) -> None:
        options = (
            "--blocks",
            "none",
            "--dtype",
            "float32",
            "--set",
            f"swarm.announce_s={ANNOUNCE_S}",
            *gateway,
        )
        super().__init__(*options, model=str(model))
        self.pools = dict(pools)
        self._shape = shape
        self._lending = tuple(lending)
        self._distance = distance
        self._attend_times = dict(attend_times or {})
        sizes = read_span_sizes(
            open_checkpoint(model), EngineOptions(folder=model, dtype="float32", block_tokens=BLOCK_TOKENS)
        )
        self._block_bytes = sizes.kv_bytes(range(shape.blocks), BLOCK_TOKENS)

    def __enter__(self) -> "SmallPools":
        super().__enter__()
        try:
            self._peers = {name: self._identity(name) for name in self.pools}
            for name in self.pools:
                self.start_one(name)
            self.wait_ready(*self.pools)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_one(self, name: str) -> None:
        """Start a machine, or start it again."""
        memory_bytes = self.pools[name] * self._block_bytes
        # The model's files are here: nobody has to fetch them.
        model = ("--set", f"model.name={self._model}")
        flags = ("--kv-cache-memory", str(memory_bytes), "--no-rebalance", *model, *self._lending)
        self.start(name, f"0:{self._shape.blocks}", *flags, "--set", f"swarm.announce_s={ANNOUNCE_S}")

    def restart(self, name: str) -> None:
        """Start a machine that was killed again, and wait until it serves."""
        self.machines[name].end()
        self.start_one(name)
        self.wait_ready(name)

    def machine(self, name: str) -> dict[str, Any]:
        """What the gateway was told of a machine, a moment ago.

        Raises:
            KeyError: it does not know that machine.
        """
        return {each["name"]: each for each in self.status()["machines"]}[name]

    def loans(self, name: str) -> dict[str, Any]:
        """What a machine said of its loans, a moment ago."""
        return self.machine(name).get("lending") or {}

    def all_free_s(self, within_s: float, without: Collection[str] = ()) -> float | None:
        """Seconds until all pools (`without` some) say that they are free and stay so; None: not within that time."""
        began_s = time.monotonic()
        free_s: float | None = None
        while (now_s := time.monotonic()) - began_s < within_s + SETTLED_S:
            try:
                seen = {each["name"]: each for each in self.status()["machines"]}
                free = all(name in seen and is_free(seen[name]) for name in self.pools if name not in without)
            except httpx.HTTPError:
                free = False
            free_s = (free_s or now_s) if free else None
            if free_s is not None and now_s - free_s >= SETTLED_S:
                return free_s - began_s
            time.sleep(0.05)
        return None

    def wait_for(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds in what the gateway says."""

        def told() -> bool:
            try:
                return holds()
            except (httpx.HTTPError, KeyError):
                return False

        self.gateway.wait_for(told, what)

    def wait_online(self) -> None:
        """Wait until the gateway routes over all machines again."""
        self.gateway.wait_for(lambda: set(self.pools) <= self.online(), "all machines back")

    def wait_free(self) -> None:
        """Wait until nothing is used, lent or borrowed anywhere.

        Raises:
            RuntimeError: that does not come about.
        """
        if self.all_free_s(START_S) is None:
            raise RuntimeError(f"something is still held: {self.status()['machines']}")

    def _identity(self, name: str) -> str:
        keys = self._folder / name / "config" / "plait" / "swarm" / "identities"
        return Identity.load_or_make(keys / f"{name}.pem").peer

    def _start(self, name: str, arguments: Sequence[str]) -> Machine:
        self._started += 1
        return Machine(
            name,
            arguments,
            self._folder / name,
            self._folder / f"{name}-{self._started}.log",
            self._folder / "cache",
            program=self._program(name),
        )

    def _program(self, name: str) -> Sequence[str]:
        times = self._attend_times.get(name, 1.0)
        if name == "gateway" or (self._distance is None and times == 1.0):
            return PLAIT
        one_way_s = self._distance.one_way_s if self._distance else 0.0
        conditions = Conditions(
            one_way_s={peer: one_way_s for other, peer in self._peers.items() if other != name},
            pass_s=0.0,
            row_s=0.0,
            passes="",
            bytes_per_s=self._distance.bytes_per_s if self._distance else None,
            attend_times=times,
        )
        file = self._folder / f"{name}.json"
        conditions.write(file)
        return (*SLOWED, str(file))


def is_free(machine: Mapping[str, Any]) -> bool:
    """Whether a machine says that it holds nothing, neither its own nor others'."""
    loans = machine.get("lending") or {}
    return (
        machine["kv_free_tokens"] == machine["kv_total_tokens"] > 0
        and not machine["sessions"]
        and not loans.get("lent_blocks")
        and not loans.get("borrowed_blocks")
    )
