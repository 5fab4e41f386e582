"""Keys, limits, request ids and the access log."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from plait.gateway import GatewayOptions, hash_api_key, new_api_key

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
KEY = new_api_key()
OTHER_KEY = new_api_key()


@pytest.fixture(scope="module")
def guarded(site, engine) -> str:
    """A server that knows two keys."""
    hashes = (hash_api_key(KEY), hash_api_key(OTHER_KEY))
    return site.serve(engine, GatewayOptions(api_key_hashes=hashes, cors_origins=("https://page.example",)))


@pytest.fixture(scope="module")
def tight(site, engine) -> Iterator[httpx.Client]:
    """A server with small limits."""
    options = GatewayOptions(
        max_body_bytes=1000,
        max_headers=20,
        max_header_bytes=2000,
        max_json_depth=6,
        max_prompts=2,
        body_s=0.2,
    )
    with httpx.Client(base_url=site.serve(engine, options)) as http:
        yield http


def test_a_key_is_stored_as_a_hash_that_does_not_show_it():
    assert KEY not in hash_api_key(KEY)
    assert hash_api_key(KEY) == hash_api_key(KEY) != hash_api_key(OTHER_KEY)
    assert len(KEY) > 40


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz"])
def test_health_needs_no_key(guarded: str, path: str):
    assert httpx.get(guarded + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/metrics"),
        ("GET", "/status"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nothing"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/health/../v1/models"),
    ],
)
@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}]
)
def test_everything_else_needs_one(guarded: str, method: str, path: str, headers: dict[str, str]):
    answer = httpx.request(method, guarded + path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.text


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_either_header_opens_the_door(guarded: str, key: str):
    for headers in (
        {"authorization": f"Bearer {key}"},
        {"authorization": f"bearer  {key}"},
        {"x-api-key": key},
    ):
        assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200


def test_a_wrong_key_is_the_clients_authentication_error(guarded: str):
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key="sk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "alias"]


def test_messages_say_unauthorized_in_anthropics_words(guarded: str):
    answer = httpx.post(f"{guarded}/v1/messages", json={})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["type"] == "error"


def test_a_page_elsewhere_may_ask_only_if_its_origin_is_allowed(guarded: str):
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://page.example", True), ("https://evil.example", False)):
        answer = httpx.options(f"{guarded}/v1/chat/completions", headers={"origin": origin, **ask})
        assert ("access-control-allow-origin" in answer.headers) == allowed


def test_a_name_that_is_not_this_machines_is_refused_where_no_key_guards(site, engine):
    """DNS rebinding: a page of evil.example points its name at 127.0.0.1 and asks within its own origin."""
    keyless = site.serve(engine, GatewayOptions(local_names_only=True))
    for host, status in {
        "evil.example:8000": 403,
        "localhost.evil.example": 403,
        "127.0.0.1.evil.example": 403,
        "[::1": 200,
        "[::1]:8000": 200,
        "127.0.0.1:8000": 200,
        "192.168.1.7": 200,
        "LocalHost:8000": 200,
        "plait.localhost": 200,
        "host.docker.internal:8000": 200,
        "": 200,
    }.items():
        answer = httpx.get(f"{keyless}/v1/models", headers={"host": host})
        assert answer.status_code == status, host
    refused = httpx.post(f"{keyless}/v1/messages", headers={"host": "evil.example"}, json=ASK)
    assert refused.json()["error"]["type"] == "permission_error"


def test_a_request_id_is_echoed_or_made(http: httpx.Client):
    assert http.get("/health", headers={"x-request-id": "run-1:a/b"}).headers["x-request-id"] == "run-1:a/b"
    for unsafe in ("a b", "x" * 129, 'quote"', ""):
        made = http.get("/health", headers={"x-request-id": unsafe}).headers["x-request-id"]
        assert made != unsafe
        assert len(made) == 32
    assert http.get("/nothing").headers["x-request-id"]


def test_a_declared_body_that_is_too_large_is_413(tight: httpx.Client):
    answer = tight.post("/v1/chat/completions", json={**ASK, "user": "x" * 2000})
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["error"]["message"]


def test_a_chunked_body_that_grows_too_large_is_413(tight: httpx.Client):
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    answer = tight.post("/v1/chat/completions", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_does_not_arrive_is_408(site, tight: httpx.Client):
    async def never_ending() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", tight.base_url.port)
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: 9\r\n\r\n{")
        status = int((await reader.readline()).split()[1])
        body = await reader.read(4096)
        writer.close()
        return status, body

    status, body = site.run(never_ending())
    assert status == 408
    assert b"invalid_request_error" in body


def test_too_many_or_too_large_headers_are_431(tight: httpx.Client):
    many = tight.get("/health", headers={f"x-{index}": "1" for index in range(30)})
    large = tight.get("/health", headers={"x-large": "1" * 3000})
    assert many.status_code == large.status_code == 431
    assert many.json()["error"]["type"] == "invalid_request_error"


def test_depth_and_prompts_are_bounded(tight: httpx.Client):
    deep = tight.post("/v1/chat/completions", json={**ASK, "metadata": [[[[[[[1]]]]]]]})
    assert deep.status_code == 400
    assert "6 levels" in deep.json()["error"]["message"]
    many = tight.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 1})
    assert many.json()["error"]["param"] == "prompt"


def test_one_line_is_logged_for_a_request_without_its_content_or_key(
    site: Any, guarded: str, caplog: pytest.LogCaptureFixture
):
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "plait.access"]

    with caplog.at_level(logging.INFO, logger="plait.access"):
        headers = {"authorization": f"Bearer {KEY}", "x-request-id": "run-7"}
        body = {"messages": [{"role": "user", "content": "my secret bird"}], "max_tokens": 2}
        id = httpx.post(f"{guarded}/v1/chat/completions?key={KEY}", json=body, headers=headers).json()["id"]
        httpx.get(guarded + "/a%0Aforged=line%20", headers=headers)
        site.until(lambda: len(lines()) == 2)  # a line is written after its answer was sent
    chat, forged = lines()
    assert "method=POST path=/v1/chat/completions status=200" in chat
    assert f"request_id=run-7 response_id={id} outcome=ok" in chat
    assert "status=404" in forged
    assert "\n" not in forged
    assert "secret" not in chat
    assert KEY not in json.dumps([record.getMessage() for record in caplog.records])
