"""An OpenAI-compatible server that is not plait: what the benchmark may rely on is what this one does."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

WORDS = ("the", " king", " of", " hearts", " made", " some", " tarts")


class OtherServer:
    """Streams `max_tokens` words; tests switch its manners and read what it saw.

    Some prompts are orders: "refuse" (an HTTP error), "fail" (an error in the stream), "leave" (the stream
    ends early) and "hang".
    """

    def __init__(self) -> None:
        self.base_url = ""
        self.reports_usage = True
        self.shows_tokenizer = False
        self.context_tokens: int | None = None
        self.api_key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.most_running = 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
                return _error(401, "no such key")
            model: dict[str, Any] = {"id": "other", "object": "model"}
            if self.context_tokens is not None:
                model["max_model_len"] = self.context_tokens
            return JSONResponse({"object": "list", "data": [model]})

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Response:
            if not self.shows_tokenizer:
                return JSONResponse({"detail": "Not Found"}, 404)
            return JSONResponse({"count": count_tokens(_prompt(await request.json()))})

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def generate(request: Request) -> Response:
            body = await request.json()
            prompt = _prompt(body)
            self.bodies.append(body)
            if body["model"] != "other":
                return _error(404, f"The model `{body['model']}` does not exist.")
            if prompt == "refuse":
                return _error(429, "too many requests")
            return StreamingResponse(self._stream(body, prompt), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any], prompt: str) -> AsyncIterator[bytes]:
        chat = "messages" in body
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield b": ping\n\n"
            if chat:
                yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for number in range(body["max_tokens"]):
                if prompt == "fail" and number == 1:
                    yield _event({"error": {"message": "out of memory", "type": "server_error"}})
                    return
                if prompt == "leave" and number == 1:
                    return
                if prompt == "hang":
                    await asyncio.Event().wait()
                word = WORDS[number % len(WORDS)]
                yield _event({"choices": [{"delta": {"content": word}} if chat else {"text": word}]})
                await asyncio.sleep(0)
            yield _event({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
            if self.reports_usage:
                usage = {"prompt_tokens": count_tokens(prompt), "completion_tokens": body["max_tokens"]}
                yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.running -= 1


def count_tokens(text: str) -> int:
    """A token for every four characters begun, of every word."""
    return sum((len(word) + 3) // 4 for word in text.split())


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app on a port of its own; connections wait in the socket's queue until it accepts them."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _prompt(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"] if "messages" in body else body["prompt"]


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)
