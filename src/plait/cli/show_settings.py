"""`plait settings`: what is set, and the reference page of what can be."""

from typing import Annotated

import typer

from plait.cli.flags import with_settings
from plait.cli.terminal import JsonFlag, print_fields, print_json, say
from plait.settings import Settings, describe_settings, settings_page


@with_settings(model=False)
def show_settings(
    json: JsonFlag = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
    *,
    settings: Settings,
) -> None:
    """Print the settings in effect: file, environment and flags resolved."""
    if markdown:
        say(settings_page().rstrip("\n"))
        return
    tree = describe_settings(settings)
    if json:
        print_json(tree)
    else:
        print_fields(
            {f"{section}.{name}": value for section, part in tree.items() for name, value in part.items()}
        )
