"""One OpenAI-compatible server, as a benchmark sees it."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx

from plait.bench.options import Endpoint
from plait.bench.sse import EventParser
from plait.errors import BadSetup

_CONNECT_TIMEOUT_S = 10.0
# For calls that generate nothing; a server that is loading a model still answers these.
_SMALL_CALL_TIMEOUT_S = 60.0
# Reasoning and tool calls are output too; servers name the first in two ways.
_OUTPUT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """What came of one request, as the client saw it.

    `start_s` counts from the start of the run; `ttft_s` and `latency_s` (to the last token) from `start_s`;
    `itls_s` are the gaps between chunks that carried text. `queue_s` is how long `max_concurrency` held the
    request back before. `error` is empty for a request that succeeded. Without `usage`, the server did not
    count output tokens and `output_tokens` is the number of chunks.
    """

    start_s: float
    queue_s: float
    prompt_tokens: int
    output_tokens: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itls_s: tuple[float, ...] = ()
    usage: bool = True
    error: str = ""

    @property
    def succeeded(self) -> bool:
        return not self.error


@dataclass(slots=True)
class _Stream:
    """What has been read of one answer; times are those of `time.perf_counter`."""

    text_s: list[float] = field(default_factory=list[float])
    last_choice_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finished: bool = False
    error: str = ""

    def read(self, event: str, now_s: float) -> None:
        if event == "[DONE]":
            self.finished = True
            return
        try:
            chunk = _object(json.loads(event))
        except ValueError:
            self.error = f"the stream holds something that is not JSON: {event[:200]!r}"
            return
        if chunk.get("error"):
            self.error = _error_message(chunk)
        for choice in chunk.get("choices") or ():
            self.last_choice_s = now_s
            choice = _object(choice)
            delta = _object(choice.get("delta"))
            if choice.get("text") or any(delta.get(piece) for piece in _OUTPUT_FIELDS):
                self.text_s.append(now_s)
            if choice.get("finish_reason"):
                self.finished = True
        usage = _object(chunk.get("usage"))
        if usage:
            self.prompt_tokens = usage.get("prompt_tokens")
            self.output_tokens = usage.get("completion_tokens")


class OpenAiServer:
    """Calls a server; enter it to open connections."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        headers = {"accept-encoding": "identity"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            timeout=httpx.Timeout(_SMALL_CALL_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            # A proxy from the environment must not stand between a client and a server of the same machine.
            trust_env=urlsplit(base_url).hostname not in _LOOPBACK,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def model(self, wanted: str | None) -> tuple[str, int | None]:
        """The model to ask (the first listed if none is `wanted`) and its context in tokens, if told.

        Raises:
            BadSetup: no answer, an error, or no model.
        """
        try:
            response = await self._client.get(f"{self.base_url}/v1/models")
        except httpx.HTTPError as error:
            raise BadSetup(
                f"no answer from {self.base_url} ({_reason(error)}); is the server running?"
            ) from error
        if response.status_code != 200:
            raise BadSetup(
                f"{self.base_url}/v1/models answered {response.status_code}: {_body_error(response)}"
            )
        listed: list[dict[str, Any]] = _json_object(response).get("data") or []
        for model in listed:
            if wanted is None or model.get("id") == wanted:
                return str(model.get("id")), model.get("max_model_len")
        if wanted is None:
            raise BadSetup(f"{self.base_url} lists no model; name one with --model")
        return wanted, None

    async def count_tokens(self, text: str, model: str, endpoint: Endpoint) -> int | None:
        """Tokens of a prompt as the server counts them (chat template included); None if it does not."""
        prompt = {"messages": _messages(text)} if endpoint == "chat" else {"prompt": text}
        try:
            response = await self._client.post(f"{self.base_url}/tokenize", json={"model": model, **prompt})
        except httpx.HTTPError:
            return None
        count = _json_object(response).get("count") if response.status_code == 200 else None
        return count if isinstance(count, int) else None

    async def stream(
        self,
        payload: dict[str, Any],
        endpoint: Endpoint,
        *,
        prompt_tokens: int,
        timeout_s: float,
        began_s: float,
        queue_s: float,
    ) -> RequestOutcome:
        """Send one request and read its stream to the end; failures become the outcome's `error`.

        `prompt_tokens` stands in where the server reports no usage. `began_s` is the start of the run, by
        `time.perf_counter`.
        """
        path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
        start_s = time.perf_counter()
        stream = _Stream()
        try:
            async with asyncio.timeout(timeout_s):
                await self._read_stream(path, payload, stream)
        except TimeoutError:
            stream.error = f"no complete answer within {timeout_s:g} s"
        except httpx.HTTPError as error:
            stream.error = f"the connection failed: {_reason(error)}"
        if not stream.error and not stream.finished:
            stream.error = "the stream broke off before the answer ended"
        end_s = stream.last_choice_s or start_s
        times_s = stream.text_s or [end_s]
        return RequestOutcome(
            start_s=start_s - began_s,
            queue_s=queue_s,
            prompt_tokens=prompt_tokens if stream.prompt_tokens is None else stream.prompt_tokens,
            output_tokens=len(stream.text_s) if stream.output_tokens is None else stream.output_tokens,
            ttft_s=times_s[0] - start_s,
            latency_s=end_s - start_s,
            itls_s=tuple(later - earlier for earlier, later in pairwise(times_s)),
            usage=stream.output_tokens is not None,
            error=stream.error,
        )

    async def _read_stream(self, path: str, payload: dict[str, Any], stream: _Stream) -> None:
        request = self._client.stream(
            "POST",
            self.base_url + path,
            json=payload,
            # The caller's deadline bounds the whole answer; a silent prefill is no error.
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        )
        async with request as response:
            if response.status_code != 200:
                await response.aread()
                stream.error = f"HTTP {response.status_code}: {_body_error(response)}"
                return
            parser = EventParser()
            async for received in response.aiter_raw():
                now_s = time.perf_counter()
                for event in parser.feed(received):
                    stream.read(event, now_s)


def generation_payload(
    prompt: str, output_tokens: int, *, model: str, endpoint: Endpoint, temperature: float, ignore_eos: bool
) -> dict[str, Any]:
    """The body of one request."""
    return {
        "model": model,
        **({"messages": _messages(prompt)} if endpoint == "chat" else {"prompt": prompt}),
        "max_tokens": output_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if ignore_eos else {}),
    }


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        return _object(response.json())
    except ValueError:
        return {}


def _object(value: object) -> dict[str, Any]:
    """A JSON object as it is, anything else as an empty one: other people's servers send what they like."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _body_error(response: httpx.Response) -> str:
    return _error_message(_json_object(response)) or response.text[:200] or response.reason_phrase


def _error_message(body: dict[str, Any]) -> str:
    """The message of an OpenAI error envelope; some servers send bare text, or `detail` as FastAPI does."""
    error = body.get("error") or body.get("detail")
    return str(_object(error).get("message") or error or "")


def _reason(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
