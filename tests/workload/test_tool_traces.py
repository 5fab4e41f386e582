"""Conversations whose next call comes when a tool has run."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import TraceRequest, format_tool_calls, format_trace, parse_tool_calls, parse_trace

LINE = (
    '{"conversation": "a", "arrival_s": 1.5, "calls": [{"prompt_tokens": 900, "output_tokens": 60}, '
    '{"prompt_tokens": 1300, "output_tokens": 20, "tool_s": 2.5}]}'
)
OTHER = '{"conversation": "b", "arrival_s": 2.0, "calls": [{"prompt_tokens": 9, "output_tokens": 6}]}'
calls = st.tuples(st.integers(1, 10**6), st.integers(1, 10**5), st.floats(0, 1e5))


def test_the_next_call_comes_after_the_answer_and_the_tool() -> None:
    first, other, second = parse_tool_calls([LINE, "", OTHER], where="t", output_tokens_per_s=10.0)
    assert (first.arrival_s, first.turn, first.after_s) == (1.5, 0, None)
    assert (other.conversation, other.arrival_s) == ("b", 2.0)
    assert second == TraceRequest(
        arrival_s=1.5 + 6.0 + 2.5,
        prompt_tokens=1300,
        output_tokens=20,
        conversation="a",
        turn=1,
        after_s=2.5,
    )


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.lists(calls, min_size=1, max_size=4)), min_size=1, max_size=5)
)
def test_tool_calls_round_trip(conversations: list[tuple[float, list[tuple[int, int, float]]]]) -> None:
    lines = [
        json.dumps(
            {
                "conversation": f"c{number}",
                "arrival_s": at_s,
                "calls": [
                    {"prompt_tokens": prompt, "output_tokens": output, **({"tool_s": tool_s} if turn else {})}
                    for turn, (prompt, output, tool_s) in enumerate(made)
                ],
            }
        )
        for number, (at_s, made) in enumerate(sorted(conversations, key=lambda pair: pair[0]))
    ]
    trace = parse_tool_calls(lines, where="memory")
    assert parse_tool_calls(format_tool_calls(trace), where="memory") == trace
    assert sorted(format_tool_calls(trace)) == sorted(lines)
    assert parse_trace(format_trace(trace), where="memory") == trace


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "line 2 is not JSON"),
        ('{"conversation": "b"}', "field 'arrival_s' is missing"),
        (OTHER.replace("}]}", '}], "x": 1}'), "unknown field 'x'"),
        (OTHER.replace('"b"', "7"), "conversation must be a name"),
        (LINE, "conversation 'a' has a line already"),
        (OTHER.replace("2.0", "NaN"), "arrival_s must be a finite number"),
        (OTHER.replace('[{"prompt_tokens": 9, "output_tokens": 6}]', "[]"), "calls must be a list of 1 to"),
        (OTHER.replace('{"prompt_tokens": 9, "output_tokens": 6}', "3"), "call 1 is no object"),
        (OTHER.replace('"output_tokens": 6', '"tool_s": 6'), "call 1: every call has the tokens"),
        (OTHER.replace(": 6}", ': 6, "tool_s": 1}'), "call 1: every call has the tokens"),
        (LINE.replace('"a"', '"b"').replace(', "tool_s": 2.5', ""), "call 2: every call has the tokens"),
        (LINE.replace('"a"', '"b"').replace("2.5", "-1"), "call 2: tool_s must be a finite number"),
        (OTHER.replace("9", "0"), "call 1: prompt_tokens must be a whole number from 1 on"),
    ],
)
def test_a_malformed_conversation_is_refused_with_its_place(line: str, message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        parse_tool_calls([LINE, line], where="t")


def test_what_is_no_conversation_cannot_be_written() -> None:
    alone = TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=1)
    with pytest.raises(BadSetup, match="belongs to no conversation"):
        list(format_tool_calls([alone]))
    later = TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=1, conversation="a", after_s=1.0)
    with pytest.raises(BadSetup, match="exactly its first call"):
        list(format_tool_calls([later]))
    with pytest.raises(BadSetup, match="holds no conversation"):
        parse_tool_calls([], where="t")
    with pytest.raises(BadSetup, match="rate above 0"):
        parse_tool_calls([LINE], where="t", output_tokens_per_s=0.0)


odd = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversation", "arrival_s", "calls", "prompt_tokens", "output_tokens", "tool_s"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(st.lists(odd.map(json.dumps) | st.text(max_size=20), max_size=4))
def test_no_line_does_more_than_be_refused(lines: list[str]) -> None:
    with contextlib.suppress(BadSetup):
        assert parse_tool_calls(lines, where="fuzz")
