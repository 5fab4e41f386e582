"""What scenarios say of costs: several devices in a machine, profiles of other machines, how well devices are used."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import plait.model
from plait.costs import format_profile
from plait.errors import BadSetup
from plait.profiler import shipped_profile
from plait.simulator import objectives_of, parse_scenario, report_of, run_of_scenario

GPUS = """
model: opt-66b
machines:
  - {name: node, device: a100-40gb, devices: 4}
workload: {requests: 20, lengths: sharegpt-like, rate_per_s: 2}
"""
CPU = """
model: opt-13b
machines:
  - {name: box, profile: box.json, kv_memory: 1GiB, extrapolate: true}
workload: {requests: 4, lengths: equal, rate_per_s: 1}
"""


def report(text: str, folder: Path) -> dict[str, Any]:
    scenario = parse_scenario(text, "test.yaml")
    run = run_of_scenario(scenario, folder)
    run.run()
    return report_of(run, objectives_of(scenario))


def test_devices_of_a_machine_pay_for_their_collectives(tmp_path: Path) -> None:
    found, slower, given = (
        report(GPUS.replace("devices: 4", devices), tmp_path)
        for devices in ("devices: 4", "devices: 4, interconnect: pcie4", "devices: 8, interconnect: nvlink3")
    )
    gaps_s = [each["latency_s"]["itl"]["p50"]["value"] for each in (found, slower, given)]
    # A token reads 131 GB of weights at 80 % of four times 1,555 GB/s, and waits for 129 sums of 11 us or more.
    assert 0.0264 + 129 * 6.4e-6 < gaps_s[0] < 0.032
    assert gaps_s[1] > gaps_s[0] > gaps_s[2] > gaps_s[0] / 2


def test_how_well_devices_are_used_is_reported(tmp_path: Path) -> None:
    node = report(GPUS, tmp_path)["machines"]["node"]
    # Decoding a few sequences reads weights nearly all the time, at 0.8 of the bandwidth; sums wait.
    assert 0.6 < node["mbu_fraction"] < 0.8
    assert 0 < node["mfu_fraction"] < 0.2
    prompts = report(GPUS.replace("sharegpt-like", "arxiv-summarization"), tmp_path)["machines"]["node"]
    assert prompts["mfu_fraction"] > 2 * node["mfu_fraction"]
    linear = GPUS.replace("device: a100-40gb, devices: 4", "linear: {per_step_s: 0.02}, kv_memory: 8GiB")
    assert report(linear, tmp_path)["machines"]["node"]["mfu_fraction"] is None
    json.dumps(node)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ("device: a100-40gb, devices: 7", "7 devices cannot divide 72 heads"),
        ("device: m2-ultra, devices: 2", "not known what joins several 'm2-ultra'"),
        ("device: a100-40gb, devices: 4, interconnect: rope", "no interconnect is called 'rope'"),
        ("linear: {per_step_s: 1}, kv_memory: 1GiB, devices: 2", "2 devices, and what they cost together"),
    ],
)
def test_devices_that_cannot_work_together_are_refused(machine: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=message):
        report(GPUS.replace("device: a100-40gb, devices: 4", machine), tmp_path)


def test_a_profile_of_another_machine_has_to_be_forced(tmp_path: Path) -> None:
    profile = shipped_profile("tiny-zen4")
    other = replace(
        profile,
        model=replace(profile.model, model_blocks=40, end_block=40, first_block=34),
        fingerprint={**profile.fingerprint, "processor": "an abacus"},
    )
    (tmp_path / "box.json").write_text(format_profile(other))
    with pytest.raises(BadSetup, match=r"processor 'an abacus' there and '.+' here.*force_profile"):
        report(CPU, tmp_path)
    forced = report(CPU.replace("extrapolate", "force_profile: true, extrapolate"), tmp_path)
    assert forced["requests"]["finished"] == 4


def test_a_shipped_profile_is_named_without_a_path() -> None:
    """Wherever this runs: forced, since the machine may be another one."""
    tiny = CPU.replace("opt-13b", "tiny").replace("box.json", "tiny-zen4, force_profile: true")
    assert report(tiny, Path(plait.model.__file__).parent)["requests"]["finished"] == 4
    with pytest.raises(BadSetup, match=r"cannot read the profile '.*tiny-zen9'"):
        report(tiny.replace("zen4", "zen9"), Path(plait.model.__file__).parent)
