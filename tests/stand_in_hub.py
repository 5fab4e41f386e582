"""A model hub on a loopback port: as much of the Hugging Face API as a download needs."""

import hashlib
import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandInHub:
    """Holds repositories as `{file name: bytes}`; can demand a token, gate, break off, or lose ranges."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.token: str | None = None
        self.breaks_left = 0
        """How many downloads of weights break off in their middle."""
        self.weights_may_go = threading.Event()
        """Clear it, and weights are not sent until it is set."""
        self.weights_may_go.set()
        self.claimed_bytes: dict[str, int] = {}
        """Sizes to report instead of the true ones, by file name."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and Range of everything asked for."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.weights_may_go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self, name: str) -> list[str]:
        """The ranges in which a file was fetched ('' for all of it)."""
        return [span for method, path, span in self.requests if method == "GET" and path.endswith("/" + name)]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def log_message(self, format: str, *args: object) -> None: ...

            def _answer(self) -> None:
                path = urlsplit(self.path).path
                hub.requests.append((self.command, path, self.headers.get("Range", "")))
                if match := re.fullmatch(r"/api/models/(.+?)(/revision/[^/]+)?", path):
                    self._model(match[1])
                elif match := re.fullmatch(r"/(.+)/resolve/[^/]+/([^/]+)", path):
                    self._file(match[1], match[2])
                else:
                    self._refuse(404, "")

            def _admits(self, repo: str) -> bool:
                if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self._refuse(401, "")
                elif repo not in hub.repositories:
                    self._refuse(404, "RepoNotFound")
                elif repo in hub.gated:
                    self._refuse(403, "GatedRepo")
                else:
                    return True
                return False

            def _model(self, repo: str) -> None:
                if not self._admits(repo):
                    return
                files = [
                    {"rfilename": name, "size": hub.claimed_bytes.get(name, len(data)), "blobId": sha1(data)}
                    for name, data in hub.repositories[repo].items()
                ]
                body = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files}).encode()
                self._send(200, body, {"Content-Type": "application/json"})

            def _file(self, repo: str, name: str) -> None:
                if not self._admits(repo):
                    return
                data = hub.repositories[repo].get(name)
                if data is None:
                    self._refuse(404, "EntryNotFound")
                    return
                headers = {"ETag": f'"{sha1(data)}"', "Accept-Ranges": "bytes"}
                status, start = 200, 0
                if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                    status, start = 206, int(match[1])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._send(status, data[start:], headers, weights=name.endswith(".safetensors"))

            def _refuse(self, status: int, code: str) -> None:
                self._send(status, b"{}", {"X-Error-Code": code} if code else {})

            def _send(self, status: int, body: bytes, headers: dict[str, str], weights: bool = False) -> None:
                self.send_response(status)
                length = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
                for name, value in {**headers, **length}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if weights:
                    hub.weights_may_go.wait()
                breaks = bool(weights and hub.breaks_left)
                hub.breaks_left -= breaks
                self.close_connection = breaks
                # A client that has gone away is no fault of this server.
                with suppress(ConnectionError):
                    self.wfile.write(body[: len(body) // 2] if breaks else body)

        return Handler


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
