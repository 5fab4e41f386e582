"""`plait profile`: measure what steps of a model cost on this machine."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.flags import ENGINE_SECTIONS, with_settings
from plait.cli.terminal import JsonFlag, bytes_bar, note, print_json, print_table, say
from plait.errors import BadSetup
from plait.settings import Settings
from plait.units import format_s

if TYPE_CHECKING:
    from plait.costs import Profile, StepWork

_FIRST_S = 2.0
_EVERY_S = 10.0


@with_settings(sections=ENGINE_SECTIONS, quiet=True)
def profile(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the profile here.", metavar="FILE")
    ] = None,
    last_blocks: Annotated[
        int | None,
        typer.Option(
            "--last-blocks", help="Measure operations on so many blocks only; equal ones stand for all."
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="Tokens of the largest step.")] = 512,
    context: Annotated[int, typer.Option("--context", help="Tokens of the longest context.")] = 4096,
    sequences: Annotated[int, typer.Option("--sequences", help="Most sequences that decode together.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="How often each point is measured.")] = 9,
    live_steps: Annotated[
        int, typer.Option("--live-steps", help="Steps of the engine to fit and to check.")
    ] = 240,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="Of the engine's requests; at 0 the host has less to do."),
    ] = 1.0,
    clock: Annotated[
        str,
        typer.Option("--clock", help="wall, or cpu: a busy machine's processor time, with --threads 1."),
    ] = "wall",
    json: JsonFlag = False,
    *,
    settings: Settings,
) -> None:
    """Measure what a model's steps cost on this machine, for the simulator and the planners.

    Takes minutes. The profile says on what hardware it was measured, and is refused on any other.
    """
    if clock not in ("wall", "cpu"):
        raise BadSetup(f"--clock {clock!r} is not known; choose wall or cpu")
    if out is not None and not out.absolute().parent.is_dir():
        raise BadSetup(f"cannot write {str(out)!r}: its folder is not there; choose another --out")
    from plait.cli.options import engine_options
    from plait.costs import format_profile
    from plait.engine import open_checkpoint
    from plait.profiler import ProfileWish, profile_model

    with bytes_bar() as show:
        options = engine_options(
            settings, on_download=lambda done, total: show(settings.model.name, done, total)
        )
    blocks = None
    if last_blocks is not None:
        model_blocks = len(open_checkpoint(options.folder).spec.blocks)
        if not 0 < last_blocks <= model_blocks:
            raise BadSetup(f"--last-blocks {last_blocks} is not between 1 and the model's {model_blocks}")
        blocks = range(model_blocks - last_blocks, model_blocks)
    wish = ProfileWish(
        name=Path(settings.model.name).name,
        blocks=blocks,
        step_tokens=rows,
        context_tokens=context,
        sequences=sequences,
        repeats=repeats,
        live_steps=live_steps,
        temperature=temperature,
        clock=clock,
        seed=settings.engine.seed,
    )
    measured = profile_model(options, wish, _Stages())
    text = format_profile(measured)
    if out is not None:
        try:
            out.write_text(text)
        except OSError as error:
            raise BadSetup(f"cannot write {str(out)!r}: {error.strerror}; choose another --out") from error
        note(f"written: {out}")
    if json:
        print_json({"written": str(out) if out else None, **_summary(measured)})
    else:
        _print(measured)


class _Stages:
    """A line now and then, on standard error."""

    def __init__(self) -> None:
        self._due_s = time.monotonic() + _FIRST_S

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() >= self._due_s and total:
            self._due_s = time.monotonic() + _EVERY_S
            note(f"{stage}: {done * 100 // total} %")


def _print(measured: "Profile") -> None:
    tables = measured.tables
    say(
        f"{measured.model.name}: {format_s(measured.table_costs().step_s(_one_decode()))} for a token alone, "
        f"{tables.dense.last / tables.dense.at(tables.dense.last) * _share(measured):.0f} prompt tokens/s; "
        f"the host takes {format_s(measured.host.per_step_s)} around a step"
    )
    say()
    print_table(
        ("prediction of", "points", "median error", "95 %", "mean", "bias"),
        [
            (
                name,
                str(errors.count),
                *(f"{value:.1%}" for value in (errors.median, errors.p95, errors.mean)),
                f"{errors.bias:+.1%}",
            )
            for name, errors in measured.errors.items()
        ],
    )


def _one_decode() -> "StepWork":
    from plait.costs import StepWork

    return StepWork.of([(1, 0)], sampled=1)


def _share(measured: "Profile") -> float:
    """Measured blocks over all: their rate times this is that of the model."""
    return len(measured.blocks) / measured.model.model_blocks


def _summary(measured: "Profile") -> dict[str, object]:
    return {
        "model": asdict(measured.model),
        "fingerprint": dict(measured.fingerprint),
        "clock": measured.clock,
        "host": asdict(measured.host),
        "links": {name: asdict(link) for name, link in measured.links.items()},
        "errors": {name: asdict(errors) for name, errors in measured.errors.items()},
    }
