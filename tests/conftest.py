"""What tests of several packages share."""

from collections.abc import Iterator

import pytest
from stand_in_hub import StandInHub


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """A model hub on a loopback port."""
    with StandInHub() as running:
        yield running
