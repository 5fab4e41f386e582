"""What a terminal needs of an OpenAI-compatible server, over httpx."""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, Literal, Self, cast

import httpx

from plait.errors import BadRequest, BadSetup, EngineFailure, NoCapacity, NotFound, ServingError, Unauthorized

# A server may compute a long prompt before the first byte; it pings every 10 s or so while it does.
SILENCE_S = 120.0
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """A piece of an answer; `completion_tokens` comes with the last one, if the server counts."""

    text: str
    finish_reason: str | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the server can serve, and what it says about itself if it cannot."""

    ready: bool
    message: str


class ServerClient:
    """A connection to one server; `base_url` ends in `/v1`, as OPENAI_BASE_URL does.

    Raises (every method):
        BadSetup: nothing answers at `base_url`, or what answers is no such server.
        Unauthorized, NotFound, BadRequest, NoCapacity, EngineFailure: what the server answered.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.base_url = base_url.rstrip("/")
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def health(self) -> Health:
        """Ask whether the server can serve."""
        response = self._send("GET", self.base_url.removesuffix("/v1") + "/health")
        if response.status_code == HTTPStatus.OK:
            return Health(True, "ready")
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            return Health(False, _error_fields(response.content)[0])
        raise self._error(response.status_code, response.content, response.headers)

    def models(self) -> tuple[str, ...]:
        """The names of the models served, the default first."""
        response = self._send("GET", self.base_url + "/models")
        if response.status_code != HTTPStatus.OK:
            raise self._error(response.status_code, response.content, response.headers)
        try:
            return tuple(str(model["id"]) for model in response.json()["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._not_a_server() from error

    def get(self, path: str) -> Any:
        """The JSON that the server answers at a path of its own, beside `/v1`: `/swarm/status`."""
        return self._json("GET", path, None)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """The JSON that the server answers to a JSON body at a path of its own."""
        return self._json("POST", path, body)

    def _json(self, method: str, path: str, body: Mapping[str, object] | None) -> Any:
        response = self._send(method, self.base_url.removesuffix("/v1") + path, body)
        if response.status_code != HTTPStatus.OK:
            raise self._error(response.status_code, response.content, response.headers)
        try:
            return response.json()
        except ValueError as error:
            raise self._not_a_server() from error

    def chat(
        self, messages: Sequence[Message], *, model: str, sampling: Mapping[str, object] | None = None
    ) -> Generator[ChatChunk]:
        """Stream an answer; closing the iterator early stops the server's work on it."""
        body: dict[str, object] = {
            **(sampling or {}),
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with self._http.stream("POST", self.base_url + "/chat/completions", json=body) as response:
                if response.status_code != HTTPStatus.OK:
                    raise self._error(response.status_code, response.read(), response.headers)
                yield from self._chunks(response)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _chunks(self, response: httpx.Response) -> Iterator[ChatChunk]:
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            try:
                event = cast(dict[str, Any], json.loads(data))
            except ValueError as error:
                raise self._not_a_server() from error
            if "error" in event:
                raise EngineFailure(_error_fields(data.encode())[0])
            usage = cast(dict[str, int], event.get("usage") or {})
            choices = cast(list[dict[str, Any]], event.get("choices") or [{}])
            delta = cast(dict[str, str | None], choices[0].get("delta") or {})
            yield ChatChunk(
                delta.get("content") or "", choices[0].get("finish_reason"), usage.get("completion_tokens")
            )
        raise EngineFailure(f"the answer of {self.base_url} broke off; ask again")

    def _send(self, method: str, url: str, body: Mapping[str, object] | None = None) -> httpx.Response:
        try:
            return self._http.request(method, url, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _error(self, status: int, body: bytes, headers: httpx.Headers) -> ServingError:
        message, param = _error_fields(body)
        match status:
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                return Unauthorized(
                    f"{self.base_url} refused the API key: {message}; give the right one as --api-key"
                )
            case HTTPStatus.NOT_FOUND:
                return NotFound(message)
            case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.SERVICE_UNAVAILABLE:
                retry_after = headers.get("retry-after", "")
                return NoCapacity(message, retry_after_s=float(retry_after) if retry_after.isdigit() else 1.0)
            case _ if 400 <= status < 500:
                return BadRequest(message, param=param)
            case _:
                return EngineFailure(f"{self.base_url} answered HTTP {status}: {message}")

    def _unreachable(self, error: httpx.HTTPError) -> ServingError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return BadSetup(
                f"nothing answers at {self.base_url} ({error}); start a server with 'plait serve'"
            )
        if isinstance(error, httpx.TimeoutException):
            return EngineFailure(f"{self.base_url} has been silent for {SILENCE_S:.0f} s; ask again")
        return EngineFailure(f"the connection to {self.base_url} broke: {error or type(error).__name__}")

    def _not_a_server(self) -> BadSetup:
        return BadSetup(f"what answers at {self.base_url} is not an OpenAI-compatible server; check the URL")


def _error_fields(body: bytes) -> tuple[str, str | None]:
    """Message and parameter of an OpenAI error envelope, or the text as it came."""
    try:
        error = cast(dict[str, Any], json.loads(body)["error"])
        return str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        return body[:500].decode(errors="replace").strip() or "no explanation", None
