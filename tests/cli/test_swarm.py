"""A swarm of real processes: what it answers, what it says of itself, and how its machines come and go."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_plait import InProcess, RunningPlait, plait_environment

from plait import LLM, SamplingParams
from plait.engine import resolve_model

QUESTION = [{"role": "user", "content": "What is plait?"}]
GREEDY = {"messages": QUESTION, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
SEEDED = GREEDY | {"temperature": 1.2, "seed": 7}


class Swarm:
    """`plait serve tiny --swarm` and machines that join it, with homes of their own."""

    def __init__(self, folder: Path, stack: ExitStack, *arguments: str, model: str = "tiny") -> None:
        self._folder = folder
        self._stack = stack
        self._environment = plait_environment(folder / "gateway")
        self.gateway = stack.enter_context(
            RunningPlait("serve", model, "--swarm", "--port", "0", *arguments, environment=self._environment)
        )
        self.ticket = self.gateway.wait_for("plait join plait1").split()[-1]
        self.machines: dict[str, RunningPlait] = {}

    def join(self, name: str, *arguments: str) -> RunningPlait:
        machine = RunningPlait(
            "join",
            self.ticket,
            "--name",
            name,
            *arguments,
            environment=plait_environment(self._folder / name),
        )
        self.machines[name] = self._stack.enter_context(machine)
        return machine

    @property
    def origin(self) -> str:
        return self.gateway.origin

    def chat(self, **fields: Any) -> dict[str, Any]:
        answer = httpx.post(self.origin + "/v1/chat/completions", json=fields, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def status(self) -> dict[str, Any]:
        return httpx.get(self.origin + "/swarm/status").json()


@contextmanager
def swarm(folder: Path, *arguments: str) -> Iterator[Swarm]:
    with ExitStack() as stack:
        yield Swarm(folder, stack, *arguments)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two processes, each with half of the model's blocks."""
    with swarm(tmp_path_factory.mktemp("pair"), "--blocks", "0:3") as it:
        it.join("back", "--blocks", "3:6").wait_for("ready:")
        it.gateway.wait_for("ready:")
        yield it


def expected(**fields: Any) -> dict[str, Any]:
    """What one machine answers."""
    with LLM("tiny", threads=1) as llm:
        params = SamplingParams(
            max_tokens=fields["max_tokens"], temperature=fields["temperature"], seed=fields.get("seed")
        )
        output = llm.chat(fields["messages"], params)
    return {"text": output.outputs[0].text, "token_ids": list(output.outputs[0].token_ids)}


@pytest.mark.parametrize("asked", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_two_processes_answer_as_one_does(pair: Swarm, asked: dict[str, Any]) -> None:
    one = expected(**asked)
    choice = pair.chat(**asked)
    assert choice["token_ids"] == one["token_ids"]
    assert choice["message"]["content"] == one["text"]


def test_status_shows_machines_spans_and_links(pair: Swarm, plait: InProcess) -> None:
    base_url = pair.origin + "/v1"
    shown = json.loads(plait("status", "--base-url", base_url, "--json").stdout)
    spans = {(m["name"], m["first_block"], m["end_block"], m["state"]) for m in shown["machines"]}
    assert ("back", 3, 6, "online") in spans
    assert shown["missing_blocks"] == "" and shown["blocks"] == 6
    assert any(machine["decode_tokens_per_s"] > 0 for machine in shown["machines"])
    table = plait("status", "--base-url", base_url).stdout
    assert "back" in table and "3:6" in table
    advice = plait("status", "--advice", "--base-url", base_url).stdout
    assert "for one user" in advice and "without it, blocks" in advice
    again = plait("status", "--ticket", "--base-url", base_url).stdout
    assert again.startswith("plait join plait1")


def test_a_request_may_name_the_machines_that_answer_it(pair: Swarm) -> None:
    front = next(machine["name"] for machine in pair.status()["machines"] if machine["is_gateway"])
    pinned = pair.chat(**GREEDY, route={"pinned": [front, "back"]})
    assert pinned["token_ids"] == pair.chat(**GREEDY, route={"mode": "latency"})["token_ids"]
    url = pair.origin + "/v1/chat/completions"
    for route in ({"mode": "fastest"}, {"pinned": ["nobody"]}):
        refused = httpx.post(url, json=GREEDY | {"route": route}, timeout=60)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "route"


def test_a_route_can_be_asked_for_without_a_request(pair: Swarm) -> None:
    asked = {"route": {"mode": "exact"}, "need_tokens": 100}
    answer = httpx.post(pair.origin + "/swarm/route", json=asked).json()
    assert [(hop["first_block"], hop["end_block"]) for hop in answer["chain"]] == [(0, 3), (3, 6)]
    assert answer["front"]["exact"] and answer["front"]["members"]


def test_the_route_is_printed_with_its_front(pair: Swarm, plait: InProcess) -> None:
    base_url = pair.origin + "/v1"
    shown = plait("route", "--mode", "exact", "--base-url", base_url)
    assert shown.exit_code == 0, shown.stderr
    assert "back 3:6" in shown.stdout
    routed = json.loads(plait("route", "--mode", "latency", "--base-url", base_url, "--json").stdout)
    assert routed["mode"] == "latency" and routed["expected_step_s"] > 0
    refused = plait("route", "--mode", "fastest", "--base-url", base_url)
    assert refused.exit_code == 2 and "unknown" in refused.stderr


def test_a_ticket_that_is_none_is_one_sentence(plait: InProcess) -> None:
    result = plait("join", "plait1nonsense")
    assert result.exit_code == 2
    assert "not copied whole" in result.stderr and len(result.stderr.splitlines()) == 1


def test_blocks_that_are_none_are_one_sentence(plait: InProcess) -> None:
    result = plait("join", "plait1nonsense", "--blocks", "3:1")
    assert result.exit_code == 2
    assert "first:end" in result.stderr


def test_status_of_a_server_without_a_swarm_says_so(server: RunningPlait, plait: InProcess) -> None:
    result = plait("status", "--base-url", server.origin + "/v1", "--api-key", "sk-test")
    assert result.exit_code == 2
    assert "not part of a swarm" in result.stderr


@pytest.mark.slow
def test_machines_choose_leave_and_come_back(tmp_path: Path, plait: InProcess) -> None:
    with swarm(tmp_path, "--blocks", "none", "--set", "swarm.announce_s=0.5") as it:
        health = httpx.get(it.origin + "/health")
        assert health.status_code == 503
        one = it.join("one", "--memory", "52MB")
        assert "blocks" in one.wait_for("ready:")
        it.join("two").wait_for("ready:")
        it.gateway.wait_for("ready:")
        assert it.chat(**GREEDY)["token_ids"] == expected(**GREEDY)["token_ids"]
        assert plait("leave", "two", "--base-url", it.origin + "/v1").exit_code == 0
        assert it.machines["two"].wait() == 0
        assert "left" in it.machines["two"].lines
        it.join("three").wait_for("ready:")
        assert it.chat(**GREEDY)["token_ids"] == expected(**GREEDY)["token_ids"]
        it.gateway.signal(signal.SIGTERM)
        assert it.gateway.wait() == 0


def test_an_answer_survives_the_process_that_computes_it(pair: Swarm) -> None:
    asked = {"prompt": "plait is", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    expected_text = httpx.post(pair.origin + "/v1/completions", json=asked, timeout=60).json()["choices"][0][
        "text"
    ]
    pair.join("spare", "--blocks", "3:6").wait_for("ready:")
    front = next(machine["name"] for machine in pair.status()["machines"] if machine["is_gateway"])
    body = asked | {"stream": True, "route": {"pinned": [front, "back"]}}
    text = ""
    with httpx.stream("POST", pair.origin + "/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            pair.machines["back"].signal(signal.SIGKILL)
    assert text == expected_text
    assert pair.status()["recoveries_total"] >= 1


@pytest.mark.slow
def test_another_gateway_of_the_swarm_answers_the_same(tmp_path: Path) -> None:
    with swarm(tmp_path) as it:
        it.gateway.wait_for("ready:")
        environment = plait_environment(tmp_path / "second")
        more = ("--blocks", "none", "--ticket", it.ticket, "--json", "--port", "0")
        with RunningPlait("serve", "tiny", "--swarm", *more, environment=environment) as second:
            base_url = json.loads(second.wait_for("listening"))["base_url"]
            assert it.ticket not in second.said
            joined = json.loads(second.wait_for('"swarm"'))
            assert joined["join"].startswith("plait join plait1")
            second.wait_for("ready")
            answer = httpx.post(base_url + "/chat/completions", json=GREEDY, timeout=60).json()
            assert answer["choices"][0]["token_ids"] == it.chat(**GREEDY)["token_ids"]


@pytest.mark.slow
def test_a_model_that_only_the_gateway_has_comes_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(resolve_model("tiny"), folder)
    with ExitStack() as stack:
        it = Swarm(tmp_path, stack, "--blocks", "0:2", model=str(folder))
        it.join("back", "--blocks", "2:6").wait_for("ready:")
        it.gateway.wait_for("ready:")
        assert it.chat(**GREEDY)["token_ids"] == expected(**GREEDY)["token_ids"]
        (note,) = (tmp_path / "back").rglob("plait-partial.json")
        kept = json.loads(note.read_text())
        assert "config.json" in kept["files"] and "1" in kept["pieces"]["model.safetensors"]
        it.machines["back"].signal(signal.SIGTERM)
        assert it.machines["back"].wait() == 0
        refused = it.join("lazy", "--weights", "cache")
        assert refused.wait() == 2
        assert "is not on this machine" in refused.errors.splitlines()[-1]


@pytest.mark.slow
def test_machines_come_back_to_a_gateway_that_was_started_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = Swarm(tmp_path, stack, "--blocks", "0:3")
        first.join("back", "--blocks", "3:6").wait_for("ready:")
        first.gateway.wait_for("ready:")
        answer = first.chat(**GREEDY)["token_ids"]
        first.gateway.signal(signal.SIGKILL)
        first.gateway.wait()
        again = Swarm(tmp_path, stack, "--blocks", "0:3")
        again.gateway.wait_for("ready:")
        assert again.chat(**GREEDY)["token_ids"] == answer
        # The old ticket still lets machines in.
        again.ticket = first.ticket
        again.join("late", "--blocks", "3:6").wait_for("ready:")
