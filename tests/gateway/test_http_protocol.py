"""Clients that never come to an end with their request."""

import asyncio

import pytest

from plait.gateway import HttpProtocol


class Impatient(HttpProtocol):
    """The same with short waits."""

    head_s = 0.05
    refused_body_s = 0.05


async def _talk(port: int, *parts: bytes) -> bytes:
    """Send parts until the server closes; give what it answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


@pytest.fixture
def port(origin: str) -> int:
    return int(origin.rpartition(":")[2])


@pytest.fixture(scope="module")
def impatient_port(site, engine) -> int:
    return int(site.serve(engine, protocol=Impatient).rpartition(":")[2])


def test_headers_without_end_close_the_connection(site, port: int):
    endless = [b"GET /health HTTP/1.1\r\nhost: x\r\n"] + [b"x-more: " + b"1" * 1000 + b"\r\n"] * (
        2 * HttpProtocol.max_head_bytes // 1000
    )
    answer = site.run(_talk(port, *endless))
    assert answer == b"reset" or answer.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_arrive_closes_the_connection(site, impatient_port: int, begun: bytes):
    assert site.run(_talk(impatient_port, begun)).startswith(b"HTTP/1.1 408")


def test_the_rest_of_a_refused_body_is_thrown_away_only_for_a_while(site, impatient_port: int):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    answer = site.run(_talk(impatient_port, head + b"content-length: 999999999\r\n\r\n{"))
    assert answer == b"reset" or answer.startswith(b"HTTP/1.1 413")


def test_a_second_request_on_a_connection_is_answered(site, port: int):
    ask = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    answer = site.run(_talk(port, ask + b"\r\n", ask + b"connection: close\r\n\r\n"))
    assert answer.count(b"200 OK") == 2


def test_nonsense_is_refused(site, port: int):
    assert site.run(_talk(port, b"\x16\x03\x01 hello\r\n\r\n")).startswith(b"HTTP/1.1 400")
