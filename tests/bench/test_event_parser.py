from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from plait.bench.sse import EventParser

STREAM = ': ping\r\n\r\ndata: {"a": "ü"}\n\nevent: x\ndata:one\ndata: two\n\n\n\ndata: [DONE]\n\n'.encode()
EVENTS = ['{"a": "ü"}', "one\ntwo", "[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_how_the_bytes_arrive(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    events: list[str] = []
    for start, end in pairwise(places):
        events += parser.feed(STREAM[start:end])
    assert events == EVENTS


def test_an_event_is_returned_by_the_bytes_that_end_it() -> None:
    parser = EventParser()
    assert parser.feed(b"data: 1\n") == []
    assert parser.feed(b"\ndata: 2") == ["1"]
