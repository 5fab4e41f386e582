"""Published formats: reading, writing and reading again gives the same; what is malformed is refused with its line."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import BadSetup
from plait.workload import (
    TraceRequest,
    format_azure,
    format_burstgpt,
    format_mooncake,
    format_sharegpt,
    format_trace,
    parse_azure,
    parse_burstgpt,
    parse_mooncake,
    parse_sharegpt,
    parse_trace,
    spread_arrivals,
)

AZURE = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,4808,10"]
BURSTGPT = [
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,7,2.5,ChatGPT,472,18,490,Conversation log",
]
MOONCAKE = ['{"timestamp": 27482, "input_length": 513, "output_length": 52, "hash_ids": [46, 2353]}']
counts = st.integers(1, 10**6)
words = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=12).map(
    lambda text: f"x{text.strip()}"
)


def test_azure_times_have_seven_digits_and_count_from_the_first() -> None:
    trace = parse_azure(
        [*AZURE, "2023-11-16 18:17:04.0320001,3,1", "", "2023-11-16 18:17:02.9799600,5,6"], where="a"
    )
    assert [request.arrival_s for request in trace] == [0.0, 1.0, 1.0520401]
    assert [request.prompt_tokens for request in trace] == [5, 4808, 3]


def test_azure_of_2024_has_zones() -> None:
    lines = [AZURE[0], "2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 02:00:01+02:00,2,5"]
    assert [request.arrival_s for request in parse_azure(lines, where="a")] == [0.0, 0.99007]


@given(st.lists(st.tuples(st.integers(0, 7 * 86400 * 10**7), counts, counts), min_size=1, max_size=20))
def test_azure_round_trip(requests: list[tuple[int, int, int]]) -> None:
    ticks = sorted(requests)
    trace = tuple(
        TraceRequest(arrival_s=(at - ticks[0][0]) / 10**7, prompt_tokens=prompt, output_tokens=output)
        for at, prompt, output in ticks
    )
    assert parse_azure(format_azure(trace), where="memory") == trace
    lines = list(format_azure(trace))
    assert list(format_azure(parse_azure(lines, where="memory"))) == lines


def test_burstgpt_keeps_sessions_models_and_kinds_and_drops_failures() -> None:
    lines = [
        *BURSTGPT,
        "6.5,7,1,GPT-4,10,0,10,API log",
        '7,8,1,"GPT-4, turbo",10,2,12,API log',
        "9,7,1,ChatGPT,5,6,11,x",
    ]
    first, second, third = parse_burstgpt(lines, where="b")
    assert first == TraceRequest(
        arrival_s=5.0,
        prompt_tokens=472,
        output_tokens=18,
        conversation="7",
        tenant="Conversation log",
        adapter="ChatGPT",
    )
    assert (second.conversation, second.turn, second.adapter) == ("8", 0, "GPT-4, turbo")
    assert (third.conversation, third.turn) == ("7", 1)


def test_burstgpt_of_the_first_release_has_no_sessions() -> None:
    lines = [
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,4,5,9,API log",
    ]
    (request,) = parse_burstgpt(lines, where="b")
    assert request.conversation is None


@given(
    st.lists(
        st.tuples(st.floats(0, 1e7), counts, counts, st.none() | st.integers(0, 3), words, words),
        min_size=1,
        max_size=12,
    )
)
def test_burstgpt_round_trip(requests: list[tuple[float, int, int, int | None, str, str]]) -> None:
    turns: dict[int, int] = {}
    trace: list[TraceRequest] = []
    for at, prompt, output, session, tenant, adapter in sorted(requests, key=lambda request: request[0]):
        trace.append(
            TraceRequest(
                arrival_s=at,
                prompt_tokens=prompt,
                output_tokens=output,
                conversation=None if session is None else str(session),
                turn=0 if session is None else turns.get(session, 0),
                tenant=tenant,
                adapter=adapter,
            )
        )
        if session is not None:
            turns[session] = turns.get(session, 0) + 1
    assert parse_burstgpt(format_burstgpt(trace), where="memory") == tuple(trace)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 5000), counts), min_size=1, max_size=12))
def test_mooncake_round_trip(requests: list[tuple[int, int, int]]) -> None:
    trace = tuple(
        TraceRequest(
            arrival_s=at / 1000,
            prompt_tokens=prompt,
            output_tokens=output,
            prompt_blocks=tuple(range(number, number - (-prompt // 512))),
        )
        for number, (at, prompt, output) in enumerate(sorted(requests))
    )
    assert parse_mooncake(format_mooncake(trace), where="memory") == trace
    assert parse_trace(format_trace(trace), where="memory") == trace


def test_bunched_arrivals_are_spread_over_their_cell_only() -> None:
    bunched = tuple(
        TraceRequest(arrival_s=3.0 * (number // 500), prompt_tokens=1, output_tokens=number + 1)
        for number in range(5000)
    )
    spread = spread_arrivals(bunched, np.random.default_rng(0))
    assert [request.arrival_s for request in spread] == sorted(request.arrival_s for request in spread)
    for request in spread:
        assert request.arrival_s // 3 * 3 == bunched[request.output_tokens - 1].arrival_s
    assert len({request.arrival_s for request in spread}) == 5000
    offsets = np.sort([request.arrival_s % 3 for request in spread]) / 3
    assert np.abs(offsets - np.arange(5000) / 5000).max() < 0.03


def conversation(*said: str, id: object = "a") -> dict[str, object]:
    speakers = ("human", "gpt")
    return {
        "id": id,
        "conversations": [{"from": speakers[n % 2], "value": text} for n, text in enumerate(said)],
    }


def count_words(text: str) -> int:
    return len(text.split())


def test_sharegpt_takes_the_first_question_and_its_answer_and_filters_by_length() -> None:
    entries = [
        conversation("one two three four", "five six seven eight", "more", "of it"),
        conversation("too short", "one two three four"),
        conversation("one two three four", "short"),
        conversation("w " * 1025, "one two three four"),
        conversation("w " * 1024, "w " * 1025),
        conversation("w " * 1024, "w " * 1024, id=7),
        conversation(),
        {
            "id": "b",
            "conversations": [{"from": "gpt", "value": "w " * 9}, {"from": "human", "value": "w " * 9}],
        },
    ]
    trace = parse_sharegpt(json.dumps(entries), count_words, where="s")
    assert [(request.prompt_tokens, request.output_tokens) for request in trace] == [(4, 4), (1024, 1024)]
    assert (trace[0].prompt, trace[0].answer, trace[0].conversation) == (
        "one two three four",
        "five six seven eight",
        "a",
    )
    assert trace[1].conversation == "7"
    assert parse_sharegpt(format_sharegpt(trace), count_words, where="memory") == trace


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=6))
def test_sharegpt_round_trip(said: list[tuple[str, str]]) -> None:
    padded = [(f"a b c d {one}", f"a b c d {other}") for one, other in said]
    entries = [conversation(*pair, id=str(number)) for number, pair in enumerate(padded)]
    trace = parse_sharegpt(json.dumps(entries), count_words, where="memory")
    assert [(request.prompt, request.answer) for request in trace] == padded
    assert parse_sharegpt(format_sharegpt(trace), count_words, where="memory") == trace
    assert parse_trace(format_trace(trace), where="memory") == trace


@given(
    st.builds(replace, st.just(TraceRequest(arrival_s=1.5, prompt_tokens=600, output_tokens=2)), turn=counts)
)
def test_our_own_format_keeps_every_field(request: TraceRequest) -> None:
    whole = replace(
        request,
        prompt="p",
        answer="ä",
        conversation="c",
        tenant="t",
        adapter="m",
        deadline_s=2.5,
        after_s=0.5,
        prompt_blocks=(3, 9),
    )
    assert parse_trace(format_trace([request, whole]), where="memory") == (request, whole)


@pytest.mark.parametrize(
    ("parse", "lines", "message"),
    [
        (parse_azure, [], "t is empty"),
        (parse_azure, [AZURE[0]], "holds no request"),
        (parse_azure, ["a,b,c"], "line 1: column 'TIMESTAMP' is missing"),
        (parse_azure, [*AZURE, "2023-11-16 18:17:04,3"], "line 3 has 2 columns and the heading 3"),
        (parse_azure, [*AZURE, "yesterday,3,4"], "line 3: TIMESTAMP must look like"),
        (parse_azure, [*AZURE, "2023-13-16 18:17:04,3,4"], "line 3: TIMESTAMP '2023-13-16"),
        (parse_azure, [*AZURE, "2023-11-16 18:17:04,x,4"], "line 3: ContextTokens must be a whole number"),
        (parse_azure, [*AZURE, "2023-11-16 18:17:04,-3,4"], "line 3: ContextTokens must be"),
        (parse_azure, [*AZURE, f"2023-11-16 18:17:04,{'9' * 5000},4"], "line 3: ContextTokens must be"),
        (parse_azure, [*AZURE, 'a"b'], "line 3"),
        (parse_azure, [*AZURE, "x" * (17 << 20)], "line 3 is longer than any request"),
        (parse_burstgpt, ["Timestamp,Model"], "column 'Request tokens' is missing"),
        (parse_burstgpt, [*BURSTGPT, "nan,7,1,M,1,1,2,x"], "line 3: Timestamp must be a finite number"),
        (parse_burstgpt, [*BURSTGPT, "soon,7,1,M,1,1,2,x"], "line 3: Timestamp must be a number of seconds"),
        (parse_burstgpt, [*BURSTGPT, "6,7,1,M,0,1,1,x"], "line 3: Request tokens is 0"),
        (parse_burstgpt, [BURSTGPT[0], "6,7,1,M,5,0,5,x"], "no request that succeeded"),
        (parse_mooncake, [], "holds no request"),
        (parse_mooncake, [*MOONCAKE, "["], "line 2 is not JSON"),
        (parse_mooncake, [*MOONCAKE, "[" * 100_000], "line 2 is not JSON"),
        (parse_mooncake, [*MOONCAKE, MOONCAKE[0].replace("52", '"52x"')], "line 2: output_length must be"),
        (parse_mooncake, [*MOONCAKE, MOONCAKE[0].replace(", 2353", "")], "line 2: hash_ids has 1 numbers"),
        (parse_mooncake, [*MOONCAKE, MOONCAKE[0].replace("2353", '"a"')], "line 2: hash_ids must hold whole"),
        (
            parse_mooncake,
            [*MOONCAKE, MOONCAKE[0].replace("}", ', "code": 1}')],
            "line 2: unknown field 'code'",
        ),
        (parse_mooncake, [*MOONCAKE, '{"timestamp": 1}'], "line 2: field 'input_length' is missing"),
        (parse_mooncake, [*MOONCAKE, MOONCAKE[0].replace("27482", "9" * 5000)], "line 2"),
    ],
)
def test_a_malformed_line_is_named(parse: object, lines: list[str], message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        parse(lines, where="t")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "s is not JSON"),
        ("[" * 100_000, "s is not JSON"),
        ("{}", "no list of conversations"),
        ("[1]", "conversation 1 is no JSON object"),
        ('[{"id": 1}]', "conversation 1 has no list of turns"),
        ('[{"conversations": [{"from": 1}]}]', "conversation 1 has a turn without"),
        ("[]", "no conversation passes"),
    ],
)
def test_a_malformed_sharegpt_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadSetup, match=message):
        parse_sharegpt(text, count_words, where="s")


def test_sharegpt_needs_texts() -> None:
    with pytest.raises(BadSetup, match="request 0 has no texts"):
        format_sharegpt([TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=1)])


cells = st.sampled_from(
    ["", "5", "-1", "1e999", "nan", "0x1", "²", '"', "2023-11-16 18:17:04", "a,b", "\x00", "9" * 99]
)
garbage = st.lists(st.text(max_size=40) | st.lists(cells, max_size=9).map(",".join), max_size=5)
json_garbage = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "timestamp",
                    "input_length",
                    "output_length",
                    "hash_ids",
                    "conversations",
                    "id",
                    "from",
                    "value",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(garbage, st.sampled_from([AZURE[0], BURSTGPT[0], ""]))
def test_no_line_does_more_than_be_refused(lines: list[str], heading: str) -> None:
    for parse in (parse_azure, parse_burstgpt, parse_mooncake, parse_trace):
        try:
            trace = parse([heading, *lines], where="fuzz")
        except BadSetup as error:
            assert "fuzz" in error.message
        else:
            assert trace


@given(st.lists(json_garbage, max_size=4))
def test_no_json_does_more_than_be_refused(values: list[object]) -> None:
    lines = [json.dumps(value) for value in values]
    for parse in (parse_mooncake, parse_trace):
        with contextlib.suppress(BadSetup):
            assert parse(lines, where="fuzz")
    with contextlib.suppress(BadSetup):
        assert parse_sharegpt(json.dumps(values), count_words, where="fuzz")
