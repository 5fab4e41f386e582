"""What tests of several packages share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from stand_in_hub import StandInHub

# No test asserts a time: these machines are shared. What else the profile in use says stays (CI's is derandomized).
settings.register_profile("plait", settings.default, deadline=None)
settings.load_profile("plait")


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """A model hub on a loopback port."""
    with StandInHub() as running:
        yield running
