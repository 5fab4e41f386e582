"""`plait route` on a described swarm."""

import json
from pathlib import Path

import pytest
from running_plait import InProcess

SWARM = """
blocks: 24
rtts_s: {attic: 0.002, cellar: 0.002}
machines:
  - name: attic
    first_block: 0
    end_block: 14
    rates: {decode_tokens_per_s: 1200, prefill_tokens_per_s: 9000}
    rtts_s: {cellar: 0.0004}
  - {name: cellar, first_block: 10, end_block: 24, rates: {decode_tokens_per_s: 800}}
  - {name: laptop, first_block: 0, end_block: 24, rates: {decode_tokens_per_s: 300, prefill_tokens_per_s: 20000}}
"""


@pytest.fixture
def swarm(tmp_path: Path) -> str:
    file = tmp_path / "swarm.yaml"
    file.write_text(SWARM)
    return str(file)


def test_the_front_and_the_chosen_point_are_printed(plait: InProcess, swarm: str) -> None:
    said = plait("route", swarm, "--mode", "exact", "--pick", "throughput-first")
    assert said.exit_code == 0, said.stderr
    assert "whole front, 3 chains:" in said.stdout
    chosen = [line for line in said.stdout.splitlines() if line.startswith("*")]
    assert len(chosen) == 1 and chosen[0].endswith("laptop 0:24")


@pytest.mark.parametrize("mode", ["load", "latency", "throughput", "exact", "tradeoff"])
def test_every_mode_gives_a_chain(plait: InProcess, swarm: str, mode: str) -> None:
    routed = json.loads(plait("route", swarm, "--mode", mode, "--need-tokens", "100", "--json").stdout)
    assert routed["mode"] == mode
    assert routed["chain"][0]["first_block"] == 0 and routed["chain"][-1]["end_block"] == 24
    assert routed["chain"] in [member["chain"] for member in routed["front"]["members"]]
    assert all(
        len(member["values"]) == len(routed["front"]["objectives"]) for member in routed["front"]["members"]
    )
    assert routed["route_s"] > 0 and routed["reasons"]


def test_pinned_machines_are_named_and_json_is_a_description_too(
    plait: InProcess, tmp_path: Path, swarm: str
) -> None:
    pinned = plait("route", swarm, "--pinned", "attic,cellar", "--json")
    assert [hop["name"] for hop in json.loads(pinned.stdout)["chain"]] == ["attic", "cellar"]
    file = tmp_path / "swarm.json"
    file.write_text(
        json.dumps({"blocks": 2, "machines": [{"name": "one", "first_block": 0, "end_block": 2}]})
    )
    assert plait("route", str(file)).stdout.startswith("load: one 0:2\n")


def test_the_same_seed_gives_the_same_chain(plait: InProcess, swarm: str) -> None:
    def chain(seed: int) -> str:
        said = plait("route", swarm, "--mode", "throughput", "--seed", str(seed), "--json")
        return json.dumps(json.loads(said.stdout)["chain"])

    assert chain(3) == chain(3)
    assert len({chain(seed) for seed in range(12)}) > 1


def test_mistakes_are_one_line(plait: InProcess, tmp_path: Path, swarm: str) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("blocks: [")
    lacking = tmp_path / "lacking.yaml"
    lacking.write_text("blocks: 9\nmachines: [{name: one, first_block: 0, end_block: 2}]")
    for code, *arguments in (
        (2, str(tmp_path / "none.yaml")),
        (2, str(broken)),
        (2, swarm, "--mode", "fastest"),
        (2, swarm, "--pinned", "nobody"),
        (1, str(lacking)),
    ):
        result = plait("route", *arguments)
        assert result.exit_code == code, arguments
        assert result.stderr.startswith("plait: ") and "Traceback" not in result.stderr
    assert "blocks 2:9" in plait("route", str(lacking)).stderr
