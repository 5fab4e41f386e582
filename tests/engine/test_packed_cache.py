"""What was packed is read back byte for byte, or packed again: never anything else."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from safetensors.torch import load_file, save_file

from plait.engine.checkpoint import Checkpoint, open_checkpoint
from plait.engine.packed import PackedWeights, Shard, load_packed, packed_cache_folder
from plait.engine.packed_cache import kept_weights, user_cache_folder
from plait.kernels import native_available

if not native_available:
    pytest.skip("plait was installed without its CPU kernels", allow_module_level=True)


@pytest.fixture
def checkpoint(tiny_checkpoints, tmp_path) -> Checkpoint:
    """A private copy of a model with all kinds of tensors."""
    return open_checkpoint(zoo.copy_of(tiny_checkpoints("gpt_oss").folder, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def load(
    checkpoint: Checkpoint, cache: Path | None, format: str = "int8", **options: object
) -> PackedWeights:
    return load_packed(checkpoint, format=format, threads=2, cache=cache, **options)


def came_from_the_disk(checkpoint: Checkpoint, cache: Path, **options: object) -> bool:
    """Whether a load reads the file of packed weights: its progress counts other bytes than the checkpoint's."""
    totals: list[int] = []
    weights = load(checkpoint, cache, on_progress=lambda done, total: totals.append(total), **options)
    return totals[-1] == weights.size_bytes


def the_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def test_a_second_load_reads_the_same_bytes_from_the_disk(checkpoint, cache):
    first = load(checkpoint, cache)
    file = the_file(cache)
    assert file.name == f"{checkpoint.fingerprint}-int8-1.packed"
    written = file.stat()
    second = load(checkpoint, cache)
    assert np.array_equal(first.arena.memory, second.arena.memory)
    assert came_from_the_disk(checkpoint, cache)
    assert first.matrices == second.matrices
    assert all(np.array_equal(tensor, second.small[key]) for key, tensor in first.small.items())
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_formats_spans_and_ranks_have_files_of_their_own(checkpoint, cache):
    asked = [
        {},
        {"format": "bf16"},
        {"format": "int4"},
        {"format": "int4-g128"},
        {"format": "int4", "embedding_format": "bf16"},
        {"blocks": range(1)},
        {"blocks": range(1, 2)},
        {"shard": Shard(rank=0, ranks=2)},
        {"shard": Shard(rank=1, ranks=2)},
    ]
    for options in asked:
        assert not came_from_the_disk(checkpoint, cache, **options)
    for options in asked:
        assert came_from_the_disk(checkpoint, cache, **options)
    assert len(list(cache.iterdir())) == len(asked)


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(content)


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    size_bytes = int.from_bytes(content[8:16], "little")
    header = json.loads(content[16 : 16 + size_bytes])
    edit(header)
    edited = json.dumps(header).encode()
    data = content[-(-(16 + size_bytes) // 4096) * 4096 :]
    start = content[:8] + len(edited).to_bytes(8, "little") + edited
    file.write_bytes(start + bytes(-len(start) % 4096) + data)


def begin_with(size_bytes: int, header: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(b"plaitpkd" + size_bytes.to_bytes(8, "little") + header)


def replace_by_link(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def give_away(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a file away")
    os.chown(file, 12345, 12345)


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "a flipped bit in the middle": lambda file: flip(file, file.stat().st_size // 2),
    "a flipped bit in the last byte": lambda file: flip(file, -1),
    "a flipped bit in the magic": lambda file: flip(file, 3),
    "a flipped bit in the header's length": lambda file: flip(file, 10),
    "a flipped bit in the header": lambda file: flip(file, file.read_bytes().index(b'"matrices"') + 50),
    "a flipped bit in a hash": lambda file: flip(file, file.read_bytes().index(b'"sha256"') + 20),
    "a missing last byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "half of it": lambda file: os.truncate(file, file.stat().st_size // 2),
    "nothing": lambda file: os.truncate(file, 0),
    "a byte too many": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a header of four gigabytes": begin_with(2**32, bytes(99)),
    "a header that nests deeply": begin_with(10**6, b"[" * 10**6),
    "a header that is a list": begin_with(2, b"[]"),
    "a header of nothing": begin_with(2, b"{}"),
    "another layout version": lambda file: edit_header(file, lambda h: h["content"].update(layout_version=0)),
    "kernels that pack otherwise": lambda file: edit_header(
        file, lambda h: h["content"].update(packing=[[1, "0"]])
    ),
    "another place of a matrix": lambda file: edit_header(
        file, lambda h: h["content"]["matrices"][0].reverse()
    ),
    "no hashes": lambda file: edit_header(file, lambda h: h.pop("sha256")),
    "numbers for hashes": lambda file: edit_header(file, lambda h: h.update(sha256=[1] * len(h["sha256"]))),
    "a hash too many": lambda file: edit_header(file, lambda h: h["sha256"].append("0")),
    "a link": replace_by_link,
    "a pipe": replace_by_pipe,
    "another user's file": give_away,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_replaced_with_one_warning(damage, checkpoint, cache, caplog):
    first = load(checkpoint, cache)
    DAMAGES[damage](cache / f"{checkpoint.fingerprint}-int8-1.packed")
    with caplog.at_level(logging.WARNING, "plait"):
        again = load(checkpoint, cache)
    assert np.array_equal(again.arena.memory, first.arena.memory)
    (record,) = caplog.records
    assert "cannot be used and are made again: " in record.getMessage()
    caplog.clear()
    assert came_from_the_disk(checkpoint, cache)
    assert not caplog.records


def test_another_models_file_under_the_name_is_replaced(checkpoint, cache, tiny_checkpoints, caplog):
    load(tiny_checkpoints("llama").checkpoint, cache)
    other = the_file(cache)
    other.rename(cache / f"{checkpoint.fingerprint}-int8-1.packed")
    weights = load(checkpoint, cache)
    assert np.array_equal(weights.arena.memory, load(checkpoint, None).arena.memory)
    assert "their fingerprint is not that of this model now" in caplog.text


@pytest.mark.parametrize("how", ["another value", "another time", "another config"])
def test_a_changed_checkpoint_is_packed_again_and_its_old_file_goes(how, checkpoint, cache):
    load(checkpoint, cache)
    load(checkpoint, cache, "int4")
    weights_file = checkpoint.folder / "model.safetensors"
    if how == "another value":
        tensors = load_file(weights_file)
        tensors["model.norm.weight"] += 1
        save_file(tensors, weights_file)  # as long as before, with the same names at the same places
    elif how == "another time":
        os.utime(weights_file, ns=(0, 0))
    else:
        zoo.copy_of(checkpoint.folder, cache.parent / "changed", rms_norm_eps=1e-3)
        (cache.parent / "changed" / "config.json").rename(checkpoint.folder / "config.json")
    changed = open_checkpoint(checkpoint.folder)
    weights = load(changed, cache)
    assert np.array_equal(weights.arena.memory, load(changed, None).arena.memory)
    assert [kept.path.name for kept in kept_weights(cache)] == [f"{changed.fingerprint}-int8-1.packed"]
    assert came_from_the_disk(changed, cache)


def test_the_files_of_other_models_stay(checkpoint, cache, tiny_checkpoints):
    other = tiny_checkpoints("llama").checkpoint
    load(other, cache)
    load(checkpoint, cache)
    assert came_from_the_disk(other, cache) and came_from_the_disk(checkpoint, cache)


def test_a_file_belongs_to_whoever_may_read_the_model(checkpoint, cache):
    os.chmod(checkpoint.folder / "model.safetensors", 0o600)
    load(checkpoint, cache)
    assert the_file(cache).stat().st_mode & 0o777 == 0o600
    os.chmod(checkpoint.folder / "model.safetensors", 0o644)
    the_file(cache).unlink()
    load(checkpoint, cache)
    assert the_file(cache).stat().st_mode & 0o777 == 0o644


def test_what_nobody_finished_is_removed_once_it_is_old(checkpoint, cache):
    cache.mkdir()
    abandoned, young = cache / "abandoned.part", cache / "young.part"
    abandoned.touch()
    young.touch()
    os.utime(abandoned, (0, 0))
    load(checkpoint, cache)
    assert young.exists() and not abandoned.exists()


LOAD = """
import hashlib, sys
from pathlib import Path
from plait.engine.checkpoint import open_checkpoint
from plait.engine.packed import load_packed

weights = load_packed(open_checkpoint(Path(sys.argv[1])), format="int8", threads=2, cache=Path(sys.argv[2]))
print(hashlib.sha256(weights.arena.memory.data).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_start_at_once_do_not_disturb_each_other(checkpoint, cache):
    command = [sys.executable, "-c", LOAD, str(checkpoint.folder), str(cache)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = [process.communicate(timeout=200) for process in processes]
    assert len(set(answers)) == 1 and answers[0][0] and not answers[0][1]
    assert came_from_the_disk(checkpoint, cache)
    assert the_file(cache).suffix == ".packed"


# ---- where the files are --------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(checkpoint, tmp_path, caplog):
    (tmp_path / "file").touch()
    weights = load(checkpoint, tmp_path / "file" / "cache")
    assert np.array_equal(weights.arena.memory, load(checkpoint, None).arena.memory)
    (record,) = caplog.records
    assert "the packed weights are not kept in" in record.getMessage()


def test_a_full_disk_costs_a_warning_and_nothing_else(checkpoint, caplog):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no full device")
    load(checkpoint, full)
    assert "the packed weights are not kept in" in caplog.text


@pytest.fixture
def not_root() -> Iterator[None]:
    """Permissions count: root may write anywhere."""
    if os.getuid() != 0:
        yield
        return
    os.setreuid(65534, -1)  # os.access asks for the real user, and the effective one may change back
    try:
        yield
    finally:
        os.setreuid(0, -1)


def large(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint as if it were somewhere else, and large enough to be kept."""
    tensors = {
        name: replace(stored, size_bytes=stored.size_bytes * 2**20)
        for name, stored in checkpoint.tensors.items()
    }
    return replace(checkpoint, folder=folder, tensors=tensors)


def test_packed_weights_are_kept_beside_the_model(checkpoint):
    assert packed_cache_folder(large(checkpoint, checkpoint.folder)) == checkpoint.folder / ".plait"


def test_small_models_are_packed_at_every_start(checkpoint):
    assert packed_cache_folder(checkpoint) is None


@pytest.mark.usefixtures("not_root")
def test_a_model_in_a_folder_that_cannot_be_written_is_kept_in_the_users_cache(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    system = Path("/usr")
    assert packed_cache_folder(large(checkpoint, system)) == tmp_path / "mine" / "plait" / "packed"


def test_the_users_cache_is_where_the_system_keeps_caches(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    home = "/home/someone/Library/Caches" if sys.platform == "darwin" else "/home/someone/.cache"
    assert user_cache_folder() == Path(home) / "plait" / "packed"


def test_the_files_of_a_folder_are_listed_with_what_they_hold(checkpoint, cache):
    assert kept_weights(cache) == ()
    weights = load(checkpoint, cache, "int4")
    (cache / "broken.packed").write_bytes(b"nothing")
    (cache / "unrelated").touch()
    kept, broken = kept_weights(cache)
    assert kept.model_folder == checkpoint.folder and kept.content["format"] == "int4"
    assert weights.size_bytes < kept.size_bytes == kept.path.stat().st_size
    assert broken.model_folder is None and broken.size_bytes == 7
    kept.remove()
    kept.remove()
    assert kept_weights(cache) == (broken,)
