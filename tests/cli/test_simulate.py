"""`plait simulate`."""

import json
from pathlib import Path

import pytest
from running_plait import InProcess

SCENARIO = """
name: two small machines
model: opt-13b
machines:
  - {name: gpu, count: 2, linear: {per_step_s: 0.01, per_token_s: 0.0001}, kv_memory: 4GiB}
workload: {requests: 20, lengths: uniform, rate_per_s: 4}
objectives: {ttft_s: 1.0}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    file = tmp_path / "scenario.yaml"
    file.write_text(SCENARIO)
    return str(file)


def test_a_scenario_is_run_and_reported(plait: InProcess, scenario: str) -> None:
    said = plait("simulate", scenario)
    assert said.exit_code == 0, said.stderr
    assert "two small machines, seed 0" in said.stdout and "20 offered, 20 finished" in said.stdout
    assert "gpu-0" in said.stdout and "ttft" in said.stdout


def test_programs_get_json_and_the_same_twice(plait: InProcess, scenario: str) -> None:
    first, second = (plait("simulate", scenario, "--json").stdout for _ in range(2))
    assert first == second
    assert json.loads(first)["latency_s"]["ttft"]["count"] == 20
    other = json.loads(plait("simulate", scenario, "--json", "--seed", "5").stdout)
    assert other["seed"] == 5 and other["digest"] != json.loads(first)["digest"]


def test_a_timeline_and_a_plot_are_written(plait: InProcess, scenario: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    said = plait("simulate", scenario, "--trace", str(trace), "--plot", str(plot))
    assert said.exit_code == 0, said.stderr
    assert json.loads(trace.read_text())["traceEvents"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_run_can_be_stopped_at_an_event(plait: InProcess, scenario: str) -> None:
    stopped = json.loads(plait("simulate", scenario, "--until-event", "30", "--json").stdout)
    assert stopped["events"] == 30 and len(stopped["latest"]) == 20


def test_what_cannot_be_simulated_is_said_in_one_line(plait: InProcess, tmp_path: Path) -> None:
    said = plait("simulate", "nothing")
    assert said.exit_code == 2 and "embedded ones are lending, replicas, swarm" in said.stderr
    file = tmp_path / "wrong.yaml"
    file.write_text(SCENARIO.replace("kv_memory", "kv_memry"))
    said = plait("simulate", str(file))
    assert said.exit_code == 2
    assert "wrong.yaml: there is no field 'machines.0.kv_memry'; did you mean 'kv_memory'?" in said.stderr
