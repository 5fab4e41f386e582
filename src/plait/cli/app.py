"""The commands, and how an error of ours ends one."""

import logging
import platform
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from plait import __version__
from plait.cli.bench import bench
from plait.cli.cache import cache
from plait.cli.chat import chat
from plait.cli.demo import demo
from plait.cli.doctor import doctor
from plait.cli.generate import generate
from plait.cli.join import join
from plait.cli.keys import token
from plait.cli.models import models, pull
from plait.cli.profile import profile
from plait.cli.route import route
from plait.cli.serve import serve
from plait.cli.show_settings import show_settings
from plait.cli.simulate import simulate
from plait.cli.swarm_commands import leave, status
from plait.cli.terminal import JsonFlag, error_line, print_fields, print_json
from plait.cli.up import up
from plait.errors import BadRequest, BadSetup, ServingError

EXIT_FAILURE = 1
EXIT_BAD_SETUP = 2


class _Commands(TyperGroup):
    """Ends a command with one line on standard error where an error of ours left it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ServingError as error:
            if logging.getLogger("plait").isEnabledFor(logging.DEBUG):
                traceback.print_exc()
            error_line(error.message)
            sys.exit(EXIT_BAD_SETUP if isinstance(error, BadSetup | BadRequest) else EXIT_FAILURE)


app = typer.Typer(
    name="plait",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="plait weaves unequal machines into one LLM server.",
    epilog="Exit codes: 0 done, 1 it failed, 2 the command or this machine is not set up for it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    serve,
    join,
    up,
    status,
    leave,
    route,
    chat,
    generate,
    demo,
    models,
    pull,
    cache,
    profile,
    simulate,
    doctor,
):
    app.command()(_command)
app.add_typer(bench, name="bench")
app.add_typer(token, name="token")
app.command("settings")(show_settings)


def _version_and_exit(asked: bool) -> None:
    if asked:
        typer.echo(f"plait {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version_and_exit, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command("version")
def show_version(json: JsonFlag = False) -> None:
    """Print the versions of plait and of what it stands on."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {"plait": __version__, "python": platform.python_version()}
    for package in ("torch", "tokenizers", "safetensors", "huggingface-hub", "fastapi", "uvicorn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    if json:
        print_json(versions)
    else:
        print_fields({name: found or "not installed" for name, found in versions.items()})


def main() -> None:
    """Run the command line of this process."""
    app()
