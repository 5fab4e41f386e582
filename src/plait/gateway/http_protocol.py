"""uvicorn's HTTP protocol with what it lacks against clients that never come to an end.

A request's head is bounded in size and time, else a client may send headers for ever or hold a
connection without a request. A body that was refused half-way is thrown away for a while, since closing
at once would take the answer from the client, but not for ever. And the app is given a way to drop a
connection: closing one whose client reads nothing would wait until it reads.
"""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class HttpProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=HttpProtocol)`."""

    max_head_bytes = 128 * 2**10
    """Above any limit that `GatewayOptions` sets in earnest: those refuse politely, this one closes."""
    head_s = 30.0
    """How long a connection may take to send the head of its request; nginx allows 60 s."""
    refused_body_s = 5.0
    """How long the rest of a refused body is thrown away; nginx lingers as long."""

    _head_bytes = 0
    _head_due: asyncio.TimerHandle | None = None
    _body_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        self._stop_discarding()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_due is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_due is not None and self._head_bytes > self.max_head_bytes:
            self._refuse_head(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"plait.connection": {"abort": self.transport.abort}}
        if self._head_due is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_expecting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_discarding()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.more_body and self._body_due is None:
            self._body_due = self.loop.call_later(self.refused_body_s, self.transport.abort)
        super().on_response_complete()

    def _stop_discarding(self) -> None:
        if self._body_due is not None:
            self._body_due.cancel()
            self._body_due = None

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_due = self.loop.call_later(self.head_s, self._refuse_head, HTTPStatus.REQUEST_TIMEOUT)

    def _stop_expecting(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _refuse_head(self, status: HTTPStatus) -> None:
        self._stop_expecting()
        if not self.transport.is_closing():
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode())
            self.transport.close()
