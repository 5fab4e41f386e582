"""`plait cache` lists packed weights wherever they are kept, and deletes them when told to."""

import json
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from running_plait import InProcess, run_plait
from typer.testing import Result

from plait.engine.packed_cache import PackedFile


def keep(folder: Path, model_folder: Path, format: str = "int8", size_bytes: int = 5000) -> Path:
    """Packed weights as an engine leaves them."""
    file = PackedFile(
        folder=folder,
        name=f"{model_folder.name}-{format}.packed",
        model_folder=model_folder,
        content={"layout_version": 1, "fingerprint": "f", "files": [], "format": format},
    )
    file.write(np.zeros(size_bytes, np.uint8), threads=1)
    return file.path


@pytest.fixture
def models(environment: Mapping[str, str], tmp_path: Path) -> tuple[Path, Path, Path]:
    """Packed weights beside a model, of another in the user's cache, and beside one of the Hugging Face cache."""
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    for folder in (beside, elsewhere):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    repository = Path(environment["HF_HOME"]) / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    user_cache = Path(environment["XDG_CACHE_HOME"]) / "plait" / "packed"
    return (
        keep(beside / ".plait", beside),
        keep(user_cache, elsewhere, "int4", 2**20),
        keep(snapshot / ".plait", snapshot),
    )


def listed(result: Result | CompletedProcess[str]) -> dict[str, str | None]:
    """File to format, of `--json`."""
    return {entry["file"]: entry["format"] for entry in json.loads(result.stdout)}


def test_the_packed_weights_of_a_model_are_listed_wherever_they_are(models, plait: InProcess) -> None:
    beside, in_user_cache, _ = models
    assert listed(plait("cache", str(beside.parents[1]), "--json")) == {str(beside): "int8"}
    elsewhere = beside.parents[2] / "elsewhere"
    assert listed(plait("cache", str(elsewhere), "--json")) == {str(in_user_cache): "int4"}
    said = plait("cache", str(elsewhere), str(elsewhere))
    assert said.exit_code == 0 and said.stdout.count("\nint4") == 1
    assert "1.0 MiB" in said.stdout and str(elsewhere) in said.stdout and "kept" in said.stderr


def test_those_that_are_named_are_removed(models, plait: InProcess) -> None:
    beside, in_user_cache, in_hub_cache = models
    removed = plait("cache", str(beside.parents[1]), "--remove")
    assert removed.exit_code == 0 and "removed" in removed.stderr and str(beside) in removed.stdout
    assert not beside.exists() and in_user_cache.exists() and in_hub_cache.exists()


def test_damaged_ones_are_listed_and_can_be_removed(models, plait: InProcess) -> None:
    beside = models[0]
    beside.write_bytes(b"nothing")
    assert listed(plait("cache", str(beside.parents[1]), "--json")) == {str(beside): None}
    assert "damaged" in plait("cache", str(beside.parents[1])).stdout
    plait("cache", str(beside.parents[1]), "--remove")
    assert not beside.exists()


def test_nothing_kept_is_said(plait: InProcess) -> None:
    said = plait("cache", "tiny")
    assert said.exit_code == 0 and said.stdout == "" and "no packed weights" in said.stderr


def test_a_model_that_is_not_here_is_refused(plait: InProcess) -> None:
    said = plait("cache", "someone/else")
    assert said.exit_code == 2
    assert "is not complete in the cache" in said.stderr


# The hub's client reads its variables once a process, so what is below needs processes of its own.


@pytest.mark.slow
def test_without_a_name_all_that_can_be_found_is_meant(models, environment: Mapping[str, str]) -> None:
    beside, in_user_cache, in_hub_cache = models
    found = run_plait("cache", "--json", environment=environment)
    assert listed(found) == {str(in_hub_cache): "int8", str(in_user_cache): "int4"}
    assert run_plait("cache", "--remove", environment=environment).returncode == 0
    assert beside.exists() and not in_user_cache.exists() and not in_hub_cache.exists()
    assert listed(run_plait("cache", "--json", environment=environment)) == {}
