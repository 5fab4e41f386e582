"""From file, environment and flags to one tree; later sources win, leaf by leaf."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from plait.errors import BadSetup
from plait.settings.tree import ENV_DELIMITER, ENV_PREFIX, SECTIONS, Settings, setting_facts

FlagValues = Mapping[str, object]
"""Values by the path of their setting, such as `{"server.port": "8001"}`."""

Tree = dict[str, Any]


def load_settings(
    *,
    file: Path | None = None,
    flags: FlagValues | None = None,
    assignments: Sequence[str] = (),
) -> Settings:
    """Build the settings: defaults, then the YAML file, the environment, flags, and `--set` assignments.

    Raises:
        BadSetup: a source cannot be read, names no setting, or holds a bad value; the message says which.
    """
    from_file = _read_file(file) if file is not None else {}
    from_flags: Tree = {}
    for path, value in (flags or {}).items():
        _assign(from_flags, path, value)
    for assignment in assignments:
        path, value = _read_assignment(assignment)
        _assign(from_flags, path, value)
    return _build(from_flags, "", from_file, f"the settings file {str(file)!r}")


def settings_from(tree: Tree, source: str) -> Settings:
    """Build the settings: defaults, then the environment, then a tree that was read elsewhere.

    Raises:
        BadSetup: the tree or the environment names no setting, or holds a bad value; the message names `source`.
    """
    _check_sections(tree, source)
    return _build(tree, source, {}, "")


def _build(given: Tree, given_by: str, from_file: Tree, file: str) -> Settings:
    """`given` counts most, and is flags unless `given_by` says what else."""
    _check_variables()

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        loaded = Sourced(**given)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        raise BadSetup(
            _explain(first, location, _source(location, given, given_by, from_file, file))
        ) from error
    return Settings.model_construct(**{section: getattr(loaded, section) for section in SECTIONS})


def _read_file(file: Path) -> Tree:
    try:
        tree: object = yaml.safe_load(file.read_text())
    except OSError as error:
        raise BadSetup(f"the settings file {str(file)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSetup(f"the settings file {str(file)!r} is not YAML: {error}".replace("\n", " ")) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise BadSetup(
            f"the settings file {str(file)!r} must map sections to settings, such as 'server: {{port: 8001}}'"
        )
    _check_sections(cast(Tree, tree), repr(str(file)))
    return cast(Tree, tree)


def _check_sections(tree: Tree, source: str) -> None:
    for section, settings in tree.items():
        if section in SECTIONS and not isinstance(settings, dict):
            raise BadSetup(f"section {section!r} of {source} must map names to values, not {settings!r}")


def _read_assignment(assignment: str) -> tuple[str, object]:
    path, equals, text = assignment.partition("=")
    if not equals or path.count(".") != 1:
        raise BadSetup(f"--set takes section.name=value, such as kvcache.block_tokens=32, not {assignment!r}")
    try:
        return path.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadSetup(f"--set {path}: {text!r} is not a YAML value") from error


def _assign(tree: Tree, path: str, value: object) -> None:
    section, _, name = path.partition(".")
    tree.setdefault(section, {})[name] = value


def _check_variables() -> None:
    """Refuse a variable that looks like a setting and is none; the rest of PLAIT_* is not ours to judge.

    A cluster puts variables such as PLAIT_PORT=tcp://10.0.0.1:80 into every container beside a service named
    plait, so a single underscore cannot mean a setting.
    """
    known = {facts.variable for facts in setting_facts()}
    for variable in os.environ:
        name = variable.upper()
        section = name.removeprefix(ENV_PREFIX).lower()
        if name.startswith(ENV_PREFIX) and section in SECTIONS:
            example = next(facts.variable for facts in setting_facts() if facts.section == section)
            raise BadSetup(
                f"the environment variable {variable} names a section; write for example {example}=..."
            )
        if name.startswith(ENV_PREFIX) and ENV_DELIMITER in name and name not in known:
            raise BadSetup(f"the environment variable {variable} names no setting{_nearest(name, known)}")


def _explain(first: ErrorDetails, location: Sequence[str], source: str) -> str:
    """One sentence for the first mistake: which setting, from where, what is wrong."""
    path = ".".join(location[:2])
    if first["type"] == "extra_forbidden":
        known = {facts.path for facts in setting_facts()}
        return f"{source} sets {path!r}, which is not a setting{_nearest(path, known)}"
    # pydantic prefixes what a validator of ours said.
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    shown = "a value that is not shown" if path == "server.api_keys" else repr(first["input"])
    return f"{source} sets {path!r} to {shown}: {reason}"


def _source(location: Sequence[str], given: Tree, given_by: str, from_file: Tree, file: str) -> str:
    facts = next((f for f in setting_facts() if list(location[:2]) == [f.section, f.field]), None)
    if _holds(given, location):
        flag = f"the flag {facts.flag} (or --set)" if facts is not None and facts.flag else "--set"
        return given_by or flag
    if facts is not None and facts.variable in {name.upper() for name in os.environ}:
        return f"the environment variable {facts.variable}"
    return file if _holds(from_file, location) else "something"


def _holds(tree: Tree, location: Sequence[str]) -> bool:
    section, *name = location
    settings: object = tree.get(section)
    return section in tree and (not name or (isinstance(settings, dict) and name[0] in settings))


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; 'plait settings' lists them all"
