"""A swarm over more than loopback: capped cables, one of which is pulled, and hosts that nobody can dial."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from namespace_rig import Cabled, HostProcess, cabled_or_skip, until

from plait import LLM, SamplingParams
from plait.engine import resolve_model

PROMPT = list(range(300, 332))


class Swarm:
    """`plait serve --swarm` in the first host, which computes nothing, and machines that join by its ticket."""

    def __init__(self, network: Cabled, folder: Path, stack: ExitStack, *, model: str = "tiny") -> None:
        self.network = network
        self._folder = folder
        self._stack = stack
        self.host, address = next(iter(network.addresses.items()))
        listen = ("--swarm-listen", f"{address}:7000")
        self.gateway = self._start(
            self.host, "serve", model, "--swarm", "--port", "8000", "--blocks", "none", *listen
        )
        self.ticket = self.gateway.wait_for(r"plait join (plait1\S+)")

    def join(self, host: str, blocks: str, *arguments: str) -> HostProcess:
        named = ("--name", host, "--blocks", blocks, "--set", "swarm.announce_s=1")
        return self._start(host, "join", self.ticket, *named, *arguments)

    def machine(self, name: str) -> dict[str, Any]:
        """What the gateway says of a machine; nothing while it does not know it."""
        return next((machine for machine in self.status()["machines"] if machine["name"] == name), {})

    def status(self) -> dict[str, Any]:
        return self.network.inside(
            self.host, lambda: httpx.get("http://127.0.0.1:8000/swarm/status", timeout=30).json()
        )

    def wait_serving(self, *names: str) -> None:
        """Until the gateway routes over these machines."""
        for name in names:
            until(lambda name=name: self._serves(name), lambda name=name: f"{name}: {self.status()}")

    def _serves(self, name: str) -> bool:
        machine = self.machine(name)
        return bool(machine) and machine["state"] == "online" and machine["linked"] and not machine["banned"]

    def ask(self, tokens: int, **events: Any) -> list[int]:
        """Stream an answer; `events` are the route, and `at`: what to do once so many tokens have come."""
        at = dict(events.pop("at", {}))
        body = {
            "prompt": PROMPT,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": 5,
            "stream": True,
            "return_token_ids": True,
            **events,
        }

        def stream() -> list[int]:
            token_ids: list[int] = []
            url = "http://127.0.0.1:8000/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=180) as response:
                assert response.status_code == 200, response.read()
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    token_ids += event["choices"][0].get("token_ids") or []
                    for count in [count for count in at if len(token_ids) >= count]:
                        at.pop(count)()
            return token_ids

        return self.network.inside(self.host, stream)

    def _start(self, host: str, *arguments: str) -> HostProcess:
        return self._stack.enter_context(HostProcess(self.network, host, self._folder, *arguments))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as it:
        yield it


def cabled(stack: ExitStack, *hosts: str) -> Cabled:
    network = cabled_or_skip(hosts)
    stack.push(network)
    return network


def of_one_machine(tokens: int) -> list[int]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=5)
    with LLM("tiny", threads=1) as llm:
        (output,) = llm.generate([PROMPT], params)
    return list(output.outputs[0].token_ids)


def test_machines_that_nobody_can_dial_answer_through_the_one_they_dialled(
    tmp_path: Path, stack: ExitStack
) -> None:
    swarm = Swarm(cabled(stack, "gate", "front", "back"), tmp_path, stack)
    for host, blocks in (("front", "0:3"), ("back", "3:6")):
        swarm.join(host, blocks)  # they listen on their own loopback
    swarm.wait_serving("front", "back")
    before_bytes = swarm.network.sent_bytes("front")
    assert swarm.ask(40) == of_one_machine(40)
    # Hidden states of 40 tokens went over its cable: there is no other way to the next machine.
    assert swarm.network.sent_bytes("front") - before_bytes > 40 * 4 * 256
    gateway = swarm.status()["gateway"]
    for host in ("front", "back"):
        assert swarm.machine(host)["addresses"] == []
        assert swarm.machine(host)["through"] == [gateway]


@pytest.mark.slow
def test_an_answer_outlives_a_pulled_cable_and_the_machine_comes_back(
    tmp_path: Path, stack: ExitStack
) -> None:
    """Blocks 0:3 have one machine, 3:6 two; all of them take the weights over the cables."""
    network = cabled(stack, "gate", "front", "back", "spare")
    weights = tmp_path / "somebody's model"
    shutil.copytree(resolve_model("tiny"), weights)
    swarm = Swarm(network, tmp_path, stack, model=str(weights))
    spans = {"front": "0:3", "back": "3:6", "spare": "3:6"}
    for host, blocks in spans.items():
        swarm.join(host, blocks, "--swarm-listen", f"{network.addresses[host]}:7000")
    swarm.wait_serving(*spans)
    assert network.sent_bytes("gate") > weights.joinpath("model.safetensors").stat().st_size / 2
    over_back = {"pinned": ["front", "back"]}
    whole = of_one_machine(400)

    # Over to the spare, with the same tokens.
    assert swarm.ask(400, route=over_back, at={20: lambda: network.pull("back")}) == whole
    recoveries = swarm.status()["recoveries_total"]
    assert recoveries >= 1
    assert not swarm.machine("back") or not swarm.machine("back")["linked"]
    network.plug("back")
    swarm.wait_serving("back")
    tokens_before = swarm.machine("back")["gateway_tokens_total"]
    assert swarm.ask(30, route=over_back) == whole[:30]
    assert swarm.machine("back")["gateway_tokens_total"] == tokens_before + 30

    # Nobody else has 0:3: the answer waits until the cable is back.
    def pull_and_plug_later() -> None:
        network.pull("front")
        until(lambda: "0:3" in swarm.status()["missing_blocks"], lambda: f"{swarm.status()}")
        network.plug("front")

    assert swarm.ask(400, at={20: pull_and_plug_later}) == whole
    assert swarm.status()["recoveries_total"] > recoveries
    swarm.wait_serving(*spans)
