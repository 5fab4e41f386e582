"""Names to folders, and downloads from a stand-in hub over real HTTP."""

import json
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from stand_in_hub import StandInHub

from plait.engine import cached_models, download_model, resolve_model
from plait.errors import BadSetup

TINY = Path(resolve_model("tiny"))
REPO = "someone/small-model"


def repository() -> dict[str, bytes]:
    """The embedded model's files, with weights that are quick to send."""
    names = ("config.json", "tokenizer.json", "chat_template.jinja")
    others = {"model.safetensors": os.urandom(200_000), "pytorch_model.bin": b"pickle", "README.md": b"#"}
    return {name: (TINY / name).read_bytes() for name in names} | others


@pytest.fixture
def served(hub: StandInHub) -> StandInHub:
    hub.repositories[REPO] = repository()
    return hub


def test_tiny_is_inside_the_package() -> None:
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in TINY.iterdir()}


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_without_a_config_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BadSetup, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a b", "x/y/z", "../up", "", "-flag"])
def test_a_name_that_can_be_nothing_is_refused_without_a_request(name: str) -> None:
    with pytest.raises(BadSetup, match="neither 'tiny', nor a folder"):
        resolve_model(name)


def test_a_download_fetches_what_serving_needs_and_no_more(served: StandInHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = resolve_model(
        REPO, cache=tmp_path, endpoint=served.url, on_progress=lambda done, total: seen.append((done, total))
    )
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    }
    assert (folder / "model.safetensors").read_bytes() == served.repositories[REPO]["model.safetensors"]
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 200_000


def test_a_model_in_the_cache_is_used_without_any_request(served: StandInHub, tmp_path: Path) -> None:
    folder = download_model(REPO, cache=tmp_path, endpoint=served.url)
    served.requests.clear()
    assert resolve_model(REPO, cache=tmp_path, endpoint=served.url) == folder
    assert resolve_model(REPO, offline=True, cache=tmp_path, endpoint=served.url) == folder
    assert served.requests == []


def test_a_download_that_breaks_off_goes_on_where_it_broke(served: StandInHub, tmp_path: Path) -> None:
    # The hub's client counts what it has written, in chunks of this size.
    chunk_bytes = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE
    served.repositories[REPO]["model.safetensors"] = bytes(2 * chunk_bytes + 100)
    served.breaks_left = 1
    folder = download_model(REPO, cache=tmp_path, endpoint=served.url)
    assert (folder / "model.safetensors").read_bytes() == served.repositories[REPO]["model.safetensors"]
    assert served.downloads("model.safetensors") == ["", f"bytes={chunk_bytes}-"]


def test_a_repeated_pull_keeps_whole_files(served: StandInHub, tmp_path: Path) -> None:
    folder = download_model(REPO, cache=tmp_path, endpoint=served.url)
    (folder / "model.safetensors").unlink()
    served.requests.clear()
    assert resolve_model(REPO, cache=tmp_path, endpoint=served.url) == folder
    assert served.downloads("tokenizer.json") == []
    assert (folder / "model.safetensors").is_file()


def test_only_the_shards_of_the_index_are_fetched(served: StandInHub, tmp_path: Path) -> None:
    files = served.repositories[REPO]
    weights = files.pop("model.safetensors")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    files |= {**dict.fromkeys(shards, weights), "model.safetensors.index.json": index}
    files["consolidated.safetensors"] = weights
    folder = download_model(REPO, cache=tmp_path, endpoint=served.url)
    assert sorted(file.name for file in folder.glob("*.safetensors")) == shards


def test_an_unsupported_family_is_refused_before_any_weight_is_fetched(
    served: StandInHub, tmp_path: Path
) -> None:
    served.repositories[REPO]["config.json"] = b'{"model_type": "mamba"}'
    with pytest.raises(BadSetup, match="mamba"):
        download_model(REPO, cache=tmp_path, endpoint=served.url)
    assert served.downloads("model.safetensors") == []


def test_a_repository_of_pickles_is_refused(served: StandInHub, tmp_path: Path) -> None:
    del served.repositories[REPO]["model.safetensors"]
    with pytest.raises(BadSetup, match=r"no \*\.safetensors weights \(it has \.bin\)"):
        download_model(REPO, cache=tmp_path, endpoint=served.url)


def test_an_index_that_points_outside_is_refused(served: StandInHub, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    served.repositories[REPO]["model.safetensors.index.json"] = index
    with pytest.raises(BadSetup, match="not a weight file"):
        download_model(REPO, cache=tmp_path, endpoint=served.url)


def test_an_unknown_repository_is_not_found(served: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=r"there is no model 'someone/else' at .*check the spelling"):
        resolve_model("someone/else", cache=tmp_path, endpoint=served.url)


def test_a_gated_repository_says_where_to_ask(served: StandInHub, tmp_path: Path) -> None:
    served.gated.add(REPO)
    with pytest.raises(BadSetup, match=f"gated: accept its licence at {served.url}/{REPO}"):
        resolve_model(REPO, cache=tmp_path, endpoint=served.url)


def test_a_hub_that_wants_a_token_says_so(served: StandInHub, tmp_path: Path) -> None:
    served.token = "secret"
    with pytest.raises(BadSetup, match="HF_TOKEN"):
        resolve_model(REPO, cache=tmp_path, endpoint=served.url)


def test_offline_mode_asks_nobody_and_says_what_to_do(served: StandInHub, tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match=f"offline mode is on; run 'plait pull {REPO}'"):
        resolve_model(REPO, offline=True, cache=tmp_path, endpoint=served.url)
    assert served.requests == []


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    with StandInHub() as closed:
        url = closed.url
    with pytest.raises(BadSetup, match=f"cannot fetch {REPO!r} from {url}") as caught:
        resolve_model(REPO, cache=tmp_path, endpoint=url)
    assert "\n" not in caught.value.message


def test_a_cache_that_cannot_be_written_is_one_sentence(served: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadSetup, match=r"cannot fetch|cannot write"):
        resolve_model(REPO, cache=tmp_path / "file", endpoint=served.url)


def test_the_cache_lists_its_models_and_why_some_cannot_be_served(served: StandInHub, tmp_path: Path) -> None:
    served.repositories["someone/other"] = {**repository(), "config.json": b'{"model_type": "mamba"}'}
    folder = download_model(REPO, cache=tmp_path, endpoint=served.url)
    with pytest.raises(BadSetup):
        download_model("someone/other", cache=tmp_path, endpoint=served.url)
    good, bad = sorted(cached_models(cache=tmp_path), key=lambda model: model.problem is not None)
    assert (good.repo, good.family, good.problem, good.folder) == (REPO, "llama", None, folder)
    assert good.size_bytes > 200_000
    assert bad.repo == "someone/other"
    assert "mamba" in (bad.problem or "")


def test_a_model_larger_than_the_disk_is_refused_before_any_weight_is_fetched(
    served: StandInHub, tmp_path: Path
) -> None:
    served.claimed_bytes["model.safetensors"] = 2**60
    with pytest.raises(BadSetup, match=r"needs 1048576\.0 TiB more in .* free; make room"):
        resolve_model(REPO, cache=tmp_path, endpoint=served.url)
    assert served.downloads("model.safetensors") == []
