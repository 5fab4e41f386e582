"""The reference page of the settings is what the tree says today."""

from pathlib import Path

from plait.settings import describe_settings, load_settings, setting_facts, settings_page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_in_docs_is_current() -> None:
    written = (DOCS / "settings.md").read_text()
    assert written == settings_page(), "write it anew: plait settings --markdown > docs/settings.md"


def test_the_example_of_the_page_is_a_settings_file(tmp_path: Path) -> None:
    example = (DOCS / "settings.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "plait.yaml").write_text(example)
    settings = load_settings(file=tmp_path / "plait.yaml")
    assert (settings.kvcache.memory, settings.server.port) == (2 * 2**30, 8001)


def test_the_page_has_every_setting_once() -> None:
    page = settings_page()
    for fact in setting_facts():
        assert page.count(f"| `{fact.path}` |") == 1
        assert fact.variable in page


def test_the_description_hides_keys_and_is_plain_data() -> None:
    described = describe_settings(load_settings(flags={"server.api_keys": ["sk-secret"]}))
    assert described["server"]["api_keys"] == ["hidden"]
    assert "sk-secret" not in repr(described)
