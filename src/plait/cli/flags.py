"""Flags made from the tree of settings: a command says which sections it takes, the tree says the rest."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.terminal import start_logging
from plait.errors import BadSetup
from plait.settings import SECTIONS, SettingFacts, load_settings, setting_facts, show_default

ENGINE_SECTIONS = ("model", "engine", "kvcache", "scheduling", "log")

Command = Callable[..., None]


def with_settings(
    *, sections: Sequence[str] = SECTIONS, model: bool = True, quiet: bool = False
) -> Callable[[Command], Command]:
    """Give a command `--config`, `--set` and the flags of some sections; it is called with `settings`.

    With `model` the model may also be named as the first argument, as vLLM's `serve` takes it. A `quiet`
    command shows no log line below a warning unless a level was asked for.
    """

    def decorate(command: Command) -> Command:
        facts = {
            _parameter_name(fact): fact for fact in setting_facts() if fact.section in sections and fact.flag
        }

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            flags: dict[str, object] = {}
            for name, fact in facts.items():
                value = arguments.pop(name)
                if value is not None and value != []:
                    flags[fact.path] = value
            named = arguments.pop("model", None) if model else None
            if named is not None:
                if flags.get("model.name", named) != named:
                    raise BadSetup(f"the model is named twice: {named!r} and --model {flags['model.name']!r}")
                flags["model.name"] = named
            settings = load_settings(
                file=arguments.pop("config"), flags=flags, assignments=arguments.pop("assignments") or ()
            )
            asked = "level" in settings.log.model_fields_set
            start_logging("warning" if quiet and not asked else settings.log.level)
            command(**arguments, settings=settings)

        own = [
            p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"
        ]
        parameters = [*([_MODEL] if model else []), *own, _CONFIG, _SET, *map(_parameter, facts.values())]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(keyword_only)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {p.name: p.annotation for p in keyword_only}
        return run

    return decorate


def _parameter_name(fact: SettingFacts) -> str:
    return f"setting_{fact.section}_{fact.field}"


def _parameter(fact: SettingFacts) -> inspect.Parameter:
    """A flag that is None (or empty) unless it was typed; the tree checks what was typed."""
    default = show_default(fact)
    choices = f" [cyan]{fact.kind}[/cyan]" if "|" in fact.kind else ""
    help_text = fact.text + choices + (f" [dim]\\[{default}][/dim]" if default and not fact.is_switch else "")
    panel = f"{fact.section.capitalize()} (variables PLAIT_{fact.section.upper()}__...)"
    if fact.is_switch:
        # What is off by default needs no flag to turn it off; --set can.
        spelling = fact.flag
        if fact.default:
            spelling = f"{fact.flag}/--no-{fact.flag.removeprefix('--')}"
            panel = "On unless turned off"
        option = typer.Option(spelling, help=help_text, rich_help_panel=panel, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        # The sentence says what kind of value it is; a column for it would cut the flags short.
        option = typer.Option(
            fact.flag, help=help_text, metavar=" ", rich_help_panel=panel, show_default=False
        )
        annotation = Annotated[list[str] | None, option] if fact.is_list else Annotated[str | None, option]
    return inspect.Parameter(
        _parameter_name(fact), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


_MODEL = inspect.Parameter(
    "model",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Argument(
            help="`tiny` (embedded, the default), a folder, or a Hugging Face repository id.",
            show_default=False,
        ),
    ],
)
_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option("--config", envvar="PLAIT_CONFIG", help="YAML file of settings.", metavar="FILE"),
    ],
)
_SET = inspect.Parameter(
    "assignments",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting, as section.name=value.", metavar="SETTING", show_default=False
        ),
    ],
)
