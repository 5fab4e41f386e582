"""`plait cache`: packed weights that are kept on the disk, which may be removed at any time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.terminal import JsonFlag, note, print_json, print_table
from plait.units import format_bytes

if TYPE_CHECKING:
    from plait.engine import KeptWeights


def cache(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models whose packed weights are meant: folders or repository ids. Without any: those of the "
            "Hugging Face cache, and of models that lie in folders that cannot be written.",
            metavar="[MODEL]...",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Delete them.")] = False,
    json: JsonFlag = False,
) -> None:
    """List what the CPU kernels made of models' weights and kept on the disk for a faster start.

    Nothing is lost by removing it: the next start makes it again.
    """
    found = _kept(models or ())
    if remove:
        for kept in found:
            kept.remove()
    if json:
        print_json(
            [
                {
                    "file": str(kept.path),
                    "model_folder": None if kept.model_folder is None else str(kept.model_folder),
                    "format": kept.content.get("format"),
                    "size_bytes": kept.size_bytes,
                    "removed": remove,
                }
                for kept in found
            ]
        )
        return
    if found:
        print_table(
            ("format", "size", "model", "file"),
            [
                (
                    str(kept.content.get("format", "?")),
                    format_bytes(kept.size_bytes),
                    "damaged" if kept.model_folder is None else str(kept.model_folder),
                    str(kept.path),
                )
                for kept in found
            ],
        )
    total = format_bytes(sum(kept.size_bytes for kept in found))
    note(f"{total} {'removed' if remove else 'kept'}" if found else "no packed weights are kept there")


def _kept(names: Sequence[str]) -> list["KeptWeights"]:
    """The files of these models, or of all that can be found."""
    from plait.engine import cached_models, folder_beside, kept_weights, resolve_model, user_cache_folder

    if names:
        models = [resolve_model(name, offline=True).absolute() for name in dict.fromkeys(names)]
    else:
        models = [model.folder for model in cached_models()]
    found = [kept for model in models for kept in kept_weights(folder_beside(model))]
    elsewhere = kept_weights(user_cache_folder())
    return found + [kept for kept in elsewhere if not names or kept.model_folder in models]
