"""The examples in the documents run, and what they point to is there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])


def test_the_python_of_the_readme_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(example, {})
        assert printed.getvalue()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_of_documents_exist(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    named = re.findall(r"`((?:src|tests|bench|docs|tools)/[\w./-]+)`", text)
    missing += [path for path in named if not (REPOSITORY / path).exists()]
    assert not missing


@pytest.mark.parametrize(
    "document", sorted((REPOSITORY / "docs" / "systems").glob("*.md")), ids=lambda path: path.name
)
def test_code_that_a_system_page_names_exists(document: Path) -> None:
    named = re.findall(
        r"`((?:scheduling|kvcache|engine|gateway|worker|routing|placement)/\w+\.py)`", document.read_text()
    )
    assert named
    assert not [path for path in named if not (REPOSITORY / "src" / "plait" / path).exists()]
