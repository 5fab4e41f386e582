"""Chat completions, as the official client sees them."""

import asyncio
import json

import httpx
import openai
import pytest

ASK = [{"role": "user", "content": "Tell me about a small bird."}]


def test_a_streamed_answer_is_the_whole_answer_in_parts(client: openai.OpenAI):
    whole = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == (
        whole.choices[0].finish_reason
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 24
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_second_time_a_long_prompt_is_cached(client: openai.OpenAI):
    messages = [{"role": "user", "content": "The same long question, word for word. " * 10}]
    cached: list[int] = []
    for _ in range(2):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert cached[0] == 0 < cached[1] < answer.usage.prompt_tokens


def test_the_same_seed_gives_the_same_answer_under_either_name(client: openai.OpenAI):
    answers = [
        client.chat.completions.create(model=name, messages=ASK, max_tokens=12, temperature=1.5, seed=7)
        for name in ("tiny", "alias", "tiny")
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.system_fingerprint for answer in answers}) == 1
    assert {answer.model for answer in answers} == {"tiny"}


def test_n_answers_are_separate_choices_streamed_or_not(client: openai.OpenAI):
    whole = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=8, n=3, temperature=1.5, seed=3
    )
    texts = {choice.index: choice.message.content for choice in whole.choices}
    streamed = {0: "", 1: "", 2: ""}
    ended: set[int] = set()
    for chunk in client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=8, n=3, temperature=1.5, seed=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            ended.add(chunk.choices[0].index)
    assert streamed == texts
    assert ended == {0, 1, 2}
    assert len(set(texts.values())) == 3


def test_log_probabilities_carry_bytes_and_alternatives(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    spelled = b"".join(bytes(token.bytes or []) for token in tokens)
    assert spelled.decode("utf-8", "ignore").startswith(answer.choices[0].message.content or "x")
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.token == bytes(token.bytes or []).decode("utf-8", "replace")


def test_streamed_log_probabilities_equal_the_whole_ones(client: openai.OpenAI):
    def tokens_of(logprobs) -> list[tuple[str, float]]:
        return [(token.token, token.logprob) for token in (logprobs.content if logprobs else None) or []]

    fields = {"model": "tiny", "messages": ASK, "max_tokens": 8, "temperature": 0, "logprobs": True}
    whole = tokens_of(client.chat.completions.create(**fields).choices[0].logprobs)
    streamed = [
        token
        for chunk in client.chat.completions.create(**fields, stream=True)
        for token in tokens_of(chunk.choices[0].logprobs)
    ]
    assert [token for token, _ in streamed] == [token for token, _ in whole]
    assert [logprob for _, logprob in streamed] == pytest.approx([logprob for _, logprob in whole], abs=1e-4)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI):
    free = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30, temperature=0)
    text = free.choices[0].message.content or ""
    stop = text[8:11]
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, temperature=0, stop=[stop]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == text[: text.index(stop)]


def test_a_json_schema_is_obeyed(client: openai.OpenAI):
    schema = {
        "type": "object",
        "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "red": {"type": "boolean"}},
        "required": ["size", "red"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "bird", "schema": schema}},
        seed=1,
    )
    assert answer.choices[0].finish_reason == "stop"
    bird = json.loads(answer.choices[0].message.content or "")
    assert set(bird) == {"size", "red"}
    assert 0 <= bird["size"] <= 99


@pytest.mark.parametrize(
    "extra",
    [
        {"structured_outputs": {"choice": ["yes", 'no "quotes"']}},
        {"guided_choice": ["yes", 'no "quotes"']},
        {"structured_outputs": {"regex": 'yes|no "quotes"'}},
        {"guided_grammar": 'start: "yes" | "no \\"quotes\\""'},
    ],
)
def test_an_answer_can_be_held_to_a_choice(client: openai.OpenAI, extra: dict[str, object]):
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=40, extra_body=extra, seed=2
    )
    assert answer.choices[0].message.content in ("yes", 'no "quotes"')


def test_fields_of_vllm_and_of_newer_clients_are_accepted(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "A bird?"}], "name": "ann"},
        ],
        max_completion_tokens=4,
        metadata={"a": "b"},
        store=False,
        user="ann",
        service_tier="auto",
        reasoning_effort="low",
        logit_bias={"5": -100},
        presence_penalty=0.5,
        frequency_penalty=0.5,
        parallel_tool_calls=False,
        extra_body={
            "top_k": -1,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [3],
            "priority": 1,
            "cache_salt": "team",
            "chat_template_kwargs": {"enable_thinking": False},
            "return_token_ids": True,
            "prompt_logprobs": 1,
            "a_field_of_the_future": {"x": 1},
        },
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 2
    extra = answer.model_dump()
    assert len(extra["choices"][0]["token_ids"]) == answer.usage.completion_tokens
    assert len(extra["prompt_token_ids"]) == len(extra["prompt_logprobs"]) == answer.usage.prompt_tokens
    assert extra["prompt_logprobs"][0] is None


def test_an_answer_can_continue_the_last_message(http: httpx.Client):
    messages = [*ASK, {"role": "assistant", "content": "Once there was a"}]
    body = {"messages": messages, "max_tokens": 2, "return_token_ids": True, "continue_final_message": True}
    continued = http.post("/v1/chat/completions", json=body).json()
    tokens = http.post("/detokenize", json={"tokens": continued["prompt_token_ids"]}).json()["prompt"]
    assert tokens.endswith("Once there was a")


def test_beams_and_best_of_answer_whole(client: openai.OpenAI):
    beams = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=6, n=2, extra_body={"use_beam_search": True}
    )
    assert [choice.index for choice in beams.choices] == [0, 1]
    best = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=6, temperature=1.2, seed=4, extra_body={"best_of": 3}
    )
    assert len(best.choices) == 1


def test_many_clients_are_answered_side_by_side(origin: str):
    async def ask_all() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0) as client:

            async def ask() -> str:
                text = ""
                async for chunk in await client.chat.completions.create(
                    model="tiny", messages=ASK, max_tokens=12, temperature=0, stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return set(await asyncio.gather(*(ask() for _ in range(8))))

    assert len(asyncio.run(ask_all())) == 1


def test_reply_of_a_tool_goes_into_the_prompt(http: httpx.Client):
    messages = [
        {"role": "user", "content": "What is the weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"at": "sea"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "windy and grey"},
    ]
    body = {"messages": messages, "max_tokens": 2, "return_token_ids": True}
    tokens = http.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]
    prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert "windy and grey" in prompt
    assert '{"at": "sea"}' in prompt
