"""The terminal's client against servers that are not there, not ours, or broken."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stand_in_hub import StandInHub

from plait.client import Message, ServerClient
from plait.errors import BadRequest, BadSetup, EngineFailure, NoCapacity, NotFound, ServingError, Unauthorized


@contextmanager
def server_that_answers(status: str, body: str, *headers: str) -> Iterator[str]:
    """A server that reads one request and says this, byte for byte."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall("\r\n".join((*lines, "", body)).encode())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        thread.join()


def ask(url: str) -> list[str]:
    with ServerClient(url) as client:
        return [chunk.text for chunk in client.chat([Message("user", "Hello")], model="m")]


def stream(*events: str) -> str:
    return "".join(f"data: {event}\n\n" for event in events)


def piece(text: str) -> str:
    return '{"choices": [{"index": 0, "delta": {"content": "' + text + '"}, "finish_reason": null}]}'


def test_an_answer_comes_in_pieces_and_comments_are_skipped() -> None:
    body = ": ping\n\n" + stream(
        piece("a"), piece("b"), '{"choices": [], "usage": {"completion_tokens": 2}}', "[DONE]"
    )
    with server_that_answers("200 OK", body, "Content-Type: text/event-stream") as url:
        assert ask(url) == ["a", "b", ""]


def test_an_error_in_the_middle_is_raised_after_what_came_before() -> None:
    body = stream(piece("a"), '{"error": {"message": "it broke", "type": "server_error"}}')
    with server_that_answers("200 OK", body) as url, ServerClient(url) as client:
        chunks = client.chat([Message("user", "Hello")], model="m")
        assert next(chunks).text == "a"
        with pytest.raises(EngineFailure, match="it broke"):
            next(chunks)


def test_a_stream_that_stops_without_saying_so_is_an_error() -> None:
    with (
        server_that_answers("200 OK", stream(piece("a"))) as url,
        pytest.raises(EngineFailure, match="broke off"),
    ):
        ask(url)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("400 Bad Request", BadRequest),
        ("401 Unauthorized", Unauthorized),
        ("404 Not Found", NotFound),
        ("429 Too Many Requests", NoCapacity),
        ("500 Internal Server Error", EngineFailure),
        ("503 Service Unavailable", NoCapacity),
    ],
)
def test_a_refusal_is_the_error_that_the_server_meant(status: str, kind: type[ServingError]) -> None:
    body = '{"error": {"message": "because", "type": "t", "param": null, "code": null}}'
    with (
        server_that_answers(status, body, "Retry-After: 7") as url,
        pytest.raises(kind, match="because") as caught,
    ):
        ask(url)
    if isinstance(caught.value, NoCapacity):
        assert caught.value.retry_after_s == 7


def test_a_page_that_is_no_error_envelope_is_quoted() -> None:
    with (
        server_that_answers("502 Bad Gateway", "<h1>proxy</h1>") as url,
        pytest.raises(EngineFailure, match="proxy"),
    ):
        ask(url)


def test_a_server_of_another_kind_is_recognised(hub: StandInHub) -> None:
    said = "not an OpenAI-compatible"
    with server_that_answers("200 OK", "<html>") as url, pytest.raises(BadSetup, match=said):
        ServerClient(url).models()
    with pytest.raises(NotFound):
        ServerClient(hub.url + "/v1").models()


def test_health_tells_loading_from_ready() -> None:
    body = '{"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}'
    with server_that_answers("503 Service Unavailable", body) as url, ServerClient(url) as client:
        health = client.health()
    assert (health.ready, health.message) == (False, "Loading model")


def test_nobody_there_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with pytest.raises(BadSetup, match=r"nothing answers at .*plait serve"):
        ask(url)
