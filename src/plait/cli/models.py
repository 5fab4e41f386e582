"""`plait models` and `plait pull`: what can be served from this machine, and how more gets here."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from plait.cli.terminal import JsonFlag, bytes_bar, note, print_json, print_table, say
from plait.units import format_bytes


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model that is here; `problem` says why it cannot be served, or is None."""

    name: str
    family: str | None
    size_bytes: int
    folder: str
    problem: str | None


def models(
    all: Annotated[bool, typer.Option("--all", help="Also those that cannot be served, and why.")] = False,
    json: JsonFlag = False,
) -> None:
    """List the models that can be served without a download: `tiny` and the Hugging Face cache."""
    found = list(_models_here())
    shown = [model for model in found if all or model.problem is None]
    if json:
        print_json([asdict(model) for model in shown])
        return
    print_table(
        ("model", "family", "size", "state"),
        [(m.name, m.family or "?", format_bytes(m.size_bytes), m.problem or "ready") for m in shown],
    )
    hidden = len(found) - len(shown)
    if hidden:
        note(f"{hidden} more in the cache cannot be served; --all says why")


def pull(
    repo: Annotated[str, typer.Argument(help="A repository id, such as Qwen/Qwen3-0.6B.", metavar="REPO")],
    json: JsonFlag = False,
) -> None:
    """Download a model into the Hugging Face cache, or bring it up to date.

    Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Repeat it after a failure: what came is kept.
    """
    from plait.engine import download_model

    with bytes_bar() as show:
        folder = download_model(repo, on_progress=lambda done, total: show(repo, done, total))
    if json:
        print_json({"name": repo, "folder": str(folder)})
        return
    say(str(folder))
    note(f"serve it with: plait serve {repo}")


def _models_here() -> Iterator[ListedModel]:
    from plait.engine import cached_models, resolve_model

    tiny = resolve_model("tiny")
    size_bytes = sum(file.stat().st_size for file in tiny.iterdir() if file.is_file())
    yield ListedModel("tiny", "llama", size_bytes, str(tiny), None)
    for model in cached_models():
        yield ListedModel(model.repo, model.family, model.size_bytes, str(model.folder), model.problem)
