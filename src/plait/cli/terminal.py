"""What commands say: results on standard output, everything else on standard error."""

import json
import logging
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Protocol

import typer

from plait.units import format_bytes

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

# When a bar that is not on a terminal first says something, and how often then.
PLAIN_BAR_FIRST_S = 1.0
PLAIN_BAR_S = 5.0
LOG_FORMAT = "time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"


def say(text: str = "") -> None:
    """A line for the person at the terminal, on standard output, at once."""
    typer.echo(text)
    sys.stdout.flush()


def say_piece(text: str) -> None:
    """A piece of an answer that is still coming."""
    typer.echo(text, nl=False)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line about what is going on, on standard error."""
    typer.echo(text, err=True)


def error_line(message: str) -> None:
    """The one line that an error of ours comes to."""
    typer.echo(f"plait: {message}", err=True)


def print_json(value: object) -> None:
    """A value for programs."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def print_fields(fields: Mapping[str, object]) -> None:
    """Names and values, aligned."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        say(f"{name:<{width}}  {value}")


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings, columns aligned; plain text, so that other tools can read it."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    for row in [headings, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def start_logging(level: str) -> None:
    """Send log lines to standard error; libraries speak from `warning` on unless `debug` was asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.basicConfig(
        level=logging.DEBUG if level == "debug" else logging.WARNING, handlers=[handler], force=True
    )
    logging.getLogger("plait").setLevel(level.upper())


class BytesBar(Protocol):
    """A progress bar that counts bytes; `total_bytes` 0 means not known yet."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None: ...


@contextmanager
def bytes_bar() -> Generator[BytesBar]:
    """A bar on a terminal; elsewhere a line now and then."""
    if sys.stderr.isatty():
        with _rich_bar() as bar:
            yield bar
    else:
        yield _PlainBar()


@contextmanager
def _rich_bar() -> Generator[BytesBar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None)
            progress.update(tasks[stage], completed=done_bytes, total=total_bytes or None)

        yield show


class _PlainBar:
    """Says nothing of what is over soon."""

    def __init__(self) -> None:
        self._due_s = time.monotonic() + PLAIN_BAR_FIRST_S

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if total_bytes and now_s >= self._due_s:
            self._due_s = now_s + PLAIN_BAR_S
            note(f"{stage}: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}")
