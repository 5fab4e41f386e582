"""Fixtures: commands in this process, and a server in a process of its own."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_plait import InProcess, RunningPlait, plait_environment


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing of this user's: no variables of plait's, empty configuration and caches."""
    return plait_environment(tmp_path)


@pytest.fixture
def plait(environment: dict[str, str]) -> Iterator[InProcess]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    own_level = logging.getLogger("plait").level
    yield InProcess(environment)
    # A command sets up logging for its process.
    root.handlers[:], root.level = handlers, level
    logging.getLogger("plait").setLevel(own_level)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPlait]:
    """`plait serve` on tiny, shared by the tests of a module, with one API key."""
    folder = tmp_path_factory.mktemp("server")
    with RunningPlait(
        "serve", "--port", "0", "--api-key", "sk-test", environment=plait_environment(folder)
    ) as it:
        it.wait_for("ready:")
        yield it
