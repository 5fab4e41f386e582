"""Completions, as the official client sees them."""

import httpx
import openai
import pytest

TEXT = "Once upon a time"


def test_text_and_its_token_ids_continue_alike(client: openai.OpenAI, http: httpx.Client):
    tokens = http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
    of_text = client.completions.create(model="tiny", prompt=TEXT, max_tokens=10, temperature=0)
    of_tokens = client.completions.create(model="tiny", prompt=tokens, max_tokens=10, temperature=0)
    assert of_text.choices[0].text == of_tokens.choices[0].text
    assert of_text.usage is not None
    assert of_text.usage.prompt_tokens == len(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_are_numbered_through(client: openai.OpenAI, stream: bool):
    prompts = [TEXT, "The little dog", "In the morning"]
    alone = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in prompts
    ]
    texts = dict.fromkeys(range(6), "")
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=6, temperature=0, stream=stream
    )
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert [texts[index] for index in range(6)] == [text for text in alone for _ in range(2)]


def test_a_stream_ends_with_usage_if_asked(client: openai.OpenAI):
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=[TEXT, TEXT],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert chunks[-1].choices == []


def test_echo_puts_prompt_and_its_log_probabilities_first(client: openai.OpenAI):
    answer = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=4, temperature=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert choice.text.startswith(TEXT)
    tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
    assert "".join(tokens).startswith(TEXT)
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    for token, offset in zip(tokens, offsets, strict=True):
        if "�" not in token and offset < len(choice.text):
            assert choice.text.startswith(token, offset)


def test_echo_alone_scores_a_prompt_without_continuing_it(client: openai.OpenAI):
    answer = client.completions.create(model="tiny", prompt=TEXT, max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == TEXT
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == TEXT
    assert logprobs.top_logprobs is None


def test_echo_is_streamed_once_and_first(client: openai.OpenAI):
    whole = client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, temperature=0, echo=True)
    parts = list(
        client.completions.create(
            model="tiny", prompt=TEXT, max_tokens=5, temperature=0, echo=True, stream=True
        )
    )
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_legacy_log_probabilities_are_streamed_with_running_offsets(client: openai.OpenAI):
    fields = {"model": "tiny", "prompt": TEXT, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**fields).choices[0].logprobs
    parts = [part.choices[0].logprobs for part in client.completions.create(**fields, stream=True)]
    assert whole is not None
    assert [token for part in parts if part for token in part.tokens or []] == whole.tokens
    assert [offset for part in parts if part for offset in part.text_offset or []] == whole.text_offset


def test_the_best_of_several_is_returned(client: openai.OpenAI):
    answer = client.completions.create(
        model="tiny", prompt=TEXT, n=2, best_of=4, max_tokens=5, temperature=1.3, seed=9, logprobs=0
    )

    def score(logprobs) -> float:
        return sum(logprobs.token_logprobs) / len(logprobs.token_logprobs)

    scores = [score(choice.logprobs) for choice in answer.choices]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": TEXT, "suffix": "the end"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [["a"]]}, "prompt.0.0"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": TEXT, "max_tokens": 0}, "max_tokens"),
        ({"prompt": TEXT, "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": TEXT, "n": 10_000}, "n"),
        ({"prompt": [TEXT] * 300}, "prompt"),
        ({"prompt": TEXT, "logit_bias": {"bird": 1}}, "logit_bias.bird"),
        ({"prompt": TEXT, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({}, "prompt"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(http: httpx.Client, fields: dict[str, object], param: str):
    answer = http.post("/v1/completions", json={"model": "tiny", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
