from collections.abc import Iterator

import pytest
from other_server import OtherServer, serving


@pytest.fixture
def other_server() -> Iterator[OtherServer]:
    other = OtherServer()
    with serving(other.app()) as base_url:
        other.base_url = base_url
        yield other
