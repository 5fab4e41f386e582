"""Every refusal has its status, its envelope and the client library's own exception."""

import json
import socket

import httpx
import openai
import pytest

from plait.gateway import GatewayOptions

ASK = [{"role": "user", "content": "Hello"}]


def test_an_unknown_model_is_not_found(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "'tiny'" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_context_that_is_too_long_is_refused_with_the_numbers(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
    assert "1024" in caught.value.message
    assert "5000" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[5] * 1024)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "Hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
        ),
        (
            {
                "messages": [
                    *ASK,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
                ]
            },
            "messages.1.tool_calls.0.function.arguments",
        ),
        (
            {
                "messages": [
                    *ASK,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999}}],
                    },
                ]
            },
            "messages.1.tool_calls.0.function.arguments",
        ),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        # No tensor could hold it: unchecked, it ended every request of the step.
        ({"stop_token_ids": [10**30], "min_tokens": 2}, "stop_token_ids"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**70}, "seed"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "structured_outputs"),
        ({"guided_choice": []}, "structured_outputs.choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
        ({"stream": "yes"}, "stream"),
        ({"model": 5}, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_refused_by_its_field(
    http: httpx.Client, fields: dict[str, object], param: str, stream: bool
):
    body = {"messages": ASK, "max_tokens": 4, **({"stream": True} if stream else {}), **fields}
    if stream and "stream_options" in fields:
        body["stream"] = False
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("kind", ["guided_json", "guided_regex", "guided_grammar"])
def test_a_constraint_that_cannot_be_compiled_is_the_callers_fault(http: httpx.Client, kind: str):
    wrong = {"guided_json": {"type": "nonsense"}, "guided_regex": "(", "guided_grammar": "start: ("}[kind]
    answer = http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 4, kind: wrong})
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"metadata": ' + b"[" * 100 + b"]" * 100 + b"}",
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[]",
        b"null",
        b'"text"',
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(http: httpx.Client, body: bytes):
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/responses"):
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
)
def test_a_body_of_another_content_type_is_refused(http: httpx.Client, content_type: str):
    headers = {"content-type": content_type} if content_type else {}
    answer = http.post("/v1/chat/completions", content=b'{"messages": []}', headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_charset_in_the_content_type_does_no_harm(http: httpx.Client):
    answer = http.post(
        "/tokenize", content=b'{"prompt": "a"}', headers={"content-type": "application/json; charset=utf-8"}
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/%00", 404),
    ],
)
def test_unknown_paths_and_methods_have_the_envelope_too(
    http: httpx.Client, method: str, path: str, status: int
):
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_errors_below_messages_have_anthropics_envelope(http: httpx.Client):
    for method, path in (("POST", "/v1/messages"), ("GET", "/v1/messages"), ("POST", "/v1/messages/nothing")):
        body = http.request(method, path, json={} if method == "POST" else None).json()
        assert body["type"] == "error"
        assert set(body["error"]) >= {"type", "message"}


def test_a_full_queue_is_429_with_retry_after_and_empties_when_clients_leave(site, narrow_engine):
    origin = site.serve(narrow_engine)
    body = {"model": "tiny", "messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with openai.OpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0) as client:
        long = {"model": "tiny", "messages": ASK, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        running = client.chat.completions.create(**long, stream=True)
        next(running)
        with socket.create_connection(("127.0.0.1", int(origin.rpartition(":")[2]))) as waiting:
            content = json.dumps(body).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
            waiting.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
            site.until(lambda: narrow_engine.status().waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**long)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(**long, stream=True)
        site.until(lambda: narrow_engine.status().waiting == 0)
        running.close()
        site.until(lambda: narrow_engine.status().running == 0)
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=2)


def test_more_open_requests_than_allowed_are_429(site, narrow_engine):
    origin = site.serve(narrow_engine, GatewayOptions(max_open_requests=0))
    answer = httpx.post(f"{origin}/v1/chat/completions", json={"messages": ASK})
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_route_is_refused_where_there_is_no_swarm(http: httpx.Client, path: str):
    body = {"messages": ASK, "prompt": "Hello", "route": {"mode": "latency"}, "max_tokens": 1}
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "route"
    assert "--swarm" in answer.json()["error"]["message"]
    misspelt = http.post(path, json=body | {"route": {"mode": 3}})
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, "route.mode")


def test_swarm_paths_say_that_there_is_no_swarm(http: httpx.Client):
    for answer in (http.get("/swarm/status"), http.post("/swarm/leave", json={"peer": "x"})):
        assert answer.status_code == 404
        assert "not part of a swarm" in answer.json()["error"]["message"]
