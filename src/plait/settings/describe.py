"""What can be set and what is set, for people and for programs."""

from plait.settings.tree import SettingFacts, Settings, setting_facts
from plait.units import format_bytes


def describe_settings(settings: Settings) -> dict[str, dict[str, object]]:
    """The values in effect, by section and name, ready for JSON; keys are hidden."""
    tree = settings.model_dump(mode="json")
    tree["server"]["api_keys"] = ["hidden"] * len(settings.server.api_keys)
    return tree


def settings_page() -> str:
    """The reference page, as Markdown."""
    lines = [
        "# Settings",
        "",
        "Written by `plait settings --markdown`; do not edit.",
        "",
        "Each setting comes from, in rising order: its default, the YAML file of `--config` (or of the",
        "variable `PLAIT_CONFIG`), its environment variable, its flag, `--set section.name=value`. A name",
        "that is not listed here is refused. `plait settings` prints the values in effect.",
        "",
        "```yaml",
        "# plait.yaml",
        "model: {name: tiny}",
        "kvcache: {memory: 2GiB, block_tokens: 32}",
        "server: {port: 8001}",
        "```",
    ]
    sections = dict.fromkeys(facts.section for facts in setting_facts())
    for section in sections:
        sentence = Settings.model_fields[section].annotation.__doc__  # pyright: ignore[reportOptionalMemberAccess]
        lines += ["", f"## {section}", "", sentence or "", ""]
        lines += ["| setting | flag | variable | value | default | |", "|---|---|---|---|---|---|"]
        lines += [_row(facts) for facts in setting_facts() if facts.section == section]
    return "\n".join(lines) + "\n"


def _row(facts: SettingFacts) -> str:
    kind = facts.kind if facts.unit in ("", "bytes") else f"{facts.kind}, {facts.unit}"
    if facts.bounds:
        kind += f", {facts.bounds}"
    cells = (
        f"`{facts.path}`",
        f"`{facts.flag}`" if facts.flag else "",
        f"`{facts.variable}`",
        kind.replace("|", " \\| "),
        f"`{default}`" if (default := show_default(facts)) else "",
        facts.text.replace("|", "\\|"),
    )
    return "| " + " | ".join(cells) + " |"


def show_default(facts: SettingFacts) -> str:
    """A default as one would write it; empty if there is none."""
    if facts.default is None or facts.default == ():
        return ""
    if facts.is_switch:
        return "on" if facts.default else "off"
    if facts.unit == "bytes" and isinstance(facts.default, int) and facts.default:
        return format_bytes(facts.default)
    return str(facts.default)
