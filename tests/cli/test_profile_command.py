"""`plait profile`: what steps cost here, in a file that `plait.profiler` reads."""

import json
from pathlib import Path

import pytest
from running_plait import InProcess

from plait.profiler import read_profile

SMALL = (
    *("--threads", "1", "--rows", "4", "--context", "16", "--sequences", "2", "--repeats", "1"),
    *("--live-steps", "20", "--kv-cache-memory", "64MiB", "--no-packed-cache"),
)


def test_it_writes_a_profile_of_this_machine_and_says_how_far_off_it_is(
    plait: InProcess, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.json"
    result = plait("profile", "tiny", *SMALL, "--clock", "cpu", "--out", str(file), "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["written"] == str(file)
    assert summary["errors"]["steps"]["count"] == 10  # the other ten were fitted
    profile = read_profile(file)
    assert profile.model.name == "tiny"
    assert profile.clock == "cpu"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "nan"), "temperature nan is not between 0 and 2"),
        (("--device", "cuda"), "--device cuda: "),
        (("--clock", "sun"), "--clock 'sun' is not known"),
        (("--last-blocks", "7"), "--last-blocks 7 is not between 1 and the model's 6"),
        (("--clock", "cpu", "--threads", "2"), "--threads 1"),
        (("--out", "/nowhere/at/all.json"), "cannot write '/nowhere/at/all.json'"),
    ],
)
def test_what_does_not_fit_is_one_line(plait: InProcess, flags: tuple[str, ...], message: str) -> None:
    result = plait("profile", "tiny", *SMALL, *flags)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_person_gets_a_table(plait: InProcess) -> None:
    result = plait("profile", "tiny", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "for a token alone" in result.stdout
    assert "steps by roofline" in result.stdout
