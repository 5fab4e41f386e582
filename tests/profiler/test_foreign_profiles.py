"""Profiles of other machines, of devices that are not here, and of fingerprints that no machine has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.costs import format_profile
from plait.errors import BadSetup
from plait.profiler import profile_file, read_profile, shipped_profile


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"device": "cuda", "gpu": "NVIDIA H200"}, "gpu 'NVIDIA H200' there and "),
        ({"device": "abacus"}, "threads '1' there and 'unknown' here"),
        ({"threads": "9" * 5000}, "threads '9+' there and "),
        ({"threads": "²"}, "threads '²' there and "),
        ({"processor": "Z80"}, "processor 'Z80' there and "),
    ],
)
def test_it_is_said_in_what_two_machines_differ(there: dict[str, str], message: str, tmp_path: Path) -> None:
    profile = shipped_profile("tiny-zen4")
    other = replace(profile, fingerprint={**profile.fingerprint, **there})
    file = tmp_path / "other.json"
    file.write_text(format_profile(other))
    with pytest.raises(BadSetup, match=message) as refused:
        read_profile(file)
    assert "\n" not in refused.value.message
    assert "--force-profile" in refused.value.message
    assert read_profile(file, for_this_machine=False) == other


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_here_is_none(tmp_path: Path) -> None:
    profile = shipped_profile("tiny-zen4")
    file = tmp_path / "gpu.json"
    file.write_text(format_profile(replace(profile, fingerprint={"device": "cuda:0", "gpu": "NVIDIA L4"})))
    with pytest.raises(BadSetup, match="gpu 'NVIDIA L4' there and 'none' here"):
        read_profile(file)


def test_a_file_goes_before_a_shipped_profile_of_the_same_name(tmp_path: Path) -> None:
    name = Path("tiny-zen4")
    assert read_profile(profile_file(tmp_path, name), for_this_machine=False) == shipped_profile("tiny-zen4")
    (tmp_path / name).write_text("mine")
    assert profile_file(tmp_path, name) == tmp_path / name
