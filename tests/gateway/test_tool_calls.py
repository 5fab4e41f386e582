"""Tool calls: what the parsers find in a text, however it is cut, and what the grammars force."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import llguidance
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import BadRequest, BadSetup
from plait.gateway import GatewayOptions
from plait.gateway.tool_calls import (
    MAX_FORCED_CALLS,
    CallArguments,
    CallStart,
    HermesParser,
    Llama3Parser,
    NamedTool,
    Part,
    TextPart,
    ToolCallParser,
    ToolChoice,
    ToolFormat,
    ToolSpec,
    recognised_format,
    tool_call_format,
    tool_call_parser,
    tool_constraint,
)
from plait.gateway.tool_calls.json_scanner import JsonScanner

WEATHER = ToolSpec(
    name="get_weather",
    description="Weather in a city",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
CLOCK = ToolSpec(name="clock", description="The time", parameters={})
TOOLS = (WEATHER, CLOCK)
FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3")
TINY = Path(__file__).parents[2] / "src/plait/model/tiny"


def parsed(parser: ToolCallParser, pieces: Iterable[str]) -> list[Part]:
    """All parts of an answer, neighbours of one kind joined."""
    found = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    joined: list[Part] = []
    for part in found:
        match joined[-1:], part:
            case [TextPart(before)], TextPart(text):
                joined[-1] = TextPart(before + text)
            case [CallArguments(index, before)], CallArguments(same, fragment) if index == same:
                joined[-1] = CallArguments(index, before + fragment)
            case _:
                joined.append(part)
    return joined


def hermes(text: str) -> list[Part]:
    return parsed(HermesParser(), [text])


def llama3(text: str) -> list[Part]:
    return parsed(Llama3Parser(frozenset({"get_weather", "clock"})), [text])


def hermes_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


# -- Hermes and Qwen ---------------------------------------------------------------------------------------


def test_text_without_a_call_passes_unchanged() -> None:
    assert hermes("  a < b <tool> \n ") == [TextPart("  a < b <tool> \n ")]


def test_a_call_has_its_name_and_the_exact_json_of_its_arguments() -> None:
    arguments = '{"city":  "Bo\\u0308nn </tool_call> {}", "days": [1, -2.5e3, {"x": null}]}'
    assert hermes(hermes_call("get_weather", arguments)) == [
        CallStart(0, "get_weather"),
        CallArguments(0, arguments),
    ]


def test_calls_in_sequence_with_text_around_them_drop_only_layout() -> None:
    text = f"Let me see.\n{hermes_call('a', '{}')}\n{hermes_call('b', '{}')}\nDone.\n"
    assert hermes(text) == [
        TextPart("Let me see."),
        CallStart(0, "a"),
        CallArguments(0, "{}"),
        CallStart(1, "b"),
        CallArguments(1, "{}"),
        TextPart("\nDone.\n"),
    ]


def test_a_name_is_announced_before_the_arguments_and_they_stream() -> None:
    parser = HermesParser()
    assert parser.push('<tool_call>{"name": "f') == []
    assert parser.push('", "argu') == [CallStart(0, "f")]
    assert parser.push('ments": {"a": "x') == [CallArguments(0, '{"a": "x')]
    assert parser.push('y"') == [CallArguments(0, 'y"')]
    assert parser.push("}}\n</tool_call>") == [CallArguments(0, "}")]
    assert parser.finish() == []


def test_plain_text_is_not_held_back_beyond_a_possible_tag() -> None:
    parser = HermesParser()
    assert parser.push("Hello") == [TextPart("Hello")]
    assert parser.push(" a <tool") == [TextPart(" a")]
    assert parser.push("box") == [TextPart(" <toolbox")]


def test_arguments_may_come_before_the_name() -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    assert hermes(text) == [CallStart(0, "f"), CallArguments(0, '{"a": 1}')]


@pytest.mark.parametrize(
    ("value", "arguments"),
    [("null", "{}"), (json.dumps('{"a": "ü"}'), '{"a": "ü"}')],
)
def test_arguments_written_as_null_or_as_a_string_of_json_are_understood(value: str, arguments: str) -> None:
    assert hermes(hermes_call("f", value)) == [CallStart(0, "f"), CallArguments(0, arguments)]


def test_a_call_without_arguments_has_empty_ones() -> None:
    assert hermes('<tool_call>{"name": "f"}</tool_call>') == [CallStart(0, "f"), CallArguments(0, "{}")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not json</tool_call> after",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": [[[[',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"arguments": 01, "name": "f"}</tool_call>',
        "text \n <tool_call>\n",
        "<tool_call><tool_call>",
        "</tool_call>",
    ],
)
def test_what_is_not_a_call_is_text_to_the_last_character(text: str) -> None:
    assert hermes(text) == [TextPart(text)]


def test_a_call_after_a_malformed_one_is_found() -> None:
    text = f"<tool_call>oops {hermes_call('f', '{}')}"
    assert hermes(text) == [TextPart("<tool_call>oops"), CallStart(0, "f"), CallArguments(0, "{}")]


def test_json_that_breaks_within_the_arguments_is_passed_on_for_the_caller_to_refuse() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> after'
    assert hermes(text) == [CallStart(0, "f"), CallArguments(0, '{"a": oops}}'), TextPart(" after")]


def test_a_missing_closing_brace_or_tag_does_not_spoil_a_call() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}</tool_call><tool_call>{"name": "g", "arguments": {}}'
    assert hermes(text) == [
        CallStart(0, "f"),
        CallArguments(0, "{}"),
        CallStart(1, "g"),
        CallArguments(1, "{}"),
    ]


def test_a_call_cut_short_keeps_what_came() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "b'
    assert hermes(text) == [CallStart(0, "f"), CallArguments(0, '{"a": "b')]


# -- Llama 3 -----------------------------------------------------------------------------------------------


def test_an_answer_that_is_a_call_is_a_call() -> None:
    arguments = '{"city": "Bonn; Köln", "days": 2}'
    for text in (
        f'{{"name": "get_weather", "parameters": {arguments}}}',
        f' \n<|python_tag|> {{"type": "function", "name": "get_weather", "parameters": {arguments}}}\n',
        f'{{"name": "get_weather", "arguments": {arguments}}}',
    ):
        assert llama3(text) == [CallStart(0, "get_weather"), CallArguments(0, arguments)]


def test_calls_separated_by_semicolons_are_all_found() -> None:
    text = '{"name": "clock", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "x"}}'
    assert llama3(text) == [
        CallStart(0, "clock"),
        CallArguments(0, "{}"),
        CallStart(1, "get_weather"),
        CallArguments(1, '{"city": "x"}'),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "Hello {",
        '{"name": "Ada", "parameters": {}}',
        '{"title": "x", "name": "clock"}',
        '{"name": "clo',
        '<|python_tag|>print("x")',
        "<|python",
        '[{"name": "clock"}]',
        '; {"name": "clock", "parameters": {}}',
    ],
)
def test_an_answer_that_is_not_a_call_is_text(text: str) -> None:
    assert llama3(text) == ([TextPart(text)] if text else [])


def test_text_after_a_call_is_kept() -> None:
    assert llama3('{"name": "clock", "parameters": {}} and {')[2:] == [TextPart(" and {")]
    assert llama3('{"name": "clock", "parameters": {}}; {"name": "unknown"}')[2:] == [
        TextPart('; {"name": "unknown"}')
    ]


def test_json_that_breaks_within_llama_arguments_is_passed_on() -> None:
    assert llama3('{"name": "clock", "parameters": {oops}}') == [
        CallStart(0, "clock"),
        CallArguments(0, "{oops}}"),
    ]


# -- both, however the text is cut -------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
argument_texts = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    st.dictionaries(st.text(), json_values, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
)
snippets = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "call>",
            "<|python_tag|>",
            "<|py",
            ";",
            "{",
            "}",
            "[",
            "]",
        ),
        *(
            '"name"',
            '"arguments"',
            '"parameters"',
            '"clock"',
            '"get_weather"',
            '"',
            ":",
            ",",
            " ",
            "\n",
            "\\",
        ),
        *(
            "\\u",
            "d800",
            "1e",
            "-",
            "tru",
            "null",
            "true",
            "0",
            "x",
            '"type": "function", ',
            "ü",
            "\U0001f600",
        ),
        *('{"name": "clock", "arguments": ', '{"name": "clock", "parameters": {}}', "\\ud83d", "\x00"),
    ]
)
adversarial_texts = st.lists(snippets, max_size=25).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[str, list[str]]:
    text = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def new_parser(format: ToolFormat) -> ToolCallParser:
    return tool_call_parser(format, TOOLS, "auto")


@given(cut_texts(adversarial_texts), st.sampled_from(FORMATS))
@settings(max_examples=200, deadline=None)
def test_any_cut_of_any_text_gives_the_same_parts(cut: tuple[str, list[str]], format: ToolFormat) -> None:
    text, pieces = cut
    whole = parsed(new_parser(format), [text])
    assert parsed(new_parser(format), pieces) == whole
    assert parsed(new_parser(format), text) == whole
    starts = [part.index for part in whole if isinstance(part, CallStart)]
    assert starts == list(range(len(starts)))
    if not starts:
        assert whole == ([TextPart(text)] if text else [])
    for part in whole:
        assert (
            part.text if isinstance(part, TextPart) else part.name if isinstance(part, CallStart) else "x"
        ).encode()


@given(
    st.lists(st.tuples(st.sampled_from(["clock", "get_weather"]), argument_texts), min_size=1, max_size=3),
    st.text(alphabet='abc <>/{}"\n').filter(lambda text: "<tool_call>" not in text),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_written_calls_are_read_back_exactly(
    calls: Sequence[tuple[str, str]], prose: str, data: st.DataObject
) -> None:
    expected: list[Part] = []
    for index, (name, arguments) in enumerate(calls):
        expected += [CallStart(index, name), CallArguments(index, arguments)]
    in_hermes = prose + "\n".join(hermes_call(name, arguments) for name, arguments in calls)
    in_llama3 = "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)
    _, pieces = data.draw(cut_texts(st.just(in_hermes)))
    before = [TextPart(prose.rstrip(" \n"))] if prose.strip(" \n") else []
    assert parsed(new_parser("hermes"), pieces) == before + expected
    _, pieces = data.draw(cut_texts(st.just(in_llama3)))
    assert parsed(new_parser("llama3"), pieces) == expected


@given(
    argument_texts
    | adversarial_texts
    | st.text(alphabet='{}[]",:\\ \n\t0123456789.eE+-truefalsn', max_size=30)
)
@settings(max_examples=200, deadline=None)
def test_the_scanner_finds_complete_what_json_finds_valid(text: str) -> None:
    scanner = JsonScanner()
    # The bracket gives a number an end to show it is complete.
    scanner.scan(f"[{text}]", 0)
    try:
        value = json.loads(f"[{text}]")
    except ValueError:
        value = None
    whole = scanner.state == "complete" and JsonScanner().scan(f"[{text}]", 0) == len(text) + 2
    assert whole == (value is not None)


# -- choosing a format -------------------------------------------------------------------------------------


class Template:
    def __init__(self, chat_template: str) -> None:
        self.chat_template_source = chat_template


def test_the_format_is_recognised_from_the_chat_template() -> None:
    assert recognised_format((TINY / "chat_template.jinja").read_text()) == "hermes"
    assert recognised_format("<tool_call>\n<function=example>") is None
    assert (
        recognised_format('Respond in the format {"name": function name, "parameters": dictionary')
        == "llama3"
    )
    assert recognised_format("{{ messages[0].content }}") is None
    assert tool_call_format("llama3", Template("<tool_call>")) == "llama3"
    assert tool_call_format("auto", Template("<tool_call>")) == "hermes"


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_without_a_format_tools_are_refused_by_name(asked: str) -> None:
    with pytest.raises(BadRequest, match="tool-format"):
        tool_call_format(asked, Template(""))


def test_an_unknown_format_is_refused_at_start_with_the_known() -> None:
    with pytest.raises(BadSetup, match=r"'xml'.*auto, hermes, llama3, none"):
        GatewayOptions(tool_format="xml")


# -- constraints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ll_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(str(TINY / "tokenizer.json"))


def matcher(
    ll_tokenizer: llguidance.LLTokenizer, format: ToolFormat, choice: ToolChoice, parallel: bool = True
):
    constraint = tool_constraint(format, TOOLS, choice, parallel)
    assert constraint is not None and constraint.kind == "grammar"
    made = llguidance.LLMatcher(ll_tokenizer, llguidance.LLMatcher.grammar_from_lark(constraint.text))
    assert not made.is_error(), made.get_error()
    return made


def accepts(ll_tokenizer: llguidance.LLTokenizer, made: llguidance.LLMatcher, text: str) -> bool:
    tokens = ll_tokenizer.tokenize_str(text)
    return made.try_consume_tokens(tokens) == len(tokens) and made.is_accepting()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("choice", ["required", NamedTool("get_weather")])
@pytest.mark.parametrize("seed", range(3))
def test_any_answer_the_grammar_allows_is_valid_calls(
    ll_tokenizer: llguidance.LLTokenizer, format: ToolFormat, choice: ToolChoice, seed: int
) -> None:
    made = matcher(ll_tokenizer, format, choice)
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while not (made.is_accepting() and (made.is_stopped() or rng.random() < 0.3)):
        bits = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [int(token) for token in np.flatnonzero(bits) if token not in ll_tokenizer.eos_tokens]
        tokens.append(int(rng.choice(allowed)))
        assert made.consume_token(tokens[-1])
        assert len(tokens) < 2000
    parts = parsed(tool_call_parser(format, TOOLS, choice), [ll_tokenizer.decode_str(tokens)])
    calls = [part for part in parts if isinstance(part, CallStart)]
    assert calls and len(parts) == 2 * len(calls)
    assert len(calls) <= (1 if isinstance(choice, NamedTool) else MAX_FORCED_CALLS)
    for start, arguments in zip(parts[::2], parts[1::2], strict=True):
        assert isinstance(start, CallStart) and isinstance(arguments, CallArguments)
        value = json.loads(arguments.fragment)
        if start.name == "clock":
            assert value == {}
        else:
            assert isinstance(value["city"], str) and value.keys() <= {"city", "days"}
            assert isinstance(value.get("days", 0), int)


def test_the_grammar_writes_calls_as_the_chat_template_does(ll_tokenizer: llguidance.LLTokenizer) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn", "days": 2}}\n</tool_call>'
    assert accepts(ll_tokenizer, matcher(ll_tokenizer, "hermes", "required"), call)
    assert accepts(ll_tokenizer, matcher(ll_tokenizer, "hermes", "required"), f"{call}\n{call}")
    assert not accepts(
        ll_tokenizer, matcher(ll_tokenizer, "hermes", "required", parallel=False), f"{call}\n{call}"
    )
    assert not accepts(ll_tokenizer, matcher(ll_tokenizer, "hermes", NamedTool("clock")), call)


def test_free_choices_are_not_constrained() -> None:
    assert tool_constraint("hermes", TOOLS, "auto", True) is None
    assert tool_constraint("hermes", TOOLS, "none", True) is None


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ((), "required", "needs tools"),
        (TOOLS, NamedTool("nope"), "'nope'.*get_weather, clock"),
        ((CLOCK, CLOCK), "auto", "two tools are named 'clock'"),
        ((ToolSpec(name="f", description="", parameters={"type": "string"}),), "required", "takes an object"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(
    tools: tuple[ToolSpec, ...], choice: ToolChoice, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        tool_constraint("hermes", tools, choice, True)


def test_a_tool_needs_a_name_that_every_dialect_can_carry() -> None:
    with pytest.raises(BadRequest, match="'a b'"):
        ToolSpec(name="a b", description="", parameters={})


# -- through the server ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_call_that_the_model_writes_by_itself_is_found_unless_tools_are_off(
    client: openai.OpenAI, choice: Literal["auto", "none"]
) -> None:
    call = hermes_call("clock", '{"zone": "UTC"}')
    written = f"Let me see.\n{call}"
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "What time is it?"}],
        tools=[{"type": "function", "function": {"name": "clock"}}],
        tool_choice=choice,
        extra_body={"structured_outputs": {"choice": [written]}},
    ).choices[0]
    if choice == "none":
        assert answer.message.content == written and answer.finish_reason == "stop"
    else:
        (found,) = answer.message.tool_calls or ()
        assert answer.message.content == "Let me see." and answer.finish_reason == "tool_calls"
        assert found.type == "function"
        assert (found.function.name, found.function.arguments) == ("clock", '{"zone": "UTC"}')
