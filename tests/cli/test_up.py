"""`plait up`: a cluster file on a Ray of this machine. Without Ray installed, what is said about that."""

import json
import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from running_plait import InProcess, RunningPlait, plait_environment

has_ray = find_spec("ray") is not None
FILE = """
model: tiny
gateway: {port: 0}
workers:
  - {count: 2, cpus: 0.5, threads: 1, blocks: "0:3"}
  - {cpus: 0.5, threads: 1, blocks: "3:6"}
settings: {swarm: {announce_s: 0.5}, log: {level: warning}}
"""
DEADLINE_S = 280.0  # a Ray and four processes that import torch
ASKED = {"prompt": "plait is", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def write(folder: Path, text: str) -> str:
    file = folder / "lab.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.skipif(has_ray, reason="Ray is installed: pip uninstall ray")
def test_without_ray_it_says_what_to_install(plait: InProcess, tmp_path: Path) -> None:
    result = plait("up", write(tmp_path, FILE))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("pip install 'plait[ray]'")


def test_a_file_with_a_mistake_starts_nothing(plait: InProcess, tmp_path: Path) -> None:
    result = plait("up", write(tmp_path, FILE.replace("cpus", "cores")))
    assert result.exit_code == 2 and not result.stdout
    assert "'workers[0].cores', which is no field" in result.stderr


class Lab:
    """`plait up`, and what it says."""

    def __init__(self, process: RunningPlait) -> None:
        self.process = process
        self.url = json.loads(process.wait_for('"listening"'))["base_url"]
        workers = json.loads(process.wait_for('"workers"'))
        self.processes: dict[str, int] = workers["processes"]
        process.wait_for('"ready"')

    def ask(self, *names: str) -> str:
        asked = ASKED | {"route": {"pinned": list(names)}}
        answer = httpx.post(f"{self.url}/completions", json=asked, timeout=100)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def wait_online(self, name: str) -> None:
        """Until the test's own time is over."""
        while self.states().get(name) != "online":
            time.sleep(0.2)

    def states(self) -> dict[str, str]:
        status = httpx.get(self.url.removesuffix("/v1") + "/swarm/status").json()
        return {machine["name"]: machine["state"] for machine in status["machines"]}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    environment = plait_environment(folder)
    arguments = ("up", write(folder, FILE), "--json")
    with RunningPlait(*arguments, environment=environment, deadline_s=DEADLINE_S) as process:
        yield Lab(process)


@pytest.mark.slow
@pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install 'plait[ray]'")
def test_an_answer_outlives_a_worker_that_ray_starts_again(lab: Lab) -> None:
    assert set(lab.processes) == {"lab-1", "lab-2", "lab-3"}
    expected = lab.ask("lab-1", "lab-3")
    text, killed = "", False
    body = ASKED | {"stream": True, "route": {"pinned": ["lab-1", "lab-3"]}}
    with httpx.stream("POST", f"{lab.url}/completions", json=body, timeout=100) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += "".join(choice["text"] for choice in event["choices"])
                if not killed:
                    os.kill(lab.processes["lab-1"], signal.SIGKILL)
                    killed = True
    assert text == expected
    assert not Path(f"/proc/{lab.processes['lab-1']}").exists()
    # Nobody else is called lab-1: it is there once Ray has started it again.
    lab.wait_online("lab-1")
    assert lab.ask("lab-1", "lab-3") == expected
    assert lab.states() == dict.fromkeys(("lab-gateway", "lab-1", "lab-2", "lab-3"), "online")


@pytest.mark.slow
@pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install 'plait[ray]'")
def test_the_workers_end_with_the_gateway(lab: Lab) -> None:
    lab.process.signal(signal.SIGTERM)
    assert lab.process.wait() == 0, lab.process.said
    assert json.loads(lab.process.lines[-1]) == {"event": "stopped"}
    assert not any(Path(f"/proc/{process}").exists() for process in lab.processes.values())


@pytest.mark.slow
@pytest.mark.skipif(not has_ray, reason="Ray is not installed: pip install 'plait[ray]'")
def test_workers_that_cannot_serve_end_it_with_their_reason(tmp_path: Path) -> None:
    text = FILE.replace('"3:6"', '"3:60"')  # tiny has six
    arguments, environment = ("up", write(tmp_path, text)), plait_environment(tmp_path)
    with RunningPlait(*arguments, environment=environment, deadline_s=DEADLINE_S) as process:
        assert process.wait() == 2, process.said
        assert "worker 'lab-3' of the cluster file" in process.errors.splitlines()[-1], process.said
