"""The embedded model, measured here in a few seconds: what comes out is a cost model of this machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from plait.costs import StepWork, format_profile
from plait.engine import EngineOptions, resolve_model
from plait.errors import BadSetup
from plait.kernels import native_available
from plait.profiler import (
    ProfileWish,
    hardware_fingerprint,
    profile_model,
    read_profile,
    shipped_profile,
    shipped_profile_names,
)
from plait.profiler.loopback import measure_loopback

SMALL = ProfileWish(
    name="tiny", step_tokens=16, context_tokens=64, sequences=4, repeats=1, live_steps=20, clock="cpu"
)
DTYPES = ["float32", *(["bfloat16"] if native_available else [])]


def options(dtype: str) -> EngineOptions:
    return EngineOptions(
        folder=resolve_model("tiny"), dtype=dtype, kv_cache_bytes=64 << 20, threads=1, packed_cache=False
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_profile_has_every_operation_its_errors_and_this_machine(dtype: str, tmp_path: Path) -> None:
    stages: set[str] = set()
    profile = profile_model(options(dtype), SMALL, lambda stage, done, total: stages.add(stage))
    assert stages == {"weights", "operations", "engine"}
    assert {sample.operation for sample in profile.samples} == {"dense", "head", "prefill", "decode"}
    assert {"operations", "steps", "steps by regression", "steps, with the host"} <= set(profile.errors)
    assert all((sample.predicted_s is not None) == sample.held_out for sample in profile.samples)
    assert profile.fingerprint == hardware_fingerprint(device="cpu", threads=1)
    assert profile.model.equal_blocks
    assert profile.facts.weight_bytes == 2 * profile.table_costs(range(3)).weight_bytes

    file = tmp_path / "tiny.json"
    file.write_text(format_profile(profile))
    again = read_profile(file)
    assert again == profile
    work = StepWork.of([(8, 0), (1, 30)], sampled=1)
    for costs in (again.table_costs(), again.regression_costs()):
        assert 0 < costs.step_s(work) < 10
        assert 0 < costs.host_s(work) < 10

    other = replace(profile, fingerprint={**profile.fingerprint, "processor": "another"})
    file.write_text(format_profile(other))
    with pytest.raises(BadSetup, match="processor 'another' there"):
        read_profile(file)
    assert read_profile(file, for_this_machine=False) == other


@pytest.mark.skipif(not native_available, reason="the kernels are not built")
def test_the_last_block_stands_for_all() -> None:
    wish = replace(SMALL, blocks=range(5, 6), step_tokens=4, context_tokens=16, sequences=2)
    profile = profile_model(options("bfloat16"), wish)
    assert profile.model.first_block == 5
    work = StepWork.of([(2, 0)], sampled=0)
    assert profile.table_costs().step_s(work) == pytest.approx(6 * profile.table_costs(range(1)).step_s(work))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": range(3)}, "blocks 0:3 cannot stand for all 6"),
        ({"repeats": 0}, "at least 1 repeat"),
        ({"live_steps": 3}, "20 steps of the engine"),
    ],
)
def test_a_wish_that_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        profile_model(options("float32"), replace(SMALL, **changes))


def test_processor_time_needs_one_thread() -> None:
    with pytest.raises(BadSetup, match="--threads 1"):
        profile_model(replace(options("float32"), threads=2), SMALL)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"cannot read the profile .*gone\.json"):
        read_profile(tmp_path / "gone.json")
    with pytest.raises(BadSetup, match="no profile called 'h900' is shipped; there are"):
        shipped_profile("h900")


def test_what_is_shipped_can_be_read_is_small_and_was_checked() -> None:
    for name in shipped_profile_names():
        profile = shipped_profile(name)
        assert len(format_profile(profile)) < 100_000
        assert profile.errors["operations"].count > 50
        assert profile.table_costs().step_s(StepWork.of([(1, 100)], sampled=1)) > 0


def test_the_loopback_is_a_link() -> None:
    link = measure_loopback(round_trips=20, transfers=2)
    assert link.one_way_s > 0
    assert link.bandwidth_bytes_per_s > 1e6
