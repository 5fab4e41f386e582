"""Machines of different speeds at different distances, as real processes of this one.

What is injected: the round trip between the places of two machines, and how long a block takes (`PASS_S`, and `ROW_S`
for each token, times the machine's slowdown). Everything else, rates and round trips that machines announce included,
is what plait itself does and measures.
"""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

from plait.engine import resolve_model
from plait.ids import PeerId
from plait.transport import Identity
from swarm.conditions import Conditions
from swarm.processes import START_S, Machine

PASS_S, ROW_S = 0.003, 0.0004
"""Of one block on a machine that is not slowed down, for a pass and for each of its tokens: long beside what a block
of this model and a message of this swarm really take here."""
BLOCKS = 16
SLOWED = (str(Path(__file__).with_name("slowed.py")),)


@dataclass(frozen=True, slots=True)
class Worker:
    """A machine that serves blocks, how many times slower it is than others, and where it is."""

    name: str
    place: str
    blocks: range
    slowdown: float


@dataclass(frozen=True, slots=True)
class Layout:
    """Who is there. `rtts_s`: between two places, or within one."""

    workers: tuple[Worker, ...]
    gateways: Mapping[str, str]
    rtts_s: Mapping[frozenset[str], float]

    @property
    def places(self) -> dict[str, str]:
        """Of all machines."""
        return {worker.name: worker.place for worker in self.workers} | dict(self.gateways)

    def rtt_s(self, one: str, other: str) -> float:
        """Between two machines."""
        return self.rtts_s[frozenset((self.places[one], self.places[other]))]


class UnequalSwarm:
    """The processes of a layout; enter it to start them all, leave it to end them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.machines: dict[str, Machine] = {}
        self.origins: dict[str, str] = {}
        self.peers: dict[str, PeerId] = {}
        self.names: dict[str, str] = {}
        """By the first eight letters of a peer's id, as logs have it."""
        self._http = httpx.Client(timeout=60)

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="plait-unequal-"))
        try:
            self._model = self._folder / "llama-16"
            make_model(self._model, BLOCKS)
            for name in self.layout.places:
                keys = self._folder / name / "config" / "plait" / "swarm" / "identities"
                self.peers[name] = Identity.load_or_make(keys / f"{name}.pem").peer
            self.names = {peer[:8]: name for name, peer in self.peers.items()}
            self._start_gateways()
            for worker in self.layout.workers:
                self._start(worker.name, worker.slowdown, "join", self._ticket, *_join_flags(worker))
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()
        for machine in self.machines.values():
            machine.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def status(self, gateway: str) -> dict[str, Any]:
        return self._http.get(self.origins[gateway] + "/swarm/status").json()

    def route(self, gateway: str, route: Mapping[str, Any]) -> dict[str, Any]:
        """What such a request would get now."""
        return self._http.post(self.origins[gateway] + "/swarm/route", json={"route": route}).json()

    def tokens_by_machine(self) -> Counter[str]:
        """Tokens of answers that went through each machine so far."""
        seen: Counter[str] = Counter()
        for gateway in self.origins:
            for machine in self.status(gateway)["machines"]:
                seen[machine["name"]] += machine["gateway_tokens_total"]
        return seen

    def wait_quiet(self) -> None:
        """Wait until no machine announces a session to any gateway."""
        deadline_s = time.monotonic() + START_S
        while any(
            machine["sessions"] for gateway in self.origins for machine in self.status(gateway)["machines"]
        ):
            if time.monotonic() > deadline_s:
                raise RuntimeError("machines announce sessions though nobody asks")
            time.sleep(0.25)

    def late_fractions(self) -> dict[str, dict[str, float]]:
        """How much longer than they should the passes of each machine took, of the reports since the start."""
        found: dict[str, dict[str, float]] = {}
        for worker in self.layout.workers:
            file = self._folder / f"{worker.name}.passes"
            reports = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            if reports:
                medians, tails = (
                    [report[f"late_fraction_{which}"] for report in reports] for which in ("median", "p95")
                )
                found[worker.name] = {
                    "passes": reports[-1]["passes"],
                    "median": round(float(np.median(medians)), 4),
                    "p95": round(float(np.median(tails)), 4),
                }
        return found

    def _start_gateways(self) -> None:
        common = ("--swarm", "--port", "0", "--json", "--blocks", "none")
        for gateway in self.layout.gateways:
            ticket = ("--ticket", self._ticket) if self.origins else ()
            named = ("--set", f"swarm.name={gateway}")
            self._start(gateway, 1.0, "serve", str(self._model), *common, *named, *ticket)
            machine = self.machines[gateway]
            said = machine.wait_for(lambda machine=machine: _events(machine).get("swarm"), "the ticket")
            if not self.origins:
                self._ticket = said["ticket"]
            self.origins[gateway] = _events(machine)["listening"]["base_url"].removesuffix("/v1")

    def _start(self, name: str, slowdown: float, *arguments: str) -> None:
        places = self.layout.places
        conditions = Conditions(
            one_way_s={
                self.peers[other]: self.layout.rtt_s(name, other) / 2 for other in places if other != name
            },
            pass_s=slowdown * PASS_S,
            row_s=slowdown * ROW_S,
            passes=str(self._folder / f"{name}.passes"),
        )
        file = self._folder / f"{name}.json"
        conditions.write(file)
        home = self._folder / name
        # Each has a cache of its own: what it measured would be taken for what the next one measured.
        self.machines[name] = Machine(
            name, arguments, home, self._folder / f"{name}.log", home / "cache", program=(*SLOWED, str(file))
        )

    def _wait_ready(self) -> None:
        for worker in self.layout.workers:
            machine = self.machines[worker.name]
            machine.wait_for(lambda machine=machine: machine.said.strip(), "serving")
        for gateway in self.origins:
            self.machines[gateway].wait_for(lambda gateway=gateway: self._is_known(gateway), "a whole view")

    def _is_known(self, gateway: str) -> bool:
        """This gateway knows all workers' rates, and its and their round trips to those that follow them."""
        try:
            status = self.status(gateway)
            machines = {machine["name"]: machine for machine in status["machines"]}
            workers = [machines[worker.name] for worker in self.layout.workers]
        except (httpx.HTTPError, KeyError):
            return False
        links = {frozenset((link["from"], link["to"])) for link in status["links"]}
        outer = [
            machine for machine in workers if machine["first_block"] == 0 or machine["end_block"] == BLOCKS
        ]
        return (
            all(machine["state"] == "online" and machine["decode_tokens_per_s"] for machine in workers)
            and all(machine["rtt_s"] for machine in outer)
            and all(
                frozenset((one["peer"], other["peer"])) in links
                for one, other in permutations(workers, 2)
                if one["end_block"] % BLOCKS in range(other["first_block"], other["end_block"])
            )
        )


def make_model(folder: Path, blocks: int) -> None:
    """A Llama with the shapes and the tokenizer of `tiny`, more blocks, and random weights."""
    import torch
    from safetensors.torch import load_file, save_file

    tiny = resolve_model("tiny")
    folder.mkdir()
    for file in tiny.glob("*.j*"):
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    config = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(tiny / "model.safetensors")
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).to(dtype)

    made: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if ".layers." not in name:
            made[name] = tensor.clone() if tensor.ndim == 1 else drawn(tensor.shape, tensor.dtype)
        elif ".layers.0." in name:
            for block in range(blocks):
                shape, dtype = tensor.shape, tensor.dtype
                drawn_or_one = torch.ones(shape, dtype=dtype) if tensor.ndim == 1 else drawn(shape, dtype)
                made[name.replace(".layers.0.", f".layers.{block}.")] = drawn_or_one
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})


def _join_flags(worker: Worker) -> tuple[str, ...]:
    blocks = f"{worker.blocks.start}:{worker.blocks.stop}"
    return ("--name", worker.name, "--blocks", blocks, "--json")


def _events(machine: Machine) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in machine.said.splitlines() if line.endswith("}")]
    return {line["event"]: line for line in lines}
