"""`/v1/messages`, asked by Anthropic's own client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from plait.gateway import GatewayOptions, hash_api_key
from plait.gateway.anthropic.answer import Answer
from plait.gateway.turn import ChoiceEnd, TextDelta, ToolCallArguments, ToolCallStart, TurnEnd, TurnEvent

WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Paris"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
    },
}
HELLO: Any = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def client(origin: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=origin, api_key="none", max_retries=0) as made:
        yield made


def asked(**fields: Any) -> dict[str, Any]:
    # This client no longer names temperature; servers still take it.
    return {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 6,
        "extra_body": {"temperature": 0, **fields.pop("extra_body", {})},
        **fields,
    }


def ask(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**asked(**fields))


# -- whole and streamed ------------------------------------------------------------------------------------


def test_an_answer_has_text_a_reason_to_stop_and_usage(client: anthropic.Anthropic) -> None:
    message = ask(client, system="Be brief.")
    assert message.type == "message" and message.role == "assistant" and message.model == "tiny"
    assert message.content[0].type == "text" and message.content[0].text
    assert message.stop_reason == "max_tokens" and message.stop_sequence is None
    assert message.usage.output_tokens == 6 and message.usage.input_tokens > 0
    assert message.id.startswith("msg_") and message._request_id


def test_a_stream_has_the_events_of_the_api_and_the_text_of_the_whole(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 1
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, delta = events[0].message, events[-2]
    assert start.content == [] and start.stop_reason is None and start.usage.input_tokens > 0
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == whole.content[0].text
    assert delta.delta.stop_reason == "max_tokens" and delta.usage.output_tokens == 6


def test_the_stream_helper_collects_text_and_the_final_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**asked()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text and final.stop_reason == "max_tokens"


def test_a_stream_pings(origin: str) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "stream": True}
    text = httpx.post(f"{origin}/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"}).text
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in text and text.endswith("\n\n")


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic) -> None:
    text = ask(client, max_tokens=24).content[0].text
    stop = text[len(text) // 2 :][:3]
    message = ask(client, max_tokens=24, stop_sequences=[stop])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == stop
    assert "".join(block.text for block in message.content) == text[: text.index(stop)]


def test_an_answer_may_fill_the_context_and_says_so(client: anthropic.Anthropic) -> None:
    def prompt(repeats: int) -> Any:
        return [{"role": "user", "content": "again " * repeats}]

    def count(repeats: int) -> int:
        return client.messages.count_tokens(model="tiny", messages=prompt(repeats)).input_tokens

    tokens_each = (count(20) - count(10)) // 10
    almost_all = 10 + (1000 - count(10)) // tokens_each
    schema = {"type": "array", "items": {"const": "again"}, "minItems": 100}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = ask(client, messages=prompt(almost_all), output_config=config, max_tokens=20_000)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.output_tokens == 1024 - count(almost_all)


def test_a_prefilled_answer_is_continued(client: anthropic.Anthropic, origin: str) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "Once upon a"}]
    message = ask(client, messages=messages)
    body = {"model": "tiny", "messages": messages, "max_tokens": 6, "temperature": 0}
    body["continue_final_message"] = True
    chat = httpx.post(f"{origin}/v1/chat/completions", json=body, timeout=30).json()
    assert (
        message.usage.input_tokens + message.usage.cache_read_input_tokens == chat["usage"]["prompt_tokens"]
    )
    assert "".join(block.text for block in message.content) == chat["choices"][0]["message"]["content"]


# -- prompts -----------------------------------------------------------------------------------------------


def test_tokens_are_counted_as_an_answer_counts_them(client: anthropic.Anthropic) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "system": "Be brief.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**fields).input_tokens
    usage = ask(client, **fields).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    assert counted > client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens


def test_blocks_and_strings_make_the_same_prompt(client: anthropic.Anthropic) -> None:
    block: Any = {"type": "text", "text": "Tell me a story.", "cache_control": {"type": "ephemeral"}}
    blocks = client.messages.count_tokens(
        model="tiny",
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        messages=[{"role": "user", "content": [block]}],
    )
    strings = client.messages.count_tokens(model="tiny", system="Be\nbrief.", messages=HELLO)
    assert blocks.input_tokens == strings.input_tokens


# -- tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_demanded_tool_is_used_with_an_input_of_its_schema(
    client: anthropic.Anthropic, choice: Any
) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    message = ask(client, tools=[WEATHER], tool_choice=choice, max_tokens=99)
    (block,) = message.content
    assert message.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "get_weather"
    assert block.id.startswith("toolu_")
    assert block.input["city"] in ("Bonn", "Paris") and block.input["days"] in (1, 2, 3)


def test_the_stream_helper_reads_tool_input_as_it_grows(client: anthropic.Anthropic) -> None:
    fields = asked(
        tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=99
    )
    with client.messages.stream(**fields) as stream:
        fragments = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(fragments) > 1 and json.loads("".join(fragments)) == final.content[0].input
    assert final.stop_reason == "tool_use"


def test_tool_use_and_its_result_go_back_as_blocks(client: anthropic.Anthropic) -> None:
    first = ask(client, tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"}, max_tokens=99)
    result: Any = {"type": "tool_result", "tool_use_id": first.content[0].id}
    messages: Any = [
        *HELLO,
        first.to_param(),
        {"role": "user", "content": [{**result, "content": [{"type": "text", "text": "sunny"}]}]},
    ]
    second = ask(client, messages=messages, tools=[WEATHER], tool_choice={"type": "none"})
    assert second.content[0].type == "text" and second.stop_reason != "tool_use"


def test_text_and_calls_are_blocks_one_after_the_other() -> None:
    answer = Answer("msg_1", "tiny", 5, fills_context=False)
    turn: list[TurnEvent] = [
        TextDelta(0, "Let me"),
        TextDelta(0, " see."),
        ToolCallStart(0, 0, "call_a", "f"),
        ToolCallArguments(0, 0, '{"x":'),
        ToolCallArguments(0, 0, " 1}"),
        ToolCallStart(0, 1, "call_b", "g"),
        ToolCallArguments(0, 1, "{}"),
        TextDelta(0, "Done"),
        ChoiceEnd(0, "tool_calls"),
        TurnEnd(prompt_tokens=5, cached_tokens=2, completion_tokens=9),
    ]
    events = [event for turn_event in turn for event in answer.on(turn_event)]
    assert answer.message["content"] == [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_a", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "toolu_b", "name": "g", "input": {}},
        {"type": "text", "text": "Done"},
    ]
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [start.get("text", start.get("input")) for start in starts] == ["", {}, {}, ""]
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert answer.message["usage"]["input_tokens"] == 3 and answer.message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "arguments", ['{"a": oops}', "", "[1]", '{"a": 1e999}', '{"a": "\\ud800"}', "[" * 100_000]
)
def test_arguments_that_are_no_object_are_wrapped_as_the_api_documents(arguments: str) -> None:
    answer = Answer("msg_1", "tiny", 5, fills_context=False)
    for event in (
        ToolCallStart(0, 0, "call_a", "f"),
        ToolCallArguments(0, 0, arguments),
        ChoiceEnd(0, "length"),
    ):
        answer.on(event)
    assert answer.message["content"][0]["input"] == {"INVALID_JSON": arguments}
    assert answer.message["stop_reason"] == "max_tokens"


# -- errors ------------------------------------------------------------------------------------------------


def envelope(error: anthropic.APIStatusError) -> dict[str, Any]:
    body: Any = error.body
    assert body["type"] == "error" and body["error"].keys() == {"type", "message"}
    assert body["request_id"] == error.response.headers["request-id"] == error.request_id
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_use", "id": "", "name": "f", "input": {}}]}
                ]
            },
            "tool_use",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": "so "}]}, "white space"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "'f'"),
        ({"extra_body": {"temperature": 1e9}}, "temperature"),
        ({"messages": [{"role": "user", "content": "many words " * 3000}]}, "context"),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_envelope(
    client: anthropic.Anthropic, fields: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match=message) as refused:
            ask(client, stream=stream, **fields)
        assert envelope(refused.value)["type"] == "invalid_request_error"


def test_max_tokens_is_required(origin: str) -> None:
    answer = httpx.post(f"{origin}/v1/messages", json={"model": "tiny", "messages": HELLO})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error" and "max_tokens" in answer.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "kind"),
    [
        ("POST", "/v1/messages", "{", 400, "invalid_request_error"),
        ("POST", "/v1/messages/batches", "{}", 404, "not_found_error"),
        ("GET", "/v1/messages", None, 405, "invalid_request_error"),
        ("POST", "/v1/messages", "x" * 17 * 2**20, 413, "request_too_large"),
    ],
)
def test_every_refusal_on_its_paths_has_the_envelope(
    origin: str, method: str, path: str, content: str | None, status: int, kind: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.request(method, origin + path, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == kind
    assert answer.json()["request_id"] == answer.headers["request-id"]


def test_another_model_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as refused:
        ask(client, model="claude-5")
    assert envelope(refused.value)["type"] == "not_found_error"


def test_a_wrong_key_is_an_authentication_error_and_x_api_key_a_right_one(site: Any, engine: Any) -> None:
    origin = site.serve(engine, GatewayOptions(api_key_hashes=(hash_api_key("right"),)))
    with anthropic.Anthropic(base_url=origin, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            ask(client)
        assert envelope(refused.value)["type"] == "authentication_error"
        assert ask(client.with_options(api_key="right")).content


def test_a_server_without_room_is_overloaded(site: Any, engine: Any) -> None:
    origin = site.serve(engine, GatewayOptions(max_open_requests=0))
    with (
        anthropic.Anthropic(base_url=origin, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError) as refused,
    ):
        ask(client)
    assert refused.value.status_code == 529 and envelope(refused.value)["type"] == "overloaded_error"
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_stream_that_breaks_ends_with_an_error_event(site: Any, tiny_options: Any) -> None:
    engine = site.engine(tiny_options)
    with (
        anthropic.Anthropic(base_url=site.serve(engine), api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError) as broken,
    ):
        for count, _ in enumerate(ask(client, stream=True, max_tokens=900)):
            if count == 4:
                site.run(engine.__aexit__(None, None, None))
    assert envelope(broken.value)["type"] == "overloaded_error"


def test_llama_tool_calls_are_blocks_too(site: Any, engine: Any) -> None:
    origin = site.serve(engine, GatewayOptions(tool_format="llama3"))
    with anthropic.Anthropic(base_url=origin, api_key="none", max_retries=0) as client:
        message = ask(client, tools=[WEATHER], tool_choice={"type": "any"}, max_tokens=800)
    assert message.stop_reason == "tool_use" and all(block.type == "tool_use" for block in message.content)
    assert all(block.input["city"] in ("Bonn", "Paris") for block in message.content)


def test_leaving_a_stream_frees_what_it_held(client: anthropic.Anthropic, site: Any, engine: Any) -> None:
    with ask(client, stream=True, max_tokens=900) as stream:
        next(iter(stream))
        site.until(lambda: engine.status().running == 1)
    site.until(lambda: engine.status().running == 0)
