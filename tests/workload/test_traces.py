import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import (
    TraceRequest,
    format_trace,
    length_mix_named,
    parse_trace,
    poisson_arrivals_s,
    synthesize_trace,
)

GOOD = '{"arrival_s": 1.5, "prompt_tokens": 3, "output_tokens": 4}'

requests = st.builds(
    TraceRequest,
    arrival_s=st.floats(0, 1e6),
    prompt_tokens=st.integers(1, 10**6),
    output_tokens=st.integers(1, 10**6),
    prompt=st.none() | st.text(),
)


@given(st.lists(requests, min_size=1, max_size=8))
def test_reading_what_was_written_gives_an_equal_trace(unsorted: list[TraceRequest]) -> None:
    trace = tuple(sorted(unsorted, key=lambda request: request.arrival_s))
    assert parse_trace(format_trace(trace), where="memory") == trace


def test_a_synthesised_trace_has_the_arrivals_and_lengths_of_its_seed() -> None:
    arrivals_s = poisson_arrivals_s(20, 5.0, np.random.default_rng(1)).tolist()
    mix = length_mix_named("uniform")
    trace = synthesize_trace(arrivals_s, mix, np.random.default_rng(2), most_total_tokens=300)
    assert [request.arrival_s for request in trace] == arrivals_s
    assert all(request.prompt_tokens + request.output_tokens <= 300 for request in trace)
    assert trace == synthesize_trace(arrivals_s, mix, np.random.default_rng(2), most_total_tokens=300)


def test_blank_lines_are_ignored() -> None:
    assert parse_trace(["", GOOD + "\n", "  \n"], where="t") == (
        TraceRequest(arrival_s=1.5, prompt_tokens=3, output_tokens=4),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl, line 2 is not JSON"),
        ("[1]", "trace.jsonl, line 2 is not a JSON object"),
        ('{"arrival_s": 2, "prompt_tokens": 3}', "line 2: field 'output_tokens' is missing"),
        (GOOD.replace("}", ', "color": 1}'), "line 2: unknown field 'color'"),
        (GOOD.replace("1.5", '"now"'), "line 2: arrival_s must be a number"),
        (GOOD.replace("1.5", "NaN"), "line 2: arrival_s must be a finite number"),
        (GOOD.replace("1.5", "-1"), "line 2: arrival_s must be a finite number"),
        (GOOD.replace("1.5", "true"), "line 2: arrival_s must be a number"),
        (GOOD.replace("1.5", "0.5"), "line 2: arrival_s 0.5 is before"),
        (GOOD.replace(": 3", ": 0"), "line 2: prompt_tokens must be a whole number from 1 on, not 0"),
        (GOOD.replace(": 4", ": 4.5"), "line 2: output_tokens must be a whole number"),
        (GOOD.replace("}", ', "prompt": 7}'), "line 2: prompt must be text"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_field(line: str, message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        parse_trace([GOOD, line], where="trace.jsonl")


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(BadSetup, match="holds no request"):
        parse_trace([], where="empty.jsonl")
