"""`/v1/responses`, asked by OpenAI's own client."""

import json
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from plait.errors import NotFound
from plait.gateway.responses import ResponseStore, StoredResponse
from plait.gateway.responses.answer import Answer
from plait.gateway.turn import ChoiceEnd, TextDelta, ToolCallArguments, ToolCallStart, TurnEnd, TurnEvent
from plait.session import PositionLogprobs, TokenLogprob

SOME_LOGPROB = PositionLogprobs(TokenLogprob(1, -0.5), ())

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Paris"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
DAYS: Any = {
    "type": "function",
    "name": "wait",
    "parameters": {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]},
    "strict": None,
}
CLOCK: Any = {"type": "function", "name": "clock", "parameters": None, "strict": None}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        **{"model": "tiny", "input": "Tell me a story.", "temperature": 0, "max_output_tokens": 6, **fields}
    )


def call_of(response: Any) -> dict[str, Any]:
    (item,) = response.output
    assert item.type == "function_call" and item.name == "get_weather" and item.status == "completed"
    arguments = json.loads(item.arguments)
    assert arguments["city"] in ("Bonn", "Paris") and arguments["days"] in (1, 2, 3)
    return arguments


# -- whole and streamed ------------------------------------------------------------------------------------


def test_an_answer_has_text_usage_and_what_was_asked(client: openai.OpenAI) -> None:
    response = ask(client, instructions="Be brief.", metadata={"team": "a"}, top_p=0.9)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text and response.output[0].status == "incomplete"
    assert response.usage.output_tokens == 6
    assert response.usage.total_tokens == response.usage.input_tokens + 6
    assert response.instructions == "Be brief." and response.metadata == {"team": "a"}
    assert response.top_p == 0.9 and response.model == "tiny" and response.error is None


def test_a_stream_tells_every_step_in_order(client: openai.OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.model_dump(), strict=False)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text
    assert deltas > 1 and events[-1].response.usage.output_tokens == 6
    assert len({event.item_id for event in events[3:-2]}) == 1


def test_the_stream_helper_ends_with_the_whole_response(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="tiny",
        input="hi",
        temperature=0,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert final.status == "completed" and call_of(final) == final.output[0].parsed_arguments


def test_log_probabilities_come_with_the_text_when_included(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    part = ask(client, include=include, top_logprobs=2).output[0].content[0]
    assert len(part.logprobs) == 6 and all(len(token.top_logprobs) == 2 for token in part.logprobs)
    events = list(ask(client, include=include, top_logprobs=2, stream=True))
    streamed = [token for event in events if event.type.endswith("text.delta") for token in event.logprobs]
    assert [token.logprob for token in streamed] == [token.logprob for token in part.logprobs]


def test_text_and_calls_are_items_that_open_and_close_one_after_the_other() -> None:
    answer = Answer({"id": "resp_1", "output": []}, lambda positions: [{"logprob": 0.0} for _ in positions])
    turn: list[TurnEvent] = [
        TextDelta(0, "", (1,), (SOME_LOGPROB,)),
        TextDelta(0, "Let me", (2,), (SOME_LOGPROB,)),
        TextDelta(0, " see."),
        ToolCallStart(0, 0, "call_a", "f"),
        ToolCallArguments(0, 0, '{"x":'),
        ToolCallArguments(0, 0, " 1}"),
        ToolCallStart(0, 1, "call_b", "g"),
        TextDelta(0, "", (3,), (SOME_LOGPROB,)),
        TextDelta(0, "Done", (4,), (SOME_LOGPROB,)),
        ChoiceEnd(0, "tool_calls"),
        TurnEnd(prompt_tokens=5, cached_tokens=2, completion_tokens=9),
    ]
    events = [event for turn_event in turn for event in answer.on(turn_event)]
    open_item = -1
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == open_item + 1 and event["item"]["status"] == "in_progress"
            open_item = event["output_index"]
        elif event["type"] != "response.completed":
            assert event["output_index"] == open_item
    assert [item["type"] for item in answer.response["output"]] == [
        "message",
        "function_call",
        "function_call",
        "message",
    ]
    first, call, empty_call, last = answer.response["output"]
    assert first["content"][0]["text"] == "Let me see." and len(first["content"][0]["logprobs"]) == 2
    assert call["arguments"] == '{"x": 1}' and call["call_id"] == "call_a" and empty_call["arguments"] == ""
    assert last["content"][0]["text"] == "Done" and len(last["content"][0]["logprobs"]) == 2
    assert {item["status"] for item in answer.response["output"]} == {"completed"}
    assert answer.response["usage"]["input_tokens_details"]["cached_tokens"] == 2


# -- structured text ---------------------------------------------------------------------------------------


class Mood(BaseModel):
    mood: Literal["glad", "sad"]
    strength: Literal[1, 2, 3]


def test_parse_returns_an_instance_of_the_model(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="tiny", input="How are you?", text_format=Mood, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Mood)


def test_a_schema_binds_the_text(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    text = {"format": {"type": "json_schema", "name": "verdict", "schema": schema}}
    response = ask(client, text=text, max_output_tokens=40)
    assert json.loads(response.output_text).keys() == {"ok"}
    assert response.text.format.name == "verdict"


# -- tools -------------------------------------------------------------------------------------------------


def test_a_demanded_call_has_arguments_of_the_schema(client: openai.OpenAI) -> None:
    response = ask(
        client,
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=99,
    )
    call_of(response)
    assert response.status == "completed" and response.tools[0].name == "get_weather"


def test_argument_fragments_join_to_the_arguments(client: openai.OpenAI) -> None:
    named = {"type": "function", "name": "wait"}
    events = list(ask(client, tools=[DAYS, WEATHER], tool_choice=named, max_output_tokens=60, stream=True))
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    fragments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(fragments) > 1 and "".join(fragments) == done.arguments


def test_calls_and_their_results_go_back_as_items(client: openai.OpenAI) -> None:
    first = ask(
        client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_output_tokens=99
    )
    call = first.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = ask(
        client,
        input=[{"role": "user", "content": "Weather?"}, call.model_dump(exclude_none=True), result],
        tools=[WEATHER],
        tool_choice="none",
    )
    assert second.output[0].type == "message" and second.output_text


# -- conversations -----------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_a_stored_response(client: openai.OpenAI) -> None:
    first = ask(client, instructions="Rhyme.")
    follow_up = ask(client, input="And then?", previous_response_id=first.id)
    whole_input: Any = [
        {"role": "user", "content": "Tell me a story."},
        first.output[0].model_dump(exclude_none=True),
        {"role": "user", "content": [{"type": "input_text", "text": "And then?"}]},
    ]
    whole = ask(client, input=whole_input)
    assert follow_up.output_text == whole.output_text
    assert follow_up.usage.input_tokens == whole.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    response = ask(client, store=False)
    with pytest.raises(openai.NotFoundError, match="store"):
        ask(client, previous_response_id=response.id)


def stored(id: str, size_bytes: int = 1) -> StoredResponse:
    return StoredResponse(response={"id": id}, messages=(), size_bytes=size_bytes)


def test_the_store_forgets_the_oldest_beyond_its_number_and_size() -> None:
    store = ResponseStore(max_responses=2, max_bytes=10, ttl_s=60)
    for id in ("a", "b", "c"):
        store.put(stored(id), 0)
    with pytest.raises(NotFound, match="'a'"):
        store.get("a", 0)
    store.put(stored("d", 9), 0)
    assert store.get("c", 0) and store.get("d", 0)
    store.put(stored("e", 11), 0)
    for id in ("c", "d", "e"):
        with pytest.raises(NotFound):
            store.get(id, 0)


def test_the_store_forgets_after_its_time_and_on_demand() -> None:
    store = ResponseStore(ttl_s=60)
    store.put(stored("a"), 0)
    store.put(stored("b"), 30)
    assert store.get("a", 59.9)
    with pytest.raises(NotFound):
        store.get("a", 60)
    store.delete("b", 60)
    with pytest.raises(NotFound):
        store.delete("b", 60)


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            None,
            "input_image",
        ),
        ({"input": [{"type": "computer_call_output"}]}, "input.0", "computer_call_output"),
        ({"input": []}, "input", "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, None, "role"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "web_search"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"temperature": -1}, "temperature", "between"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"background": True}, "background", "not supported"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "schema"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            ask(client, stream=stream, **fields)
        assert param is None or refused.value.param == param


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-6'"):
        ask(client, model="gpt-6")


def test_a_stream_that_breaks_fails_the_response_and_raises(site: Any, tiny_options: Any) -> None:
    engine = site.engine(tiny_options)
    kinds: list[str] = []
    with (
        openai.OpenAI(base_url=f"{site.serve(engine)}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="stopping"),
    ):
        for event in ask(client, stream=True, max_output_tokens=900):
            kinds.append(event.type)
            if len(kinds) == 6:
                site.run(engine.__aexit__(None, None, None))
    assert kinds[-1] == "response.failed"


def test_leaving_a_stream_frees_what_it_held(client: openai.OpenAI, site: Any, engine: Any) -> None:
    with ask(client, stream=True, max_output_tokens=900) as stream:
        next(iter(stream))
        site.until(lambda: engine.status().running == 1)
    site.until(lambda: engine.status().running == 0)
