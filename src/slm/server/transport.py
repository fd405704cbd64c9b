"""uvicorn's protocol class for HTTP, with limits on what a peer may send.

`uvicorn.Config(http=…)` takes a class; this subclasses the pinned version's. Knows no agent and no
token, only bytes, limits and timers. The other class, for WebSockets, is in `handshake`.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import TimerHandle
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADERS: Final = 100
"""How many header fields a request may have; past 128 the WebSocket parser would answer nothing."""

LINGER_SECONDS: Final = 2.0
"""How long a refused peer may go on sending before its connection is cut.

Closing with unread bytes sends a reset, which can overtake the answer that says why.
"""


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a limit on the request's head and on the time that head and body may take.

    Without the first an upgrade with large headers hangs for ever, since the WebSocket parser never
    answers it; without the second a peer that sends half a header or half a body keeps its
    connection for ever. What stands around the chunks of a body is limited as a head is: the parser
    would keep a trailer of any size.
    """

    max_header_bytes = 8192
    header_timeout_seconds = 10.0

    _header_timer: TimerHandle | None = None
    _in_head = True
    _in_body = False
    _head_bytes = 0
    _field_bytes = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request's head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock."""
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the peer was refused; what it still sends is thrown away."""
        if self._refused or self.parser is None:
            return
        self._unset_keepalive_if_required()
        if self._in_head or self._in_body:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._stop_header_timer()
            # Any other upgrade, such as curl's h2c, is ignored (RFC 9110 section 7.8).
            if self._should_upgrade():
                self.handle_websocket_upgrade()
                # The parser holds this object and is held by it: cut, both are freed at once.
                self.parser = None  # type: ignore[assignment]
        except httptools.HttpParserError:
            self._refuse(431 if self._field_bytes > self.max_header_bytes else 400)
        else:
            if (self._in_head or self._in_body) and self._head_bytes > self.max_header_bytes:
                self._refuse(431)
            elif self._in_body and self._header_timer is None:
                self._header_timer = self.loop.call_later(
                    self.header_timeout_seconds, self._body_is_late
                )
            elif self._in_head and self._head_bytes and self._header_timer is None:
                self._expect_head()

    def on_message_begin(self) -> None:
        """Count a new head."""
        super().on_message_begin()
        self._in_head = True
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header field; a trailer counts too."""
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= MAX_HEADERS:
            self._count(self.max_header_bytes)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the clock: what follows is the body."""
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; its size is the application's to limit."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for the next request, if the connection is kept."""
        self._in_head, self._in_body = True, False
        self._head_bytes = 0
        self._stop_header_timer()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Close when idle, else after the answer under way."""
        self._stop_header_timer()
        super().shutdown()

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.max_header_bytes:
            # Inside a callback of the parser this ends the parsing.
            raise ValueError("the request's head is over the limit")

    def _expect_head(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._header_timer = None
        if self._head_bytes:
            self._refuse(408)
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        """Cut the connection: the request is answered already, or waits for its body in vain."""
        self._header_timer = None
        self.transport.abort()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, status: int) -> None:
        """Answer with a problem and close, reading on for a moment so that the answer arrives."""
        if self._refused:
            return
        self._refused = True
        self._stop_header_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            # An earlier request of the same connection is still being answered.
            self.transport.abort()
            return
        code, title = REFUSALS[status]
        problem = {"type": "about:blank", "title": title, "status": status, "detail": title}
        body = json.dumps(problem | {"code": code}).encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/problem+json\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def eof_received(self) -> None:
        """Let a half-closed connection end."""
        if self._refused:
            self.transport.abort()


REFUSALS: Final = {
    400: ("bad-request", "The request cannot be read"),
    408: ("request-timeout", "The request's head did not come in time"),
    431: ("header-fields-too-large", "The request's head is too large"),
}
"""What the parser itself refuses, by status: the problem's code and title."""


def http_protocol(max_header_bytes: int, header_timeout_seconds: float) -> type[HttpProtocol]:
    """Return the HTTP protocol class with these limits, for `uvicorn.Config(http=…)`."""
    limits = {
        "max_header_bytes": max_header_bytes,
        "header_timeout_seconds": header_timeout_seconds,
    }
    return type("LimitedHttpProtocol", (HttpProtocol,), limits)
