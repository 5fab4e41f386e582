# pyright: standard
"""Where a model's files are: packaged, in a folder, in the Hugging Face cache, or still on the hub.

The cache is the one every other tool uses (HF_HOME, HF_HUB_CACHE), and so are the token and the mirror
(HF_TOKEN, HF_ENDPOINT). Only safetensors, JSON and tokenizer files are fetched: nothing that runs.
A connection that breaks is resumed where it broke; after a stop, whole files are kept, the others begin anew.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import plait.model
from plait.errors import BadSetup
from plait.model import ModelSpec, read_spec
from plait.units import format_bytes

BytesProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

TINY = "tiny"
INDEX = "model.safetensors.index.json"
SIDE_FILES = re.compile(r"[^/]+\.(json|jinja|txt)|tokenizer\.model")
WEIGHT_FILES = re.compile(r"(?!consolidated)[^/]+\.safetensors")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
PARTIAL_MARKER = "plait-partial.json"
"""In a folder that holds only some of a model's weights: those that a member of a swarm serves."""
# Bytes left free on the disk beside a download, so that filling it exactly does not break other programs.
DISK_RESERVE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model of the Hugging Face cache; `problem` says why it cannot be served, or is None."""

    repo: str
    folder: Path
    size_bytes: int
    family: str | None
    problem: str | None


def resolve_model(
    name: str,
    *,
    offline: bool = False,
    on_progress: BytesProgress | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Find the folder of a model, downloading it if it is a repository that the cache does not hold yet.

    `name` is `tiny`, a folder, or a repository id such as `Qwen/Qwen3-0.6B`. A repository that is complete in
    the cache is used as it is, without asking the hub for news: `download_model` does that.
    `cache` and `endpoint` None take what the Hugging Face variables say.

    Raises:
        BadSetup: no such model, no access, no network, no room, or a model that cannot be served.
    """
    if name == TINY:
        return Path(plait.model.__file__).parent / TINY
    if not name:
        _check_repo_id(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadSetup(f"{str(folder)!r} has no config.json; give the folder of a Hugging Face model")
        if (folder / PARTIAL_MARKER).is_file():
            raise BadSetup(
                f"{str(folder)!r} holds only the weights that this machine served in a swarm; name the whole model"
            )
        return folder
    if folder.is_file():
        raise BadSetup(f"{name!r} is a file; give the folder that holds config.json and *.safetensors")
    _check_repo_id(name)
    cached = find_in_cache(name, cache=cache)
    if cached is not None:
        return cached
    return download_model(name, offline=offline, on_progress=on_progress, cache=cache, endpoint=endpoint)


def find_in_cache(repo: str, *, cache: Path | None = None) -> Path | None:
    """The folder of a repository's last fetched commit, if all that is needed to serve it is there."""
    repo_folder = _cache_folder(cache) / ("models--" + repo.replace("/", "--"))
    try:
        commit = (repo_folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = repo_folder / "snapshots" / commit
    return folder if commit and _what_is_missing(folder) is None else None


def download_model(
    repo: str,
    *,
    offline: bool = False,
    on_progress: BytesProgress | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """Bring the newest commit of a repository into the cache and return its folder.

    The configuration comes first and is checked before any weight is fetched.

    Raises:
        BadSetup: as for `resolve_model`.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.errors import HTTPError as ClientError  # pyright: ignore[reportPrivateImportUsage]

    # The hub's client has changed its HTTP library before; the base of its errors is named there alone.
    _check_repo_id(repo)
    if offline or huggingface_hub.is_offline_mode():
        raise BadSetup(
            f"model {repo!r} is not complete in the cache ({_cache_folder(cache)}) and offline mode is on; "
            f"run 'plait pull {repo}' with a network, or drop --offline and HF_HUB_OFFLINE"
        )
    try:
        return _download(repo, on_progress=on_progress or _ignore_progress, cache=cache, endpoint=endpoint)
    except HfHubHTTPError as error:
        raise _refused(repo, error, endpoint) from error
    except (ClientError, OSError) as error:
        raise _unreachable(repo, error, cache, endpoint) from error


def side_files(folder: Path) -> tuple[str, ...]:
    """A model's files beside its weights, by name: configuration, index, tokenizer, templates."""
    found = [file.name for file in folder.iterdir() if file.is_file() and SIDE_FILES.fullmatch(file.name)]
    return tuple(sorted(name for name in found if name != PARTIAL_MARKER))


def cached_models(*, cache: Path | None = None) -> tuple[CachedModel, ...]:
    """The models of the cache, by name, and why those that cannot be served cannot."""
    found: list[CachedModel] = []
    for repo_folder in sorted(_cache_folder(cache).glob("models--*")):
        repo = repo_folder.name.removeprefix("models--").replace("--", "/")
        try:
            commit = (repo_folder / "refs" / "main").read_text().strip()
        except OSError:
            continue
        folder = repo_folder / "snapshots" / commit
        size_bytes = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
        family, problem = None, _what_is_missing(folder)
        try:
            family = _read_config(folder / "config.json").family
        except BadSetup as error:
            problem = error.message
        found.append(CachedModel(repo, folder, size_bytes, family, problem))
    return tuple(found)


def _download(repo: str, *, on_progress: BytesProgress, cache: Path | None, endpoint: str | None) -> Path:
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
    sizes_bytes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if "config.json" not in sizes_bytes:
        raise BadSetup(f"repository {repo!r} has no config.json, so it is not a transformers-style model")
    progress = _Progress(on_progress)

    def fetch(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            repo, name, cache_dir=cache, endpoint=endpoint, tqdm_class=cast(Any, progress.bar_class())
        )
        progress.finish(name, sizes_bytes[name])
        return Path(path)

    config = fetch("config.json")
    _read_config(config, f"config.json of {repo!r}")
    index = fetch(INDEX) if INDEX in sizes_bytes else None
    names = _needed_files(repo, sizes_bytes, index)
    progress.total_bytes = sum(sizes_bytes[name] for name in names)
    _check_disk(repo, {name: sizes_bytes[name] for name in names}, config.parent, cache)
    for name in names:
        fetch(name)
    missing = _what_is_missing(config.parent)
    if missing is not None:
        raise BadSetup(f"repository {repo!r} cannot be served: {missing}")
    return config.parent


def _needed_files(repo: str, sizes_bytes: Mapping[str, int], index: Path | None) -> list[str]:
    """The files to fetch, small ones first; repositories often hold the same weights more than once."""
    weights = [name for name in sizes_bytes if WEIGHT_FILES.fullmatch(name)]
    if index is not None:
        weights = sorted(_indexed_files(index))
        absent = [name for name in weights if name not in sizes_bytes]
        if absent:
            raise BadSetup(f"{INDEX} of {repo!r} names {absent[0]!r}, which the repository does not hold")
    elif "model.safetensors" in weights:
        weights = ["model.safetensors"]
    if not weights:
        others = sorted({Path(name).suffix for name in sizes_bytes} & {".bin", ".gguf", ".pt", ".pth", ".h5"})
        instead = f" (it has {', '.join(others)})" if others else ""
        raise BadSetup(
            f"repository {repo!r} has no *.safetensors weights{instead} and nothing else is read; "
            "look for a conversion of it to safetensors"
        )
    side = [name for name in sizes_bytes if SIDE_FILES.fullmatch(name) and name not in weights]
    return sorted(side) + sorted(weights)


def _what_is_missing(folder: Path) -> str | None:
    """What a folder lacks to be served, or None."""
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return "tokenizer.json is missing"
    if (folder / INDEX).is_file():
        absent = sorted(name for name in _indexed_files(folder / INDEX) if not (folder / name).is_file())
        return f"{len(absent)} weight files are missing, {absent[0]!r} first" if absent else None
    if not any(WEIGHT_FILES.fullmatch(file.name) and file.is_file() for file in folder.glob("*.safetensors")):
        return "no *.safetensors weights"
    return None


def _indexed_files(index: Path) -> set[str]:
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadSetup(f"{str(index)!r} is not a safetensors index: {error}") from error
    bad = [name for name in files if not isinstance(name, str) or not WEIGHT_FILES.fullmatch(name)]
    if bad:
        raise BadSetup(f"{str(index)!r} names {bad[0]!r}, which is not a weight file beside it")
    return files


def _read_config(path: Path, where: str = "") -> ModelSpec:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadSetup(f"{where or repr(str(path))} cannot be read: {error}") from error
    return read_spec(config, where or str(path))


def _check_repo_id(name: str) -> None:
    if not REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        raise BadSetup(
            f"{name!r} is neither 'tiny', nor a folder that exists, nor a repository id such as "
            "'Qwen/Qwen3-0.6B'"
        )


def _check_disk(repo: str, sizes_bytes: Mapping[str, int], snapshot: Path, cache: Path | None) -> None:
    needed_bytes = sum(size for name, size in sizes_bytes.items() if not (snapshot / name).is_file())
    free_bytes = shutil.disk_usage(snapshot).free
    if needed_bytes + DISK_RESERVE_BYTES > free_bytes:
        raise BadSetup(
            f"model {repo!r} needs {format_bytes(needed_bytes)} more in {_cache_folder(cache)}, whose disk "
            f"has {format_bytes(free_bytes)} free; make room, or point HF_HOME at another disk"
        )


def _refused(repo: str, error: Exception, endpoint: str | None) -> BadSetup:
    """The hub answered, but not with what was asked for."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return BadSetup(
            f"model {repo!r} is gated: accept its licence at {_site(endpoint)}/{repo}, then set HF_TOKEN to "
            "a token of the account that did"
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        if get_token() is None:
            hint = "check the spelling; a private one needs HF_TOKEN"
        else:
            hint = "check the spelling, and that the account of HF_TOKEN may read it"
        return BadSetup(f"there is no model {repo!r} at {_site(endpoint)}, or it is private; {hint}")
    if status in (401, 403):
        hint = (
            "set HF_TOKEN"
            if get_token() is None
            else "HF_TOKEN is wrong or expired, or lacks the right to read"
        )
        return BadSetup(f"{_site(endpoint)} refused access to {repo!r} (HTTP {status}): {hint}")
    return BadSetup(f"{_site(endpoint)} answered HTTP {status} for {repo!r}; try again later")


def _unreachable(repo: str, error: Exception, cache: Path | None, endpoint: str | None) -> BadSetup:
    """The download broke for a reason of this machine or its network."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadSetup(
            f"the disk of {_cache_folder(cache)} is full; make room, or point HF_HOME at another disk, then "
            "repeat the command: whole files are kept"
        )
    if isinstance(error, PermissionError):
        return BadSetup(f"cannot write to {_cache_folder(cache)}: {error}; point HF_HOME at a folder you own")
    # The client joins whole explanations; the first line is the reason.
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return BadSetup(
        f"cannot fetch {repo!r} from {_site(endpoint)} ({reason}); check the network, or use a model that is "
        "here: 'plait models' lists them"
    )


def _site(endpoint: str | None) -> str:
    from huggingface_hub.constants import ENDPOINT

    return endpoint or ENDPOINT


def _cache_folder(cache: Path | None) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return cache or Path(HF_HUB_CACHE)


def _ignore_progress(done_bytes: int, total_bytes: int) -> None:
    del done_bytes, total_bytes


class _Progress:
    """Sums the bytes of one file after another.

    A file's bar reports what arrives (and takes back what a server without ranges sends twice); a file that
    was in the cache reports nothing, so its size is counted when it is there.
    """

    def __init__(self, on_progress: BytesProgress) -> None:
        self.total_bytes = 0
        self._on_progress = on_progress
        self._finished_bytes: dict[str, int] = {}
        self._current_bytes = 0

    def finish(self, name: str, size_bytes: int) -> None:
        self._finished_bytes[name] = size_bytes
        self._current_bytes = 0
        self.advance(0)

    def advance(self, size_bytes: int) -> None:
        self._current_bytes += size_bytes
        if self.total_bytes:
            done_bytes = sum(self._finished_bytes.values()) + self._current_bytes
            self._on_progress(min(done_bytes, self.total_bytes), self.total_bytes)

    def bar_class(self) -> type:
        """What `hf_hub_download` takes for a tqdm class: it counts and shows nothing."""
        progress = self

        class Bar:
            def __init__(self, *args: object, total: float | None = None, **kwargs: object) -> None:
                self.total = total
                self.n = 0

            def __enter__(self) -> "Bar":
                return self

            def __exit__(self, *error: object) -> None: ...

            def update(self, size_bytes: float | None = 1) -> None:
                progress.advance(int(size_bytes or 0))

            def refresh(self) -> None: ...

            def close(self) -> None: ...

            def set_postfix_str(self, *args: object, **kwargs: object) -> None: ...

            # Bytes on the wire are reported beside bytes written; the latter, in `update`, are counted.
            update_transfer = set_transfer_postfix_str = set_description = set_description_str = (
                set_postfix_str
            )

        return Bar
