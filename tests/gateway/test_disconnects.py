"""A client that goes away frees everything it held, whatever it was waiting for."""

import asyncio
import json

import httpx
import openai
import pytest

ASK = [{"role": "user", "content": "Tell me a long story."}]
LONG = {"messages": ASK, "max_tokens": 900, "ignore_eos": True}
PROMPTS = {"prompt": ["One", "Two", "Three"], "max_tokens": 900, "ignore_eos": True}


@pytest.fixture
def quiet(site, engine):
    """Nothing is running before, and nothing may be left afterwards."""

    def nothing_left() -> bool:
        status = engine.status()
        return (status.running, status.waiting, status.kv_blocks_used) == (0, 0, 0)

    site.until(nothing_left)
    yield lambda: site.until(nothing_left, timeout_s=5)
    site.until(nothing_left)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", LONG),
        ("/v1/chat/completions", {**LONG, "stream": True}),
        ("/v1/chat/completions", {**LONG, "n": 3, "stream": True}),
        ("/v1/completions", PROMPTS),
        ("/v1/completions", {**PROMPTS, "stream": True}),
        ("/v1/messages", {"model": "tiny", "messages": ASK, "max_tokens": 900, "stream": True}),
        ("/v1/responses", {"model": "tiny", "input": "A long story.", "max_output_tokens": 900}),
    ],
)
def test_closing_the_connection_aborts_the_request(site, engine, origin: str, quiet, path: str, body: dict):
    before = engine.status().generated_tokens_total

    async def ask_and_leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(origin.rpartition(":")[2]))
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content)
        async with asyncio.timeout(10):
            while engine.status().generated_tokens_total == before:
                await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()

    site.run(ask_and_leave())
    quiet()


def test_closing_the_clients_stream_aborts_the_request(client: openai.OpenAI, quiet):
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    quiet()


def test_cancelling_an_async_call_aborts_the_request(site, engine, origin: str, quiet):
    async def cancel_midway() -> None:
        async with openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key="none", max_retries=0) as client:
            call = asyncio.create_task(
                client.chat.completions.create(
                    model="tiny", messages=ASK, max_tokens=900, extra_body={"ignore_eos": True}
                )
            )
            while not engine.status().running:
                await asyncio.sleep(0.001)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    site.run(cancel_midway())
    quiet()


def test_a_timeout_of_the_client_aborts_the_request(origin: str, quiet):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{origin}/v1/chat/completions", json=LONG, timeout=0.1)
    quiet()


def test_a_stream_that_is_read_slowly_arrives_whole(client: openai.OpenAI, quiet):
    fields = {"model": "tiny", "messages": ASK, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    stream = client.chat.completions.create(**fields, stream=True)
    first = next(stream)
    quiet()
    text = (first.choices[0].delta.content or "") + "".join(
        chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices
    )
    assert text == whole
